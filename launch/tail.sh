#!/usr/bin/env bash
# Follows the log of a worker's run.
set -euo pipefail
usage="usage: tail.sh --name NAME --zone ZONE [flags]

  --worker N|all    whose log (default: 0)
  --lines N         how much of what is there already (default: 40)
  --once            do not follow
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
on "$worker" "tail -n $lines $follow $remote/logs/run.log"
