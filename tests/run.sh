#!/usr/bin/env bash
# Every check: makes the environment, then lint, format and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
# The TPU compiler, which needs no TPU, in a folder of its own: jax looks for TPUs wherever it can import it.
if [ ! -d .venv/tpu-compiler/libtpu ]; then
  python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target .venv/tpu-compiler libtpu
fi
ruff check .
ruff format --check .
exec python -m pytest -q -n 2 --dist loadfile --durations=15 tests "$@"
