#!/usr/bin/env bash
# Run on a worker by the other scripts:
#   setup EXTRAS              an environment for this checkout
#   start LOGS COMMAND ..     a run in the background; LOGS = '' or a folder in a bucket
#   status                    one line: none | running | ended CODE PROGRESS
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p logs

setup() {
  # Runtime images differ in their Python; uv brings one that fits setup.py.
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [[ -x venv/bin/python ]] || uv venv --quiet --python 3.11 venv
  uv pip install --quiet --python venv/bin/python -e ".[$1]"
  echo "$(hostname): set up"
}

boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || true; }

# After a reboot another process may have the number of the run.
running() {
  [[ -f logs/run.pid && $(cat logs/run.boot) == "$(boot)" ]] &&
    kill -0 "$(<logs/run.pid)" 2>/dev/null
}

start() {
  if running; then
    rm -f ~/llamagen.env
    echo "$(hostname): runs already, as $(<logs/run.pid)"
    return
  fi
  if [[ -f ~/llamagen.env ]]; then
    # shellcheck source=/dev/null
    source ~/llamagen.env
    rm ~/llamagen.env
  fi
  rm -f logs/run.exit
  [[ ! -f logs/run.log ]] || cat logs/run.log >>logs/earlier.log
  boot >logs/run.boot
  printf '%s\0' "${@:2}" >logs/run.command
  # setsid: the run outlives the ssh session that starts it.
  PATH=$PWD/venv/bin:$PATH setsid bash launch/worker.sh run "$@" \
    >logs/run.log 2>&1 </dev/null &
  echo $! >logs/run.pid
  echo "$(hostname): started"
}

# run LOGS COMMAND ..: leaves the exit code in logs/run.exit, and copies the log.
run() {
  local code=0 copy=${1:+$1/$(date -u +%Y%m%dT%H%M%SZ)-w-${HOSTNAME##*-w-}.log}
  "${@:2}" &
  child=$!
  # A handler, because an ignored signal would stay ignored in the command.
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  if [[ $copy ]]; then
    while kill -0 "$child" 2>/dev/null; do
      sleep "${COPY_SECONDS:-60}" &
      wait -n "$child" $! || true
      kill $! 2>/dev/null || true
      copy_log "$copy"
    done
  fi
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # the wait ended by a signal
    code=0
    wait "$child" || code=$?
  done
  echo "$code" >logs/run.exit.part
  mv logs/run.exit.part logs/run.exit
  [[ -z $copy ]] || copy_log "$copy"
}

copy_log() {
  gcloud storage cp logs/run.log "$1" >logs/copy.log 2>&1 || true
}

# The step of the newest checkpoint in the command's --workdir; 0 if there is none.
progress() {
  local folder='' before='' word
  while IFS= read -r -d '' word; do
    [[ $before != --workdir ]] || folder=$word
    [[ $word != --workdir=* ]] || folder=${word#*=}
    before=$word
  done <logs/run.command
  folder=${folder/#\~/$HOME}/checkpoints
  { if [[ $folder == gs://* ]]; then gcloud storage ls "$folder"; else ls "$folder"; fi; } \
    2>/dev/null | sed -nE "s,^(.*/)?step_0*([0-9]+)/?\$,\2,p" | sort -n | tail -n 1 | grep . || echo 0
}

# A run that a reboot ended has no exit code: it is to be resumed, as after code 75.
status() {
  if running; then
    echo running
  elif [[ ! -f logs/run.pid ]]; then
    echo none
  elif [[ -f logs/run.exit ]]; then
    echo "ended $(<logs/run.exit) $(progress)"
  elif [[ $(cat logs/run.boot) != "$(boot)" ]]; then
    echo "ended 75 $(progress)"
  else
    echo "ended 137 $(progress)" # killed together with its shell
  fi
}

"$@"
