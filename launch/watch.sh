#!/usr/bin/env bash
# Keeps a run going until it has finished: makes the TPU, sets it up, starts the
# command; makes the TPU again when it was taken away, and resumes the run.
set -euo pipefail
usage="usage: watch.sh --name NAME --zone ZONE --type TYPE [flags] -- llamagen train-gpt ..

  --type, --version, --spot, --queued, --valid-for   as create.sh takes them
  --extras LIST     as setup.sh takes it
  --retries N       failures in a row, each within half an hour of the start, before
                    giving up (default: 3)
  --project ID      (default: gcloud's)
  --dry-run         print the gcloud commands of one round only

The command has to resume what it finds, as the trainers do. The TPU is left standing
at the end; delete.sh deletes it. Exit code: 0 finished, 1 given up."
here=$(dirname "$0")
# shellcheck source=launch/common.sh
source "$here/common.sh"

create=() setup=() queued=() retries=3
own_flag() {
  case $1 in
    --type | --version | --valid-for) create+=("$1" "$2") ;;
    --extras) setup+=("$1" "$2") ;;
    --retries) retries=$2 ;;
    --spot) create+=("$1") && return 0 ;;
    --queued) create+=("$1") && queued=("$1") && return 0 ;;
    *) return 2 ;;
  esac
  return 1
}
parse "$@"
((${#words[@]})) || die "no command after --"
[[ $retries =~ ^[0-9]+$ ]] || die "--retries $retries: expected a number"
[[ " ${create[*]-} " == *" --type "* ]] || die "--type is required"
place=(--name "$name" --zone "$zone" ${project:+--project "$project"} ${dry_run:+--dry-run})

log() { echo "$(date '+%F %T') $*"; }
begin() { started=$SECONDS && "$here/run.sh" "${place[@]}" -- "${words[@]}"; }
prepare() { "$here/setup.sh" "${place[@]}" ${setup[@]+"${setup[@]}"} && begin; }
make() { "$here/create.sh" "${place[@]}" "${create[@]}" && prepare; }

if [[ $dry_run ]]; then
  make
  exit
fi
failures=0 started=$SECONDS
while true; do
  case $(state) in
    READY) found=$(on 0 "bash $remote/launch/worker.sh status" 2>/dev/null) || found=unknown ;;
    MISSING) found=missing ;;
    CREATING | STARTING | REPAIRING | RESTARTING) found=coming ;;
    *) found=gone ;; # PREEMPTED, TERMINATED, STOPPED ..
  esac
  case $found in
    running) ;;
    finished) log "finished" && exit 0 ;;
    stopped)
      log "stopped and saved; resuming"
      begin || true
      ;;
    failed)
      ((SECONDS - started < 1800)) || failures=0
      failures=$((failures + 1))
      if ((failures > retries)); then
        log "failed $failures times in a row"
        exit 1
      fi
      log "failed; starting again, $failures of $retries"
      begin || true
      ;;
    none) prepare || true ;;
    missing)
      log "making $name"
      make || log "no TPU yet"
      ;;
    gone)
      log "$name was taken away; making it again"
      "$here/delete.sh" "${place[@]}" ${queued[@]+"${queued[@]}"} || true
      make || log "no TPU yet"
      ;;
    *) ;; # on its way, or not to be reached at the moment
  esac
  sleep "${POLL_SECONDS:-60}"
done
