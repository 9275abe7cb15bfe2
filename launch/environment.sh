# Creates .venv with the versions that constraints.txt pins, unless it is up to date, and puts it
# first on the PATH. Source it from the repository's root. PYTHON names the interpreter; without
# it, the first of the names below that is Python 3.11 or later is used.
# shellcheck shell=sh
if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3 python3.13 python3.12 python3.11 ""; do
    if [ -z "$PYTHON" ]; then
      echo "Python 3.11 or later is needed; set PYTHON to its path" >&2
      exit 2
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
fi
wanted=$(cat constraints.txt setup.py | cksum)
if [ "$(cat .venv/made-from 2>/dev/null)" != "$wanted" ]; then
  if [ -e .venv ] && [ ! -e .venv/made-by-alignjax ] && [ ! -e .venv/made-from ]; then
    echo ".venv exists, and this script has not made it: move it away, or activate it and install alignjax into it" >&2
    exit 2
  fi
  echo "creating .venv with $("$PYTHON" --version) and the versions that constraints.txt pins"
  rm -rf .venv
  mkdir .venv
  touch .venv/made-by-alignjax  # first, so that a .venv that was left half-made is known
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test${EXTRA:+,$EXTRA}]" &&
    echo "$wanted" > .venv/made-from
fi
PATH="$PWD/.venv/bin:$PATH"
