# What the scripts of this folder share: flags, messages, and calls of gcloud.
# Sourced; a script sets `usage` and reads its own flags with `own_flag`.
# shellcheck shell=bash disable=SC2034,SC2154  # scripts use and set what is here

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} dry_run=
# shellcheck disable=SC2016  # the worker's shell expands it
remote='$HOME/llamagen'

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# parse "$@": the common flags into variables; others go to own_flag NAME VALUE, which
# says 0 = took no value, 1 = took the value, 2 = unknown. What follows -- is `words`.
parse() {
  words=()
  while (($#)); do
    case $1 in
      --name | --zone | --project)
        [[ ${2-} && $2 != --* ]] || die "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
      --dry-run) dry_run=1 ;;
      --help | -h)
        echo "$usage"
        exit 0
        ;;
      --)
        shift
        words=("$@")
        break
        ;;
      *)
        local took=0
        own_flag "$1" "${2-}" || took=$?
        case $took in
          0) ;;
          1)
            [[ ${2-} && $2 != --* ]] || die "$1 needs a value"
            shift
            ;;
          *) die "unknown flag $1; see --help" ;;
        esac
        ;;
    esac
    shift
  done
  [[ $name ]] || die "--name is required (or TPU_NAME)"
  [[ $zone ]] || die "--zone is required (or TPU_ZONE)"
}

# gcloud's own words, the place added; with --dry-run they are only printed.
tpu() {
  local call=(gcloud compute tpus "$@" "--zone=$zone")
  [[ $project ]] && call+=("--project=$project")
  if [[ $dry_run ]]; then
    printf '%q ' "${call[@]}"
    echo
  else
    "${call[@]}"
  fi
}

# on WORKER COMMAND: runs a line of shell on a worker, or on `all` of them.
on() {
  tpu tpu-vm ssh "$name" "--worker=$1" "--command=$2"
}

# READY, PREEMPTED, CREATING ..; MISSING if there is no such TPU.
state() {
  tpu tpu-vm describe "$name" "--format=value(state)" 2>/dev/null || echo MISSING
}
