#!/usr/bin/env bash
# What a cluster runs, in the repository's root: launch/job.sh WORKDIR TRAIN'S ARGUMENTS. Exit code 0 says that the run is
# complete. One that was stopped and has saved exits with 42, at which xpk starts it again, or goes back to SLURM's queue.
set -o pipefail
workdir=$1 && shift
. launch/environment.sh || exit
trap '[ -n "$SLURM_JOB_ID" ] || kill -TERM $! || exit 143' TERM # SLURM tells the tasks by itself
${SLURM_JOB_ID:+srun --kill-on-bad-exit} python -m alignjax.train --distributed "$@" &
run=$!
while kill -0 "$run" 2> /dev/null; do wait "$run"; done # a trap ends a wait before its time
wait "$run"
code=$?
case $code in 0 | 143) ;; *) exit "$code" ;; esac # 143: a SIGTERM that came before the run could take it
python -c 'import sys; from etils import epath; sys.exit(0 if epath.Path(sys.argv[1], "summary.json").exists() else 42)' "$workdir"
code=$?
if [ "$code" = 42 ] && [ -n "$SLURM_JOB_ID" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
