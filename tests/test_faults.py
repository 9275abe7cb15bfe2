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

from alignjax import config as configs
from alignjax import train
from alignjax.algorithms import heldout
from alignjax.config import UserError
from alignjax.machine import lock, marker, outputs
from alignjax.runs import claim, step_files, tensorboard
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


@pytest.mark.parametrize("name", ["ppo-tiny", "dpo-tiny"])
def test_a_sigterm_ends_the_last_evaluation_and_the_same_command_repeats_it(
    name, chain, tmp_path, monkeypatch, capsys
):
    runs = with_parents(name, chain.runs, tmp_path)
    count_batches = heldout.count_batches

    def terminate_and_count(*arguments) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return count_batches(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(heldout, "count_batches", terminate_and_count)  # the evaluation begins by it
        assert train.main(command(name, runs)) == 0
    printed = capsys.readouterr().err
    assert f"SIGTERM: {name} is trained but not evaluated; the same command" in printed
    assert not (runs / name / "summary.json").exists()
    assert train.main(command(name, runs)) == 0
    assert f"{name}: resuming from step 4" in capsys.readouterr().out
    assert files_of(runs / name) == files_of(chain.runs / name)


def test_twenty_kills_at_random_moments_change_nothing(chain, tmp_path):
    """See kills.py: it kills at the start, in rollouts, updates, saves, evaluations and between.

    One half of the kills hit a run that trains all parameters, the other one with adapters.
    """
    with_parents("ppo-tiny", chain.runs, tmp_path)
    script = [sys.executable, "tests/kills.py", str(tmp_path)]
    finished = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout)
    hits = collections.Counter()
    for result in results.values():
        hits += collections.Counter(result["hits"])
    assert hits.total() >= 20 and all(hits[target] >= 4 for target in kills.TARGETS), hits
    print(dict(hits))
    for kind, result in results.items():
        whole = tmp_path / f"whole-{kind}"
        undisturbed = files_of(whole, kills.STEPS)
        for run in map(Path, result["completed"]):
            assert files_of(run, kills.STEPS) == undisturbed
            assert names_in(run) == names_in(whole)
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


# ------------------------------------------------------------- checkpoints that are not the run's


def test_a_parent_without_its_last_checkpoint_is_refused(chain, tmp_path, capsys):
    """An earlier one does not replace it, and the child leaves no directory."""
    runs = with_parents("sft-tiny", chain.runs, tmp_path)
    parent = runs / "lm-tiny"
    shutil.rmtree(parent / "checkpoints" / "4")
    parents = [f"--config.parents.model={parent}"]
    line = fails(capsys, *command("sft-tiny", runs), *parents)
    assert f"{parent / 'checkpoints' / '4'}: the last checkpoint of this run is missing" in line
    (parent / "checkpoints" / "2").rename(parent / "checkpoints" / "4")
    line = fails(capsys, *command("sft-tiny", runs), *parents)
    assert "checkpoints/4 was saved as step 2: it has been renamed or copied" in line
    shutil.rmtree(parent / "checkpoints" / "4")
    shutil.copytree(chain.runs / "pmp-tiny/checkpoints/4", parent / "checkpoints" / "4")
    line = fails(capsys, *command("sft-tiny", runs), *parents)
    assert "checkpoints/4 was saved by another run" in line
    assert names_in(runs) == {"lm-tiny"}


def test_a_parent_of_another_stage_is_refused_before_anything_is_written(chain, tmp_path, capsys):
    for name, role, parent, reason in (
        ("sft-tiny", "model", "rm-tiny", "a language model is wanted"),
        ("ppo-tiny", "policy", "rm-tiny", "a language model is wanted"),
        ("ppo-tiny", "reward", "sft-tiny", "a reward model is wanted"),
    ):
        change = f"--config.parents.{role}={chain.runs / parent}"
        line = fails(capsys, *command(name, tmp_path, change))
        assert f"parents.{role}={chain.runs / parent}: {reason}, this run's stage is" in line
    assert names_in(tmp_path) == set()


def test_a_checkpoint_of_another_run_is_put_aside_and_swapped_ones_are_refused(
    chain, tmp_path, capsys
):
    run = copy_without_summary(chain, tmp_path)
    two, four = (run / "checkpoints" / step for step in ("2", "4"))
    for old, new in ((two, run / "two"), (four, two), (run / "two", four)):
        old.rename(new)
    before = contents(run)
    line = fails(capsys, *command("lm-tiny", tmp_path))
    assert "none of the checkpoints [4, 2] can be read" in line
    assert contents(run) == before
    four.rename(two.with_name("two"))
    shutil.rmtree(two)
    two.with_name("two").rename(two)
    shutil.copytree(chain.runs / "pmp-tiny/checkpoints/4", four)
    (run / "damaged" / "4").mkdir(parents=True)
    (run / "damaged" / "4" / "notes").write_text("mine")
    assert train.main(command("lm-tiny", tmp_path)) == 0
    printed = capsys.readouterr().out
    assert f"{four} was saved by another run; falling back" in printed
    assert names_in(run / "damaged") == {"4", "4-2"}
    assert files_of(run) == files_of(chain.runs / "lm-tiny")


# --------------------------------------------------------------------------------- files of steps

ROW = b'{"step": %d, "loss": 1.5}\n'


@pytest.mark.parametrize(
    "content, reason, lost",
    [
        (None, "the file is missing, the rows of steps 0-3 are lost, and marked so", [0, 1, 2, 3]),
        (b"", "the rows of steps 0-3 are lost", [0, 1, 2, 3]),
        (ROW % 0 + b"\0" * 40, "line 2 can't be read, the rows of steps 1-3 are", [1, 2, 3]),
        (ROW % 0 + ROW % 1 + ROW % 3 + ROW % 4, "the rows of steps 2 are lost", [2]),
        (ROW % 0 + b'{"step": 1, "lo\n' + ROW % 2 + ROW % 3, "line 2 can't be read, the", [1]),
        (ROW % 0 + ROW % 1 + b"\xff\n" + ROW % 2 + ROW % 3, "line 3 can't be read; it is", []),
        (b"".join(ROW % step for step in range(5)) + b'{"step": 5, "lo', "", []),
    ],
)
def test_damage_of_metrics_is_reported_and_the_lost_rows_are_marked(
    content, reason, lost, tmp_path
):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    printed = []
    step_files.restore_rows(path, 4, printed.append, every_step=True)
    assert [row["step"] for row in rows(path)] == [0, 1, 2, 3]
    assert [row["step"] for row in rows(path) if row.get("lost")] == lost
    if not reason:
        assert not printed and names_in(tmp_path) == {"metrics.jsonl"}
        return
    (line,) = printed
    assert line.startswith(f"{path}: {reason}")
    if content is not None:
        assert (tmp_path / "damaged" / "metrics.jsonl").read_bytes() == content


def test_an_old_run_with_damaged_metrics_resumes_and_says_so(chain, tmp_path, capsys):
    """It has no marker, and its checkpoints do not say whose they are."""
    run = copy_without_summary(chain, tmp_path)
    shutil.rmtree(run / "checkpoints" / "4")
    (run / marker.NAME).unlink()
    checksums = run / "checkpoints" / "2" / "checksums" / "metadata"
    sums = json.loads(checksums.read_text())
    del sums["origin"]
    checksums.write_text(json.dumps(sums))
    (run / "metrics.jsonl").write_bytes(b"\0" * 500)
    assert train.main(command("lm-tiny", tmp_path)) == 0
    assert "the rows of steps 0-1 are lost" in capsys.readouterr().out
    whole = files_of(chain.runs / "lm-tiny")
    assert files_of(run) | {"metrics.jsonl": whole["metrics.jsonl"]} == whole
    assert rows(run / "metrics.jsonl")[2:] == rows(chain.runs / "lm-tiny" / "metrics.jsonl")[2:]
    assert marker.read(run)["made_by"] == "alignjax.train"


# ----------------------------------------------------------------------------------- longer runs


def test_a_complete_run_goes_on_to_more_steps_and_never_to_fewer(chain, tmp_path, capsys):
    """With a constant learning rate the result is that of a run that was longer from the start."""
    constant = "--config.optimiser.schedule=constant"

    def train_lm(runs: Path, steps: int) -> list[str]:
        return command("lm-tiny", runs, constant, f"--config.steps={steps}")

    assert train.main(train_lm(tmp_path / "once", 4)) == 0
    assert train.main(train_lm(tmp_path / "twice", 2)) == 0
    run = tmp_path / "twice" / "lm-tiny"
    (run / "evaluation.json").write_text("{}")
    child = tmp_path / "twice" / "child"
    child.mkdir()
    end = claim.ends_of({"model": run})
    (child / marker.NAME).write_text(marker.dumps({"made_by": marker.TRAIN, "parents": end}))
    capsys.readouterr()
    assert train.main(train_lm(tmp_path / "twice", 4)) == 0
    printed = capsys.readouterr().out
    assert f"lm-tiny: {run} has 2 steps and goes on to 4" in printed
    assert f"made of its 2 steps, and not changed: evaluation.json, {child}" in printed
    assert "resuming from step 2" in printed
    assert files_of(run) == files_of(tmp_path / "once" / "lm-tiny")
    with pytest.raises(UserError, match="began from step 2 of parents.model=.* has 4 steps now"):
        claim.check_same_parents(child, {"model": run})
    line = fails(capsys, *train_lm(tmp_path / "twice", 3))
    assert f"{run} holds a run of 4 steps, and steps=3 is not more" in line
    assert files_of(run) == files_of(tmp_path / "once" / "lm-tiny")


def test_a_longer_run_says_that_its_cosine_rises_again(chain, tmp_path):
    run = tmp_path / "lm-tiny"
    shutil.copytree(chain.runs / "lm-tiny", run)
    config = configs.load("lm.py:tiny", {"steps": "8"})
    claim.check_workdir(config, run, may_grow=True)
    printed = []
    claim.prolong(config, run, printed.append)
    assert "the learning rate follows a cosine over 8 steps" in printed[1]
    assert json.loads((run / "config.json").read_text())["steps"] == 8
    assert not (run / "summary.json").exists()


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
