# Makes .venv from the pinned versions of constraints.txt, once, and puts it first on the PATH. To be sourced from the
# repository's root. PYTHON names the interpreter; without it, the first of these that is 3.11 or later.
# shellcheck shell=sh
if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3 python3.13 python3.12 python3.11 ""; do
    if [ -z "$PYTHON" ]; then
      echo "Python 3.11 or later is needed; set PYTHON to one" >&2
      exit 2
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
fi
wanted=$(cat constraints.txt setup.py | cksum)
if [ "$(cat .venv/made-from 2>/dev/null)" != "$wanted" ]; then
  echo "making .venv with $("$PYTHON" --version) and the versions of constraints.txt"
  rm -rf .venv
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test${EXTRA:+,$EXTRA}]" &&
    echo "$wanted" > .venv/made-from
fi
PATH="$PWD/.venv/bin:$PATH"
