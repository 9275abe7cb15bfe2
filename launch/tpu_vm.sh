#!/usr/bin/env bash
# Starts a run on Cloud TPU VMs, from a machine that has gcloud:
#   launch/tpu_vm.sh [--dry-run] run NAME ZONE TYPE RUNTIME [--spot, other options of gcloud] -- --workdir gs://... --config ...
#   launch/tpu_vm.sh [--dry-run] tail|delete NAME ZONE
# `run` requests the machines, waits for them, copies the code to all of them and runs the command
# there. After a preemption it requests new machines and runs the command again. When the run is
# complete it deletes the machines; if the run fails, they stay. You can stop the launcher at any
# time and start it again: it continues from the current state.
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
# Copies the code to the machines and runs the command. The lock makes a launcher that was started
# again wait for the run that is still going, instead of starting a second one.
attempt() {
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
