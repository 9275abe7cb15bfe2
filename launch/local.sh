#!/usr/bin/env bash
# Runs the main job on one machine: creates the environment; trains pretraining, SFT, PMP, RM and
# PPO into runs/; writes the report runs/ppo/report.html; and prints two tables: the accuracy of
# PMP, of RM, and of RM without PMP; and the policy's abilities before and after PPO. With
# arguments, which are those of alignjax.train, it runs only what they name:
# ./launch/local.sh --config rm.py
# EXTRA=cuda ./launch/local.sh installs JAX for a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
if [ $# -eq 0 ]; then
  python -m alignjax.train --config ppo.py
  python -m alignjax.report runs/ppo
  python -m alignjax.train --config rm.py:no_pmp
  python -m alignjax.evaluate --run runs/pmp runs/rm runs/rm-no-pmp \
    --sets toy/comparisons-clean,toy/comparisons-noisy
  exec python -m alignjax.evaluate --run runs/sft runs/ppo --tasks world
fi
case " $* " in *" --config "* | *" --config="*) ;; *) set -- --config ppo.py "$@" ;; esac
exec python -m alignjax.train "$@"
