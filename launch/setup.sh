#!/usr/bin/env bash
# Puts this checkout and one virtual environment on every worker; again is harmless.
set -euo pipefail
usage="usage: setup.sh --name NAME --zone ZONE [flags]

  --extras LIST     extras of setup.py to install (default: tpu)
  --project ID      (default: gcloud's)
  --dry-run         print the gcloud commands only

What is sent are the files of this checkout that git does not ignore."
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

extras=tpu
own_flag() {
  [[ $1 == --extras ]] || return 2
  extras=$2
  return 1
}
parse "$@"
((${#words[@]} == 0)) || die "unexpected argument ${words[0]}"

archive=$(mktemp -d)/llamagen.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
cd "$(dirname "$0")/.."
git ls-files -z --cached --others --exclude-standard --deduplicate | tar --null -T - -czf "$archive"

# The first ssh makes and spreads the key, which workers side by side would race for.
on 0 true
tpu tpu-vm scp "$archive" "$name:llamagen.tar.gz" --worker=all
on all "mkdir -p $remote && tar -xzf llamagen.tar.gz -C $remote && bash $remote/launch/worker.sh setup $(printf %q "$extras")"
