#!/usr/bin/env bash
# Deletes a TPU, and its request in the queue if it has one.
set -euo pipefail
usage="usage: delete.sh --name NAME --zone ZONE [flags]

  --queued          it came from the queue
  --project ID      (default: gcloud's)
  --dry-run         print the gcloud commands only"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

queued=''
own_flag() {
  [[ $1 == --queued ]] || return 2
  queued=1
}
parse "$@"
if [[ $queued ]]; then
  tpu queued-resources delete "$name" --force --quiet
else
  tpu tpu-vm delete "$name" --quiet
fi
