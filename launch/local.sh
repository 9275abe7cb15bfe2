#!/usr/bin/env bash
# The main job on one machine: makes the environment, then pretraining, SFT, PMP, RM and PPO, into runs/.
# Arguments are train's: ./launch/local.sh --config rm.py; EXTRA=cuda ./launch/local.sh installs for a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
case " $* " in *" --config "* | *" --config="*) ;; *) set -- --config ppo.py "$@" ;; esac
exec python -m alignjax.train "$@"
