#!/usr/bin/env bash
# What the other scripts run on a worker: setup EXTRAS | start COMMAND .. | status
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

running() {
  [[ -f logs/run.pid ]] && kill -0 "$(<logs/run.pid)" 2>/dev/null
}

start() {
  if running; then
    echo "$(hostname): runs already, as $(<logs/run.pid)"
    return
  fi
  rm -f logs/run.exit
  [[ ! -f logs/run.log ]] || cat logs/run.log >>logs/earlier.log
  # setsid: the run outlives the ssh session that starts it.
  PATH=$PWD/venv/bin:$PATH setsid bash -c \
    '"$@"; echo $? >logs/run.exit' _ "$@" >logs/run.log 2>&1 </dev/null &
  echo $! >logs/run.pid
  echo "$(hostname): started"
}

# One word: none | running | finished | stopped (to be resumed) | failed
status() {
  if running; then
    echo running
  elif [[ ! -f logs/run.pid ]]; then
    echo none
  elif [[ $(cat logs/run.exit 2>/dev/null) != 0 ]]; then
    echo failed
  elif tail -n 5 logs/run.log | grep -q "resume with the same command"; then
    echo stopped
  else
    echo finished
  fi
}

"$@"
