"""The launchers: what they would run, and that they start a run again until it is complete."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from runs import ROOT

TRAIN = [
    "--config",
    "ppo.py",
    "--workdir",
    "gs://bucket/runs/a b",
    "--config.data.train=it's 2 files.jsonl",
    "--config.tokenizer=",
]


def launch(*words, path=None, code=0):
    """The commands that a launcher printed, as lists of words."""
    environment = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / "launch" / words[0], *words[1:]], capture_output=True, text=True, env=environment
    )
    assert done.returncode == code, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def fake(path, name, script):
    path.mkdir(exist_ok=True)
    (path / name).write_text(f"#!/bin/bash\ncd {path}\n{script}\n")
    (path / name).chmod(0o755)


@pytest.fixture
def nothing_runs(tmp_path):
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


def test_dry_run_of_tpu_vms(nothing_runs):
    asked = [
        "tpu_vm.sh",
        "--dry-run",
        "run",
        "pod",
        "us-east5-a",
        "v5p-16",
        "v2-alpha-tpuv5",
        "--spot",
        "--labels",
        "a=b c",
    ]
    commands = launch(*asked, "--", *TRAIN, path=nothing_runs)
    *copied, last, deleted = commands[3:]
    ssh = [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "pod",
        "--zone",
        "us-east5-a",
        "--worker",
        "all",
        "--command",
    ]
    assert commands[:3] == [
        ["gcloud", "storage", "ls", "gs://bucket/runs/a b/summary.json"],
        [
            *"gcloud compute tpus queued-resources describe pod --zone us-east5-a --format value(state.state)".split()
        ],
        [
            *"gcloud compute tpus queued-resources create pod --zone us-east5-a --node-id pod --accelerator-type v5p-16".split(),
            "--runtime-version",
            "v2-alpha-tpuv5",
            "--spot",
            "--labels",
            "a=b c",
        ],
    ]
    assert copied[:2] == [
        [*"tar -czf /tmp/pod.tgz --exclude ./.git --exclude ./.venv --exclude ./runs .".split()],
        [
            *"gcloud compute tpus tpu-vm scp /tmp/pod.tgz pod: --zone us-east5-a --worker all".split()
        ],
    ]
    assert (
        copied[2][:-1] == ssh
        and "tar -xzf pod.tgz -C alignjax" in copied[2][-1]
        and len(copied) == 3
    )
    assert (
        last[:-1] == ssh and last[-1].startswith("cd alignjax && ") and "EXTRA=tpu,gcs" in last[-1]
    )
    words = shlex.split(last[-1])
    start = words.index("--distributed")
    assert words[start - 3 : start] == ["flock", "run.lock", "launch/local.sh"]
    assert words[start + 1 : start + 2 + len(TRAIN)] == [*TRAIN, ">>"]
    assert deleted == [
        *"gcloud compute tpus queued-resources delete pod --zone us-east5-a --force --quiet".split()
    ]
    assert launch("tpu_vm.sh", "--dry-run", "delete", "pod", "us-east5-a", path=nothing_runs) == [
        deleted
    ]
    [tail] = launch("tpu_vm.sh", "tail", "pod", "us-east5-a", "--dry-run", path=nothing_runs)
    assert tail == [*ssh[:-2], "0", "--command", "tail -n 100 -F alignjax/run.log"]


def test_dry_run_of_gke(nothing_runs):
    where = ["--cluster", "c", "--workload", "w", "--zone", "z"]
    [create] = launch(
        "gke.sh",
        "--dry-run",
        "run",
        "c",
        "w",
        "z",
        "v5p-16",
        "--spot",
        "--",
        *TRAIN,
        path=nothing_runs,
    )
    assert create[:-1] == [
        "xpk",
        "workload",
        "create",
        *where,
        "--tpu-type",
        "v5p-16",
        "--base-docker-image",
        "python:3.11",
        "--script-dir",
        ".",
        "--max-restarts",
        "20",
        "--restart-on-exit-codes",
        "1",
        "--termination-grace-period-seconds",
        "300",
        "--spot",
        "--command",
    ]
    assert shlex.split(create[-1]) == [
        "exec",
        "env",
        "EXTRA=tpu,gcs",
        "launch/job.sh",
        "gs://bucket/runs/a b",
        *TRAIN,
    ]
    [deleted] = launch("gke.sh", "--dry-run", "delete", "c", "w", "z", path=nothing_runs)
    assert deleted == ["xpk", "workload", "delete", *where]
    [tail] = launch("gke.sh", "--dry-run", "tail", "c", "w", "z", path=nothing_runs)
    assert tail[:2] == ["kubectl", "logs"] and "xpk.google.com/workload=w" in tail


def test_dry_run_of_slurm(nothing_runs):
    [submit] = launch(
        "slurm.sh", "--dry-run", "--nodes", "2", "--comment", "x y", "--", *TRAIN, path=nothing_runs
    )
    assert submit == [
        "sbatch",
        "--requeue",
        "--open-mode",
        "append",
        "--output",
        "slurm-%j.log",
        "--signal",
        "TERM@300",
        "--nodes",
        "2",
        "--comment",
        "x y",
        "launch/job.sh",
        "gs://bucket/runs/a b",
        *TRAIN,
    ]


def test_launchers_take_the_commands_of_the_docs(nothing_runs):
    asked = re.findall(
        r"^(?:\w+=\w+ )*launch/(.+)$", (ROOT / "docs" / "pods.md").read_text(), re.MULTILINE
    )
    assert len(asked) == 8
    for line in asked:
        name, *words = shlex.split(line)
        assert launch(name, "--dry-run", *words, path=nothing_runs)


@pytest.mark.parametrize(
    "words",
    [
        ["tpu_vm.sh"],
        ["tpu_vm.sh", "stop", "pod", "zone"],
        ["tpu_vm.sh", "run", "pod", "zone", "v5p-16", "--", *TRAIN],
        [
            "tpu_vm.sh",
            "run",
            "pod",
            "zone",
            "v5p-16",
            "v2-alpha-tpuv5",
            "--",
            "--config",
            "ppo.py",
            "--workdir",
            "runs/ppo",
        ],
        ["gke.sh", "run", "c", "w"],
        ["slurm.sh", "--nodes", "2"],
        ["slurm.sh", "--", "--config", "ppo.py"],
    ],
)
def test_launchers_say_how_they_are_used(words, nothing_runs):
    assert launch(*words, path=nothing_runs, code=2) == []


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


@pytest.mark.parametrize(
    "plan, code, states",
    [
        (
            "taken",
            0,
            ["create", "run", "delete", "create", "run", "delete"],
        ),  # by another who pays more
        ("stopped", 0, ["create", "run", "run", "delete"]),  # by a SIGTERM: it has saved
        ("failed", 3, ["create", "run"]),  # the machines stay, to be looked at
    ],
)
def test_tpu_vms_run_until_the_run_is_complete(plan, code, states, tmp_path):
    fake(tmp_path, "gcloud", GCLOUD)
    for name in ("tar", "sleep"):
        fake(tmp_path, name, "")
    (tmp_path / "plan").write_text(plan)
    commands = launch(
        "tpu_vm.sh",
        "run",
        "pod",
        "zone",
        "v5p-16",
        "v2-alpha-tpuv5",
        "--",
        *TRAIN,
        path=tmp_path,
        code=code,
    )
    done = [
        "run" if "local.sh" in words[-1] else words[4]
        for words in commands
        if words[2] == "tpus" and (words[4] in ("create", "delete") or "local.sh" in words[-1])
    ]
    assert done == states


@pytest.mark.parametrize(
    "exits, complete, code", [(0, True, 0), (0, False, 42), (143, False, 42), (2, False, 2)]
)
def test_a_job_ends_well_only_when_the_run_is_complete(exits, complete, code, tmp_path):
    """It hands SIGTERM on, and waits until its run has saved."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "job.sh", tmp_path / "launch")
    (tmp_path / "launch" / "environment.sh").write_text('PATH="$PWD/bin:$PATH"\n')
    fake(
        tmp_path / "bin",
        "python",
        f"""
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
trap '{"touch ../summary.json; " if complete else ""}exit {exits}' TERM
printf '%s\\n' "$@" > ../given
echo ready
while :; do sleep 0.05; done""",
    )
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_JOB_ID"}
    job = subprocess.Popen(
        ["launch/job.sh", tmp_path, *TRAIN], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
    )
    assert job.stdout.readline() == b"ready\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait() == code
    assert (tmp_path / "given").read_text().splitlines() == [
        "-m",
        "alignjax.train",
        "--distributed",
        *TRAIN,
    ]
