#!/usr/bin/env bash
# A run on a SLURM cluster, from a directory that all nodes share: one task for each GPU, or for each node without any.
#   launch/slurm.sh [--dry-run] [--nodes 2 --ntasks-per-node 8 --gpus-per-node 8, other options of sbatch] -- --workdir DIR --config ...
# The job saves five minutes before its time is up and queues itself again, until the run is complete or fails.
set -eo pipefail
. "$(dirname "$0")/common.sh"
[ -n "$workdir" ] || usage
run sbatch --requeue --open-mode append --output slurm-%j.log --signal TERM@300 "${arguments[@]}" launch/job.sh "$workdir" "${train[@]}"
