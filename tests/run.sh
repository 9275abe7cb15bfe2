#!/usr/bin/env bash
# Runs every check: creates the environment, then runs the linter, the formatter and the tests.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
# The TPU compiler, which needs no TPU. It has a directory of its own, because JAX looks for TPUs
# wherever it can import libtpu.
if [ ! -d .venv/tpu-compiler/libtpu ]; then
  python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
    --target .venv/tpu-compiler libtpu
fi
ruff check .
ruff format --check .
# Two processes, each with one file at a time, in the order of tests/conftest.py.
exec python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 tests "$@"
