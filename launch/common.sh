# Shared by the scripts of this folder: flags, messages, and calls of gcloud.
# Sourced; a script sets `usage` and reads its own flags with `own_flag`.
# shellcheck shell=bash disable=SC2034,SC2154  # scripts use and set these variables

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} bucket=${TPU_BUCKET:-}
dry_run=
# shellcheck disable=SC2016  # the worker's shell expands it
remote='$HOME/llamagen'

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# parse "$@": the common flags into variables; others go to own_flag NAME VALUE, which
# returns 0 = took no value, 1 = took the value, 2 = unknown. `words` follow after --.
parse() {
  words=()
  while (($#)); do
    case $1 in
      --name | --zone | --project | --bucket)
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
  bucket=${bucket%/}
  [[ -z $bucket || $bucket == gs://?* ]] || die "--bucket $bucket: expected gs://NAME"
}

# Runs a command; with --dry-run it is only printed.
call() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# gcloud's own words, with zone and project added.
tpu() {
  call gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"}
}

# on WORKER COMMAND: runs a line of shell on a worker, or on `all` of them.
on() {
  tpu tpu-vm ssh "$name" "--worker=$1" "--command=$2"
}

# READY, PREEMPTED, CREATING ..; MISSING if there is no such TPU, UNKNOWN if gcloud fails.
state() {
  local said
  { said=$(tpu tpu-vm describe "$name" "--format=value(state)" 2>&1 >&3); } 3>&1 && return
  case $said in
    *NOT_FOUND* | *"not found"*) echo MISSING ;;
    *) echo UNKNOWN && echo "$said" >&2 ;;
  esac
}

# Refuses a --bucket that is not in the region of the zone: every byte would cost.
check_bucket() {
  [[ $bucket ]] || return 0
  local root found kind region=${zone%-*}
  root=gs://$(cut -d/ -f3 <<<"$bucket")
  local describe=(gcloud storage buckets describe "$root"
    "--format=value(location,location_type)" ${project:+"--project=$project"})
  if [[ $dry_run ]]; then
    call "${describe[@]}"
    return
  fi
  found=$("${describe[@]}") || die "--bucket $bucket: gcloud cannot describe $root"
  read -r found kind <<<"${found,,}"
  [[ $found != "$region" ]] || return 0
  case $kind:$found:$region in # of several regions
    *-region:us:us-* | *-region:nam*:us-* | *-region:eu:europe-* | \
      *-region:eur*:europe-* | *-region:asia*:asia-*)
      echo "${0##*/}: $root is a $kind, $found; reading it in $region may cost" >&2
      return 0
      ;;
  esac
  die "--bucket $bucket is in $found, the TPU in $region; make one there:" \
    "gcloud storage buckets create gs://NAME --location=$region"
}
