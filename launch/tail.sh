#!/usr/bin/env bash
# Follows the log of a worker's run, or shows its copy in the bucket.
set -euo pipefail
usage="usage: tail.sh --name NAME --zone ZONE [flags]

  --worker N|all    whose log (default: 0)
  --lines N         how many of the lines that are there already (default: 40)
  --once            do not follow
  --bucket GS       show the newest log that run.sh copied to this bucket, and end;
                    it is still there when the TPU is not
  --project ID      (default: gcloud's)
  --dry-run         print the gcloud commands only"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

worker=0 lines=40 follow=-F
own_flag() {
  case $1 in
    --worker) worker=$2 ;;
    --lines) lines=$2 ;;
    --once) follow='' && return 0 ;;
    *) return 2 ;;
  esac
  return 1
}
parse "$@"
[[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker $worker: expected a number or all"
[[ $lines =~ ^[0-9]+$ ]] || die "--lines $lines: expected a number"
if [[ -z $bucket ]]; then
  on "$worker" "tail -n $lines $follow $remote/logs/run.log"
  exit
fi
pattern="$bucket/logs/$name/*-w-${worker/all/*}.log"
if [[ $dry_run ]]; then
  call gcloud storage ls "$pattern"
  exit
fi
copies=$(gcloud storage ls "$pattern") || die "no log at $pattern"
# Names begin with the time of the start and end with the worker.
sort <<<"$copies" | awk -F- '{newest[$NF] = $0} END {for (w in newest) print newest[w]}' |
  sort | while IFS= read -r copy; do
  [[ $worker != all ]] || echo "== $copy"
  gcloud storage cat "$copy" </dev/null | tail -n "$lines"
done
