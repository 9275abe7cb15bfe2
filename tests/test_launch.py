"""The launchers: the commands that they run, and that they restart a run until it is complete."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from runs import ROOT

# Arguments that a shell must quote.
TRAIN = [
    "--config",
    "ppo.py",
    "--workdir",
    "gs://bucket/runs/a b",
    "--config.data.train=it's 2 files.jsonl",
    "--config.tokenizer=",
]


def launch(*words, path=None, code=0):
    """Run a launcher and return the commands that it prints, as lists of words."""
    environment = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.run(
        [ROOT / "launch" / words[0], *words[1:]], capture_output=True, text=True, env=environment
    )
    assert process.returncode == code, process.stderr
    return [shlex.split(line) for line in process.stdout.splitlines()]


def dry_run(line, *train, path):
    """Return the commands that a launcher would run, given a line of its words and TRAIN."""
    return launch(*shlex.split(line), *train, path=path)


def fake(directory, name, script):
    """Put a program of this name into a directory."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/bash\ncd {directory}\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def nothing_runs(tmp_path):
    """A directory for the PATH whose programs must not be called."""
    for name in ("gcloud", "xpk", "kubectl", "sbatch", "tar"):
        fake(tmp_path, name, "touch called")
    yield tmp_path
    assert not (tmp_path / "called").exists()


def test_shellcheck_has_nothing_to_say():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "tests" / "run.sh"]
    checked = subprocess.run(
        ["shellcheck", "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


QUEUE = "gcloud compute tpus queued-resources"
TPU_VM = "gcloud compute tpus tpu-vm"


def test_dry_run_of_tpu_vms(nothing_runs):
    commands = dry_run(
        "tpu_vm.sh --dry-run run pod us-east5-a v5p-16 v2-alpha-tpuv5 --spot --labels 'a=b c' --",
        *TRAIN,
        path=nothing_runs,
    )
    *copied, last, deleted = commands[3:]
    ssh = f"{TPU_VM} ssh pod --zone us-east5-a --worker all --command".split()
    assert commands[:3] == [
        ["gcloud", "storage", "ls", "gs://bucket/runs/a b/summary.json"],
        f"{QUEUE} describe pod --zone us-east5-a --format value(state.state)".split(),
        [
            *f"{QUEUE} create pod --zone us-east5-a --node-id pod".split(),
            *"--accelerator-type v5p-16 --runtime-version v2-alpha-tpuv5".split(),
            *["--spot", "--labels", "a=b c"],
        ],
    ]
    assert copied[:2] == [
        "tar -czf /tmp/pod.tgz --exclude ./.git --exclude ./.venv --exclude ./runs .".split(),
        f"{TPU_VM} scp /tmp/pod.tgz pod: --zone us-east5-a --worker all".split(),
    ]
    assert copied[2][:-1] == ssh and len(copied) == 3
    assert "tar -xzf pod.tgz -C alignjax" in copied[2][-1]
    assert last[:-1] == ssh and last[-1].startswith("cd alignjax && ")
    assert "EXTRA=tpu,gcs" in last[-1]
    words = shlex.split(last[-1])
    start = words.index("--distributed")
    assert words[start - 3 : start] == ["flock", "run.lock", "launch/local.sh"]
    assert words[start + 1 : start + 2 + len(TRAIN)] == [*TRAIN, ">>"]
    assert deleted == f"{QUEUE} delete pod --zone us-east5-a --force --quiet".split()
    delete = dry_run("tpu_vm.sh --dry-run delete pod us-east5-a", path=nothing_runs)
    assert delete == [deleted]
    (tail,) = dry_run("tpu_vm.sh tail pod us-east5-a --dry-run", path=nothing_runs)
    assert tail == [*ssh[:-2], "0", "--command", "tail -n 100 -F alignjax/run.log"]


def test_dry_run_of_gke(nothing_runs):
    workload = "--cluster c --workload w --zone z".split()
    (create,) = dry_run("gke.sh --dry-run run c w z v5p-16 --spot --", *TRAIN, path=nothing_runs)
    assert create[:-1] == [
        *"xpk workload create".split(),
        *workload,
        *"--tpu-type v5p-16 --base-docker-image python:3.11 --script-dir .".split(),
        *"--max-restarts 20 --restart-on-exit-codes 1".split(),
        *"--termination-grace-period-seconds 300 --spot --command".split(),
    ]
    assert shlex.split(create[-1]) == [
        *"exec env EXTRA=tpu,gcs launch/job.sh".split(),
        "gs://bucket/runs/a b",
        *TRAIN,
    ]
    (deleted,) = dry_run("gke.sh --dry-run delete c w z", path=nothing_runs)
    assert deleted == ["xpk", "workload", "delete", *workload]
    (tail,) = dry_run("gke.sh --dry-run tail c w z", path=nothing_runs)
    assert tail[:2] == ["kubectl", "logs"] and "xpk.google.com/workload=w" in tail


def test_dry_run_of_slurm(nothing_runs):
    (submit,) = dry_run(
        "slurm.sh --dry-run --nodes 2 --comment 'x y' --", *TRAIN, path=nothing_runs
    )
    assert submit == [
        *"sbatch --requeue --open-mode append --output slurm-%j.log --signal TERM@300".split(),
        *["--nodes", "2", "--comment", "x y"],
        *["launch/job.sh", "gs://bucket/runs/a b"],
        *TRAIN,
    ]


def test_launchers_take_the_commands_of_the_docs(nothing_runs):
    text = (ROOT / "docs" / "pods.md").read_text()
    lines = re.findall(r"^(?:\w+=\w+ )*launch/(.+)$", text, re.MULTILINE)
    assert len(lines) == 8
    for line in lines:
        name, *words = shlex.split(line)
        assert launch(name, "--dry-run", *words, path=nothing_runs)


@pytest.mark.parametrize(
    "words",
    [
        ["tpu_vm.sh"],
        ["tpu_vm.sh", "stop", "pod", "zone"],
        ["tpu_vm.sh", "run", "pod", "zone", "v5p-16", "--", *TRAIN],
        [
            *"tpu_vm.sh run pod zone v5p-16 v2-alpha-tpuv5".split(),
            *"-- --config ppo.py --workdir runs/ppo".split(),
        ],
        ["gke.sh", "run", "c", "w"],
        ["slurm.sh", "--nodes", "2"],
        ["slurm.sh", "--", "--config", "ppo.py"],
    ],
)
def test_launchers_say_how_they_are_used(words, nothing_runs):
    assert launch(*words, path=nothing_runs, code=2) == []


# A Google Cloud of one TPU, whose run fares as the file `plan` says.
GCLOUD = """
case "$*" in
  storage*) [ -e complete ] ;;
  *describe*) cat state ;;
  *create*) echo ACTIVE > state ;;
  *delete*) rm state ;;
  *local.sh*)
    case $(cat plan)$(ls -d second 2> /dev/null) in
      taken) echo SUSPENDED > state; touch second; exit 255 ;;
      stopped) touch second ;;
      failed) exit 3 ;;
      *) touch complete ;;
    esac ;;
esac"""


def action_of(words):
    """Return "create", "delete" or "run" for a command that changes the TPU, else None."""
    if "local.sh" in words[-1]:
        return "run"
    if words[2] == "tpus" and words[4] in ("create", "delete"):
        return words[4]
    return None


@pytest.mark.parametrize(
    "plan, code, actions",
    [
        # The machines go to somebody who pays more.
        ("taken", 0, ["create", "run", "delete", "create", "run", "delete"]),
        # A SIGTERM stopped the run, which has saved.
        ("stopped", 0, ["create", "run", "run", "delete"]),
        # The machines stay, to be looked at.
        ("failed", 3, ["create", "run"]),
    ],
)
def test_tpu_vms_run_until_the_run_is_complete(plan, code, actions, tmp_path):
    fake(tmp_path, "gcloud", GCLOUD)
    for name in ("tar", "sleep"):
        fake(tmp_path, name, "")
    (tmp_path / "plan").write_text(plan)
    words = "tpu_vm.sh run pod zone v5p-16 v2-alpha-tpuv5 --".split()
    commands = launch(*words, *TRAIN, path=tmp_path, code=code)
    assert [action for action in map(action_of, commands) if action] == actions


# It stands for the run: it notes its arguments, and ends as it is told to at SIGTERM.
PYTHON = """
if [ "$1" = -c ]; then exec {python} "$@"; fi
trap '{complete}exit {code}' TERM
printf '%s\\n' "$@" > ../given
echo ready
while :; do sleep 0.05; done"""


@pytest.mark.parametrize(
    "run_code, complete, code",
    [(0, True, 0), (0, False, 42), (143, False, 42), (1, False, 1), (2, False, 2), (70, False, 70)],
)
def test_a_job_ends_well_only_when_the_run_is_complete(run_code, complete, code, tmp_path):
    """The job forwards SIGTERM to its run, and waits until the run has saved."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "job.sh", tmp_path / "launch")
    (tmp_path / "launch" / "environment.sh").write_text('PATH="$PWD/bin:$PATH"\n')
    completing = "touch ../summary.json; " if complete else ""
    python = PYTHON.format(python=sys.executable, complete=completing, code=run_code)
    fake(tmp_path / "bin", "python", python)
    environment = {name: text for name, text in os.environ.items() if name != "SLURM_JOB_ID"}
    job = subprocess.Popen(
        ["launch/job.sh", tmp_path, *TRAIN], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
    )
    assert job.stdout.readline() == b"ready\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait() == code
    given = (tmp_path / "given").read_text().splitlines()
    assert given == ["-m", "alignjax.train", "--distributed", *TRAIN]
