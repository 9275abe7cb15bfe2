#!/usr/bin/env bash
# The main job on one machine: makes the environment, then pretraining, SFT, PMP, RM and PPO, into runs/, the report
# runs/ppo/report.html, and the table of what the policy can do before PPO and after. With arguments, which are train's, it
# runs what they ask for, and no more: ./launch/local.sh --config rm.py; EXTRA=cuda ./launch/local.sh installs for a GPU.
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
