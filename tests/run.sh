#!/usr/bin/env bash
# Runs every check: creates the environment, then runs the linter, the formatter and the tests.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
# The compilers for TPUs and GPUs, which need neither. Each has a directory of its own, because JAX
# looks for devices wherever it can import a compiler.
install_compiler() { # DIRECTORY PACKAGE...
  [ -e ".venv/$1/installed" ] && return
  python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
    --target ".venv/$1" --upgrade "${@:2}"
  touch ".venv/$1/installed"
}
install_compiler tpu-compiler libtpu
install_compiler gpu-compiler jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
ruff check .
ruff format --check .
# Two processes, each with one file at a time, in the order of tests/conftest.py.
exec python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 tests "$@"
