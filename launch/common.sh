# Shared by the launchers, which source it. It splits "[--dry-run] ARGUMENTS -- TRAIN_ARGUMENTS"
# into the arrays `arguments` and `train`, sets `workdir` to the --workdir of alignjax.train, and
# changes to the repository's root.
# shellcheck shell=bash

# Prints the comment at the top of the launcher and exits with 2.
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2 && exit 2; }

dry="" arguments=() workdir=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --dry-run ]; then dry=1; else arguments+=("$1"); fi
  shift
done
train=("${@:2}")
while [ $# -gt 0 ]; do
  case $1 in
    --workdir) workdir=${2-} ;;
    --workdir=*) workdir=${1#*=} ;;
  esac
  shift
done
[ ${#train[@]} -eq 0 ] || [ -n "$workdir" ] || usage

# Prints its arguments as one line that a shell reads as the same words.
quoted() {
  local word words=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then words+=("$word"); else words+=("'${word//\'/\'\\\'\'}'"); fi
  done
  echo "${words[*]}"
}

# Prints a command, and runs it unless --dry-run was given.
run() {
  quoted "$@" >&3
  [ -n "$dry" ] || "$@"
}
exec 3>&1
cd "$(dirname "$0")/.." || exit
