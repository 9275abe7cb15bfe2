#!/usr/bin/env bash
# The command that a cluster runs, in the repository's root: launch/job.sh WORKDIR TRAIN_ARGUMENTS
# Exit code 0 means that the run is complete. A run that was stopped and has saved gives 42: xpk
# then starts it again, and under SLURM the job returns to the queue. Every other code is the run's
# own: 1 means that a machine was lost, and xpk starts the run again; 2 (a user error), 70 (an
# unforeseen error) and all others end the job.
set -o pipefail
workdir=$1 && shift
. launch/environment.sh || exit
trap '[ -n "$SLURM_JOB_ID" ] || kill -TERM $! || exit 143' TERM # SLURM signals the tasks itself
${SLURM_JOB_ID:+srun --kill-on-bad-exit} python -m alignjax.train --distributed "$@" &
run=$!
while kill -0 "$run" 2> /dev/null; do wait "$run"; done # a trap interrupts a wait
wait "$run"
code=$?
case $code in 0 | 143) ;; *) exit "$code" ;; esac # 143: SIGTERM arrived before the run handled it
python -c 'import sys; from etils import epath; sys.exit(0 if epath.Path(sys.argv[1], "summary.json").exists() else 42)' "$workdir"
code=$?
if [ "$code" = 42 ] && [ -n "$SLURM_JOB_ID" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
