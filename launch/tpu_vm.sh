#!/usr/bin/env bash
# A run on Cloud TPU VMs, from a machine that has gcloud:
#   launch/tpu_vm.sh [--dry-run] run NAME ZONE TYPE RUNTIME [--spot, other options of gcloud] -- --workdir gs://... --config ...
#   launch/tpu_vm.sh [--dry-run] tail|delete NAME ZONE
# `run` queues for the machines, copies the code and runs the command on all of them, on new ones where they were taken
# away, until the run is complete; then it deletes them. If the run fails, they stay. Stopped at any time and started again, it
# goes on from where things are.
set -eo pipefail
. "$(dirname "$0")/common.sh"
[ ${#arguments[@]} -ge 3 ] || usage
name=${arguments[1]} zone=${arguments[2]}

queue() { run gcloud compute tpus queued-resources "$1" "$name" --zone "$zone" "${@:2}"; }
remote() { run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker "$1" --command "$2"; }
complete() { run gcloud storage ls "$workdir/summary.json"; }
state() { queue describe --format "value(state.state)"; }
create() {
  queue create --node-id "$name" --accelerator-type "${arguments[3]}" --runtime-version "${arguments[4]}" "${arguments[@]:5}"
}
remove() { queue delete --force --quiet; }
attempt() { # the lock: whoever comes back waits for the run that goes on, instead of starting a second one
  run tar -czf "/tmp/$name.tgz" --exclude ./.git --exclude ./.venv --exclude ./runs . || return
  run gcloud compute tpus tpu-vm scp "/tmp/$name.tgz" "$name:" --zone "$zone" --worker all || return
  remote all "mkdir -p alignjax && tar -xzf $name.tgz -C alignjax && curl -LsSf https://astral.sh/uv/install.sh | sh" || return
  remote all "cd alignjax && ~/.local/bin/uv python install 3.11 && export EXTRA=tpu,gcs PYTHON=\$(~/.local/bin/uv python find 3.11) && \
{ flock run.lock launch/local.sh --distributed $(quoted "${train[@]}") >> run.log 2>&1 || { code=\$?; tail -n 20 run.log; exit \$code; }; }"
}

case ${arguments[0]} in
  tail) remote 0 "tail -n 100 -F alignjax/run.log" ;;
  delete) remove ;;
  run)
    [[ ${#arguments[@]} -ge 5 && $workdir == gs://* ]] || usage
    if [ -n "$dry" ]; then complete && state && create && attempt && remove && exit; fi
    until complete; do
      case $(state || true) in
        "") create ;;
        ACTIVE) attempt || { code=$? && sleep 120 && [ "$(state)" != ACTIVE ] || exit "$code"; } ;;
        SUSPENDED | FAILED) remove ;;
        *) sleep 30 ;;
      esac
    done
    remove
    ;;
  *) usage ;;
esac
