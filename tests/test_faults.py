"""After every fault, a run continues as if it had not happened."""

import collections
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import kills
import pytest
from runs import ROOT, Chain, Crash, act_in_step, command, fails, files_of, rows, with_parents

from alignjax import train
from alignjax.machine import lock, marker, outputs
from alignjax.runs import tensorboard
from alignjax.runs.log import TrainingLog


@pytest.mark.parametrize("name", ["lm-tiny", "rm-tiny", "ppo-tiny"])
def test_resume_is_exact_after_an_exception_and_a_sigterm(name, chain, tmp_path, capsys):
    """SIGTERM arrives in the first step, an exception in the last one; then the run completes."""
    runs = with_parents(name, chain.runs, tmp_path)
    with act_in_step(0, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train.main(command(name, runs)) == 0
    assert f"SIGTERM: {name} saved at step 1 of 4" in capsys.readouterr().err

    def crash() -> None:
        raise Crash

    with act_in_step(3, crash), pytest.raises(Crash):
        train.main(command(name, runs))
    # One row is past the checkpoint. The resume drops it and writes it again.
    assert len(rows(runs / name / "metrics.jsonl")) == 3
    assert train.main(command(name, runs)) == 0
    assert f"{name}: resuming from step 2" in capsys.readouterr().out
    assert files_of(runs / name) == files_of(chain.runs / name)


def test_twenty_kills_at_random_moments_change_nothing(chain, tmp_path):
    """See kills.py: it kills at the start, in rollouts, updates, saves, evaluations and between."""
    with_parents("ppo-tiny", chain.runs, tmp_path)
    script = [sys.executable, "tests/kills.py", str(tmp_path)]
    finished = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout)
    hits = collections.Counter()
    for result in results:
        hits += collections.Counter(result["hits"])
    assert hits.total() >= 20 and all(hits[target] >= 4 for target in kills.TARGETS), hits
    print(dict(hits))
    undisturbed = files_of(tmp_path / "whole", kills.STEPS)
    for run in (tmp_path / name for result in results for name in result["completed"]):
        assert files_of(run, kills.STEPS) == undisturbed
        assert names_in(run) == names_in(tmp_path / "whole")
        # Nothing half-written is left.
        assert names_in(run / "checkpoints") == {"11", "12"}


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def contents(directory: Path) -> dict[Path, bytes]:
    """Return the bytes of all files below a directory."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def copy_without_summary(chain: Chain, tmp_path: Path) -> Path:
    """Copy lm-tiny as if it had been interrupted after its last checkpoint."""
    run = tmp_path / "lm-tiny"
    shutil.copytree(chain.runs / "lm-tiny", run)
    (run / "summary.json").unlink()
    return run


def copy_killed(chain: Chain, tmp_path: Path) -> Path:
    """Copy lm-tiny as if it had been killed in its last save.

    There are rows of all four steps, a half-written checkpoint, and a lock.
    """
    run = copy_without_summary(chain, tmp_path)
    (run / "checkpoints" / "4").rename(run / "checkpoints" / "4.orbax-checkpoint-tmp")
    (run / "lock").write_text("process 1 on elsewhere")
    return run


def test_a_damaged_checkpoint_falls_back_to_the_one_before(chain, tmp_path, capsys):
    run = copy_without_summary(chain, tmp_path)
    for file in (run / "checkpoints" / "4" / "model").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert train.main(command("lm-tiny", tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "is damaged" in printed and "resuming from step 2" in printed
    assert files_of(run) == files_of(chain.runs / "lm-tiny")


def test_if_all_checkpoints_are_damaged_nothing_is_touched(chain, tmp_path, capsys):
    run = copy_without_summary(chain, tmp_path)
    for step in ("2", "4"):
        shutil.rmtree(run / "checkpoints" / step / "model")
    before = contents(run)
    line = fails(capsys, *command("lm-tiny", tmp_path))
    assert "none of the checkpoints [4, 2] can be read" in line
    assert contents(run) == before


def test_a_damaged_parent_is_named(chain, tmp_path, capsys):
    """The result of a complete run is its last checkpoint, and no other replaces it."""
    runs = with_parents("sft-tiny", chain.runs, tmp_path)
    last = runs / "lm-tiny" / "checkpoints" / "4"
    checksums = last / "checksums" / "metadata"
    sums = json.loads(checksums.read_text())
    sums["model"] = {path: number + 1 for path, number in sums["model"].items()}
    checksums.write_text(json.dumps(sums))
    line = fails(capsys, *command("sft-tiny", runs))
    assert f"{last} is damaged (model/" in line and "checksum differs" in line


def test_a_disk_that_is_full_in_a_save_is_one_line_and_the_same_command_goes_on(
    chain, tmp_path, capfd
):
    """The limit of 20 KiB for a file is smaller than the files of a checkpoint."""
    run = copy_killed(chain, tmp_path)
    kept = contents(run / "checkpoints" / "2")
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "-", sys.executable, "-m", "alignjax.train"]
    arguments = [*limited, *command("lm-tiny", tmp_path)]
    finished = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in finished.stderr.splitlines() if line and "%|" not in line]
    assert finished.returncode == 2 and len(lines) == 1, finished.stderr
    assert lines[0].startswith(
        f"alignjax: {run / 'checkpoints'}: a checkpoint can't be written (File too large); "
    )
    assert contents(run / "checkpoints" / "2") == kept
    assert not (run / "checkpoints" / "4").exists() and not (run / "summary.json").exists()
    assert train.main(command("lm-tiny", tmp_path)) == 0
    assert "resuming from step 2" in capfd.readouterr().out
    assert files_of(run) == files_of(chain.runs / "lm-tiny")


def fill_disk_of_metrics(log: TrainingLog, patch: pytest.MonkeyPatch) -> None:
    log.writer.files.files["metrics"] = open("/dev/full", "a")


def fill_disk_of_tensorboard(log: TrainingLog, patch: pytest.MonkeyPatch) -> None:
    log.writer.board.events._py_recordio_writer._writer = open("/dev/full", "wb")
    patch.setattr(tensorboard, "FLUSH_INTERVAL", 0)


# An exception that a thread leaves uncaught would print a traceback.
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "fill_disk, name",
    [(fill_disk_of_metrics, "metrics.jsonl"), (fill_disk_of_tensorboard, "tensorboard")],
    ids=["metrics", "tensorboard"],
)
def test_a_disk_that_is_full_between_saves_is_one_line_too(
    fill_disk, name, chain, tmp_path, monkeypatch, capfd
):
    run = copy_killed(chain, tmp_path)
    write = TrainingLog.write
    with monkeypatch.context() as patch:

        def write_to_full_disk(log, step, output) -> None:
            if step == 3:
                fill_disk(log, patch)
            write(log, step, output)

        patch.setattr(TrainingLog, "write", write_to_full_disk)
        line = fails(capfd, *command("lm-tiny", tmp_path))
    reason = "No space left on device; fix that, and the same command resumes the run"
    assert line == f"alignjax: {run / name}: {reason}"
    assert train.main(command("lm-tiny", tmp_path)) == 0
    assert files_of(run) == files_of(chain.runs / "lm-tiny")


def test_a_second_process_on_a_work_directory_is_refused_at_once(chain, tmp_path):
    """It starts in the third step of the first, which continues.

    The lock of a process that no longer exists hinders nobody.
    """
    run = copy_killed(chain, tmp_path)
    second_command = [sys.executable, "-m", "alignjax.train", *command("lm-tiny", tmp_path)]
    outcomes = []

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    def start_second() -> None:
        before = times()
        finished = subprocess.run(second_command, cwd=ROOT, capture_output=True, text=True)
        assert times() == before
        outcomes.append((finished.returncode, finished.stdout, finished.stderr))

    with act_in_step(2, start_second):
        assert train.main(command("lm-tiny", tmp_path)) == 0
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    line = f"alignjax: {run}: in use by {holder}; wait for it to finish, or stop it\n"
    assert outcomes == [(2, "", line)]
    assert files_of(run) == files_of(chain.runs / "lm-tiny") and not (run / "lock").exists()


# A command on a host with another name, whose clock is 30 years ahead.
ELSEWHERE = """
import socket, sys, time
now = time.time
time.time, socket.gethostname = lambda: now() + 1e9, lambda: "elsewhere"
from alignjax import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_clock_zone_locale_host_directory_and_hash_seed_change_nothing(chain, tmp_path):
    """Nor do the files of a process that was killed while it claimed the directory."""
    claimed = tmp_path / "some where" / "lm-tiny"
    claimed.mkdir(parents=True)
    (claimed / "lock").write_text("process 1 on elsewhere")
    (claimed / marker.NAME).write_text(marker.dumps(lock.new_run()))
    for name in ("tokenizer", "config.json"):
        outputs.temporary_beside(claimed / name).write_text("{")
    (claimed / "tokenizer").mkdir()
    (claimed / "tokenizer" / "tokenizer.json").write_text("{")
    environment = os.environ | {
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONHASHSEED": "7",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    script = [sys.executable, "-c", ELSEWHERE, *command("lm-tiny", tmp_path / "some where")]
    finished = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert files_of(claimed) == files_of(chain.runs / "lm-tiny")
    assert names_in(claimed) == names_in(chain.runs / "lm-tiny")
