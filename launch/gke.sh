#!/usr/bin/env bash
# Starts a run on a GKE cluster that was created with xpk:
#   launch/gke.sh [--dry-run] run CLUSTER WORKLOAD ZONE TYPE [--spot, other options of xpk] -- --workdir gs://... --config ...
#   launch/gke.sh [--dry-run] tail|delete CLUSTER WORKLOAD ZONE
# `run` gives the cluster the command and the code, which is the working tree without what
# .dockerignore names. The cluster starts the command again after a preemption, but not after a
# user error (exit code 2) or an unforeseen one (70). XPK is the path of xpk, which needs an environment of its own (pipx
# install xpk).
set -eo pipefail
. "$(dirname "$0")/common.sh"
[ ${#arguments[@]} -ge 4 ] || usage
xpk=("${XPK:-xpk}" workload)
where=(--cluster "${arguments[1]}" --workload "${arguments[2]}" --zone "${arguments[3]}")

case ${arguments[0]} in
  tail) run kubectl logs --follow --prefix --selector "xpk.google.com/workload=${arguments[2]}" --container jax-tpu --tail 100 ;;
  delete) run "${xpk[@]}" delete "${where[@]}" ;;
  run)
    [[ ${#arguments[@]} -ge 5 && $workdir == gs://* ]] || usage
    run "${xpk[@]}" create "${where[@]}" --tpu-type "${arguments[4]}" --base-docker-image python:3.11 --script-dir . \
      --max-restarts 20 --restart-on-exit-codes 1 --termination-grace-period-seconds 300 "${arguments[@]:5}" --command "exec env EXTRA=tpu,gcs launch/job.sh $(quoted "$workdir" "${train[@]}")"
    ;;
  *) usage ;;
esac
