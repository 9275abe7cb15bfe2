#!/usr/bin/env bash
# Runs the main job on one machine: creates the environment; trains pretraining, SFT, PMP, RM and
# PPO into runs/; writes the report runs/ppo/report.html; and prints a table of the policy's
# abilities before and after PPO. With arguments, which are those of alignjax.train, it runs only
# what they name: ./launch/local.sh --config rm.py
# EXTRA=cuda ./launch/local.sh installs JAX for a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
if [ $# -eq 0 ]; then
  python -m alignjax.train --config ppo.py
  python -m alignjax.report runs/ppo
  exec python -m alignjax.evaluate --run runs/sft runs/ppo --tasks world
fi
case " $* " in *" --config "* | *" --config="*) ;; *) set -- --config ppo.py "$@" ;; esac
exec python -m alignjax.train "$@"
