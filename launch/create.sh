#!/usr/bin/env bash
# Makes a TPU: on demand, as spot, or by queueing for it.
set -euo pipefail
usage="usage: create.sh --name NAME --zone ZONE --type TYPE [flags]

  --type TYPE       accelerator, such as v5litepod-16, v5p-128, v6e-8
  --version NAME    runtime version (default: the one of the type)
  --spot            cheaper, and taken away at any time; see watch.sh
  --queued          wait in the queue until the TPU is there
  --valid-for TIME  how long to queue, such as 6h (default: for ever)
  --bucket GS       refuse unless this bucket is in the zone's region
  --project ID      (default: gcloud's)
  --dry-run         print the gcloud commands only"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

type='' version='' spot='' queued='' valid_for=''
own_flag() {
  case $1 in
    --type) type=$2 ;;
    --version) version=$2 ;;
    --valid-for) valid_for=$2 ;;
    --spot) spot=1 && return 0 ;;
    --queued) queued=1 && return 0 ;;
    *) return 2 ;;
  esac
  return 1
}
parse "$@"
((${#words[@]} == 0)) || die "unexpected argument ${words[0]}"
[[ $type ]] || die "--type is required"
[[ -z $valid_for || $queued ]] || die "--valid-for goes with --queued"
if [[ -z $version ]]; then
  case $type in
    v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) die "--type $type: give its --version, only v4, v5litepod, v5p and v6e are known" ;;
  esac
fi

check_bucket
flags=("--accelerator-type=$type")
[[ $spot ]] && flags+=(--spot)
if [[ -z $queued ]]; then
  tpu tpu-vm create "$name" "${flags[@]}" "--version=$version"
  exit
fi
[[ $valid_for ]] && flags+=("--valid-until-duration=$valid_for")
state() { tpu queued-resources describe "$name" "--format=value(state.state)"; }
known=
[[ $dry_run ]] || known=$(state 2>/dev/null) || known=
case $known in # a request that came to nothing stays in the queue
  FAILED | SUSPENDED) tpu queued-resources delete "$name" --force --quiet && known= ;;
esac
[[ $known ]] || tpu queued-resources create "$name" "--node-id=$name" "${flags[@]}" \
  "--runtime-version=$version"
while [[ -z $dry_run ]]; do
  case $(state) in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED) echo "create.sh: the queue gave $name up" >&2 && exit 1 ;;
    *) sleep "${POLL_SECONDS:-30}" ;;
  esac
done
