# For the launchers, to be sourced: takes "[--dry-run] ARGUMENTS -- TRAIN'S ARGUMENTS" apart into arguments, train, and
# workdir, which is train's --workdir; goes to the repository's root.
# shellcheck shell=bash
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

# Words as a shell has to read them.
quoted() {
  local word words=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then words+=("$word"); else words+=("'${word//\'/\'\\\'\'}'"); fi
  done
  echo "${words[*]}"
}

# Prints a command, then runs it; with --dry-run it only prints.
run() {
  quoted "$@" >&3
  [ -n "$dry" ] || "$@"
}
exec 3>&1
cd "$(dirname "$0")/.." || exit
