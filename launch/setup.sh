#!/usr/bin/env bash
# Puts this checkout and one virtual environment on every worker; again is harmless.
set -euo pipefail
usage="usage: setup.sh --name NAME --zone ZONE [flags]

  --extras LIST     extras of setup.py to install (default: tpu,gcs)
  --dirty           send changes that are not committed, too
  --with PATH       send a file or folder that git does not track, too; may be repeated
  --limit MB        refuse to send more than this (default: 50)
  --project ID      (default: gcloud's)
  --dry-run         print the gcloud commands only

The files that git tracks are sent, as they are committed; nothing else."
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

extras=tpu,gcs dirty='' more=() limit=50
own_flag() {
  case $1 in
    --extras) extras=$2 ;;
    --with) more+=("$2") ;;
    --limit) limit=$2 ;;
    --dirty) dirty=1 && return 0 ;;
    *) return 2 ;;
  esac
  return 1
}
parse "$@"
((${#words[@]} == 0)) || die "unexpected argument ${words[0]}"
[[ $limit =~ ^[0-9]+$ ]] || die "--limit $limit: expected a number of MB"

cd "$(dirname "$0")/.."
git rev-parse --git-dir >/dev/null 2>&1 || die "$PWD is not a git checkout"
changed=$(git status --porcelain --untracked-files=no)
if [[ $changed && -z $dirty ]]; then
  die "not committed: $(head -n 3 <<<"$changed" | cut -c 4- | paste -sd ' ')" \
    "($(wc -l <<<"$changed") files); commit, or send them with --dirty"
fi
for path in ${more[@]+"${more[@]}"}; do
  [[ -e $path ]] || die "--with $path: no such file in $PWD"
done

# NUL-separated; a tracked file that was deleted is left out.
list() {
  git ls-files -z | while IFS= read -r -d '' path; do
    [[ ! -e $path && ! -L $path ]] || printf '%s\0' "$path"
  done
  ((${#more[@]} == 0)) || printf '%s\0' "${more[@]}"
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
archive=$folder/llamagen.tar.gz
list | tar --null -T - -czf "$archive"
bytes=$(wc -c <"$archive")
size=$((bytes / 1000000)).$((bytes / 100000 % 10))
echo "${0##*/}: $(git describe --always)${changed:+ with changes}, $size MB" >&2
((bytes <= limit * 1000000)) || die "$size MB to every worker; allow it by --limit"

# The first ssh makes and spreads the key, which workers side by side would race for.
on 0 true
tpu tpu-vm scp "$archive" "$name:llamagen.tar.gz" --worker=all
on all "mkdir -p $remote && tar -xzf llamagen.tar.gz -C $remote && bash $remote/launch/worker.sh setup $(printf %q "$extras")" ||
  exit 1 # not the worker's code: 2 means a mistake in the flags here
