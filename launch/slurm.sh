#!/usr/bin/env bash
# Starts a run on a SLURM cluster. Use it in a directory that all nodes share, with one task for
# each GPU, or for each node if there are no GPUs:
#   launch/slurm.sh [--dry-run] [--nodes 2 --ntasks-per-node 8 --gpus-per-node 8, other options of sbatch] -- --workdir DIR --config ...
# Five minutes before its time limit the job saves and returns to the queue, until the run is
# complete or fails.
set -eo pipefail
. "$(dirname "$0")/common.sh"
[ -n "$workdir" ] || usage
run sbatch --requeue --open-mode append --output slurm-%j.log --signal TERM@300 "${arguments[@]}" launch/job.sh "$workdir" "${train[@]}"
