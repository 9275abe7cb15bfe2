#!/usr/bin/env bash
# Every check: makes the environment, then lint, format and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
ruff check .
ruff format --check .
exec python -m pytest -q -n 2 --dist loadfile tests "$@"
