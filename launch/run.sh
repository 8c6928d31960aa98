#!/usr/bin/env bash
# Starts a command on all workers, where it goes on without you; setup.sh comes first.
set -euo pipefail
usage="usage: run.sh --name NAME --zone ZONE [flags] -- llamagen train-gpt --workdir=gs://.. ..

  --project ID      (default: gcloud's)
  --dry-run         print the gcloud commands only

Every worker writes ~/llamagen/logs/run.log; tail.sh shows it. A run that is going on
already is left alone."
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

own_flag() { return 2; }
parse "$@"
((${#words[@]})) || die "no command after --"
on all "bash $remote/launch/worker.sh start$(printf ' %q' "${words[@]}")"
