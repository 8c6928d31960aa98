#!/usr/bin/env bash
# Starts a command on all workers, where it goes on without you; setup.sh comes first.
set -euo pipefail
usage="usage: run.sh --name NAME --zone ZONE [flags] -- llamagen train-gpt --workdir=gs://.. ..

  --bucket GS       copy the logs to gs://BUCKET/logs/NAME/ once a minute
  --project ID      (default: gcloud's)
  --dry-run         print the gcloud commands only

Every worker writes ~/llamagen/logs/run.log; tail.sh shows it. A run that is going on
already is left alone. LLAMAGEN_* and HF_TOKEN of your environment go along, in a file
that only you can read and that the workers delete when the command starts."
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

own_flag() { return 2; }
parse "$@"
((${#words[@]})) || die "no command after --"
check_bucket

# On a command line a token would show in the list of processes and in gcloud's log.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for variable in $(compgen -e); do
  [[ $variable == LLAMAGEN_* || $variable == HF_TOKEN ]] || continue
  (umask 077 && printf 'export %s=%q\n' "$variable" "${!variable}" >>"$folder/env")
done
if [[ -f $folder/env ]]; then
  tpu tpu-vm scp "$folder/env" "$name:llamagen.env" --worker=all
fi
logs=${bucket:+$bucket/logs/$name}
on all "bash $remote/launch/worker.sh start $(printf '%q ' "$logs" "${words[@]}")"
