#!/usr/bin/env bash
# Keeps a run going until it has finished: makes the TPU, sets it up, starts the
# command; makes the TPU again when it was taken away, and resumes the run.
set -euo pipefail
usage="usage: watch.sh --name NAME --zone ZONE --type TYPE [flags] -- llamagen train-gpt ..

  --type, --version, --spot, --queued, --valid-for   as create.sh takes them
  --extras, --dirty, --with, --limit                 as setup.sh takes them
  --failures N      give up after N failures at the same step: that of the newest
                    checkpoint in the command's --workdir (default: 3)
  --bucket GS       keep the logs there, as run.sh does
  --project ID      (default: gcloud's)
  --dry-run         print the gcloud commands of one round only

The command has to resume what it finds, as the trainers do. By its exit code it has
finished (0), has a mistake in its flags (2), was stopped and saved (75) or has failed
(any other). The TPU is left standing at the end; delete.sh deletes it.
Exit code: 0 finished, 1 given up, 2 a mistake in the flags or the command."
here=$(dirname "$0")
# shellcheck source=launch/common.sh
source "$here/common.sh"

create=() setup=() queued=() limit=3
own_flag() {
  case $1 in
    --type | --version | --valid-for) create+=("$1" "$2") ;;
    --extras | --with | --limit) setup+=("$1" "$2") ;;
    --failures) limit=$2 ;;
    --dirty) setup+=("$1") && return 0 ;;
    --spot) create+=("$1") && return 0 ;;
    --queued) create+=("$1") && queued=("$1") && return 0 ;;
    *) return 2 ;;
  esac
  return 1
}
parse "$@"
((${#words[@]})) || die "no command after --"
[[ $limit =~ ^[1-9][0-9]*$ ]] || die "--failures $limit: expected a positive number"
[[ " ${create[*]-} " == *" --type "* ]] || die "--type is required"
check_bucket
target=(--name "$name" --zone "$zone" ${project:+--project "$project"} ${dry_run:+--dry-run})

log() { echo "$(date '+%F %T') $*"; }

# Runs a script of this folder; a mistake in the flags will not mend itself.
script() {
  local code=0
  "$here/$1.sh" "${target[@]}" "${@:2}" || code=$?
  ((code != 2)) || exit 2
  return "$code"
}
begin() { script run ${bucket:+--bucket "$bucket"} -- "${words[@]}"; }
prepare() { script setup ${setup[@]+"${setup[@]}"} && begin; }
make() { script create "${create[@]}"; }

# A worker that is not set up has no script to ask.
ask="script=$remote/launch/worker.sh; test -f \$script || { echo none; exit; }; bash \$script status"

# Reads the workers' statuses; prints running, none, ended CODE STEP or unknown. The
# gravest code counts: 2, then other failures, then 75, then 0.
combine() {
  awk '
    /^running$/ { running = 1 }
    /^none$/ { none = 1 }
    /^ended [0-9]+ [0-9]+$/ {
      rank = $2 == 2 ? 3 : $2 == 0 ? 0 : $2 == 75 ? 1 : 2
      if (!ended || rank > gravest) { gravest = rank; code = $2 }
      if ($3 > step) step = $3
      ended = 1
    }
    END { print running ? "running" : none ? "none" : ended ? "ended " code " " step + 0 : "unknown" }'
}

failures=0 failed_at=
failed() {
  [[ $2 == "$failed_at" ]] || failures=0
  failures=$((failures + 1)) failed_at=$2
  log "$1 at step $2: failure $failures of $limit"
  ((failures < limit)) || { log "given up" && exit 1; }
}

if [[ $dry_run ]]; then
  make
  prepare
  exit
fi
step=0
while true; do
  case $(state) in
    READY)
      found=$(on all "$ask" 2>/dev/null | combine) || found=unknown
      ;;
    MISSING) found=missing ;;
    UNKNOWN | CREATING | STARTING | REPAIRING | RESTARTING) found=unknown ;;
    *) found=gone ;; # PREEMPTED, TERMINATED, STOPPED ..
  esac
  [[ $found != ended* ]] || step=${found##* }
  case $found in
    "ended 0 "*) log "finished" && exit 0 ;;
    "ended 2 "*)
      log "the command was refused:"
      on 0 "tail -n 5 $remote/logs/run.log" || true
      exit 2
      ;;
    "ended 75 "*)
      log "stopped at step $step; resuming"
      begin || true
      ;;
    ended*)
      failed "failed" "$step"
      begin || true
      ;;
    none) prepare || failed "not set up" "$step" ;;
    missing)
      log "making $name"
      make || log "no TPU yet"
      ;;
    gone)
      log "$name was taken away; making it again"
      script delete ${queued[@]+"${queued[@]}"} || true
      make || log "no TPU yet"
      ;;
    *) ;; # running, on its way, or not to be reached at the moment
  esac
  sleep "${POLL_SECONDS:-60}"
done
