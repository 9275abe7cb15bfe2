"""What a command writes is whole or not there, and replaces no file that is not its own."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, command, fails

from alignjax import convert, report
from alignjax.config import UserError
from alignjax.machine import lock, marker, output_directories, outputs
from alignjax.reports import study_results, study_runs
from alignjax.weights import checkpoint

COMMAND = "alignjax.convert"


def is_not_own(path: Path) -> bool:
    return False


def refused(capsys: pytest.CaptureFixture, main, *arguments: object) -> str:
    """Run a command that ends with exit code 2, and return its one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alignjax: ")
    return line


def snapshot(directory: Path) -> dict[str, object]:
    """Return everything below a directory that a command could change."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else path.lstat()[0]
        for path in sorted(directory.rglob("*"))
    }


# ------------------------------------------------------------------------------------- one file


def make_link(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")


def make_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # The path of a socket must be short.


@pytest.mark.parametrize(
    "make, kind",
    [
        (make_link, "a symbolic link"),
        (os.mkdir, "a directory"),
        (os.mkfifo, "a named pipe"),
        (make_socket, "a socket"),
    ],
)
def test_no_file_is_written_over_a_link_a_directory_a_pipe_or_a_socket(make, kind, tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    path = tmp_path / "out.html"
    make(path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"--out {path}: this is {kind}; name a file"):
        outputs.check_file(path, "--out", is_own=is_not_own, overwrite=True)
    assert snapshot(tmp_path) == before


def test_no_file_is_written_over_a_device():
    with pytest.raises(UserError, match="--out /dev/null: this is a device"):
        outputs.check_file(Path("/dev/null"), "--out", is_own=is_not_own, overwrite=True)


def test_a_report_replaces_reports_only_unless_it_is_told_to(chain, tmp_path, capsys):
    run = chain.runs / "lm-tiny"
    page = tmp_path / "page.html"
    page.write_text("my thesis")
    line = refused(capsys, report.main, run, "--out", page)
    assert f"--out {page}: this file exists, and the command has not written it" in line
    assert page.read_text() == "my thesis"
    assert report.main([str(run), "--out", str(page), "--overwrite"]) == 0
    assert report.main([str(run), "--out", str(page)]) == 0  # its own, from before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("name", ["config.json", "summary.json", "tokenizer/page.html", "lock"])
def test_no_output_is_a_file_of_a_run_even_one_that_is_not_there_yet(name, chain, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(chain.runs / "lm-tiny", run)
    (run / "summary.json").unlink()
    before = snapshot(run)
    line = refused(capsys, report.main, run, "--out", run / name, "--overwrite")
    assert f"--out {run / name}: this belongs to the run in {run}" in line
    assert snapshot(run) == before


def test_no_output_is_an_input_even_by_another_name(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    os.link(rows, tmp_path / "table.json")
    for name in ("rows.json", "table.json"):
        with pytest.raises(UserError, match=f"{name}: the command reads this file"):
            outputs.check_file(
                tmp_path / name, "--out", is_own=is_not_own, overwrite=True, inputs=[rows]
            )


def test_a_study_replaces_only_what_a_study_has_written(tmp_path):
    for name in ("study.md", "study/rate.json", "study/rate.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(UserError, match=f"{name}: this file exists"):
            study_results.check_files(tmp_path, "rate", overwrite=False)
        study_results.check_files(tmp_path, "rate", overwrite=True)
        path.unlink()
    study_results.check_files(tmp_path / "new" / "directory", "rate", overwrite=False)
    docs = ROOT / "docs"  # made by an earlier version
    study_results.check_files(docs, "warmup", overwrite=False)


def test_a_full_disk_leaves_the_file_from_before_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    outputs.write_text(path, "before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs.os, "fsync", full)
    with pytest.raises(UserError, match=f"^{path}: No space left on device$"):
        outputs.write_text(path, "after")
    assert snapshot(tmp_path) == {"summary.json": b"before\n"}


def test_only_temporary_files_of_processes_that_are_gone_are_removed(tmp_path):
    path = tmp_path / "config.json"
    left = outputs.temporary_beside(path)
    left.write_text("{")
    left_directory = outputs.temporary_beside(tmp_path / "tokenizer")
    left_directory.mkdir()
    live = outputs.temporary_beside(path)
    others = ["config.partial", ".config.json.alignjax-1.partial", ".config.json.partial"]
    for name in others:
        (tmp_path / name).write_text("mine")
    with live.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its process does while it writes
        outputs.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {live.name, *others}


# ----------------------------------------------------------------------------------- directories


def to_hf(run: Path, out: Path, *more: str) -> int:
    return convert.main(["--to_hf", str(run), "--out", str(out), *more])


def test_an_export_leaves_everything_beside_it_alone(chain, tmp_path):
    run = tmp_path / "lm.partial"
    shutil.copytree(chain.runs / "lm-tiny", run)
    before = snapshot(run)
    assert to_hf(run, tmp_path / "lm") == 0
    assert snapshot(run) == before
    assert {path.name for path in tmp_path.iterdir()} == {"lm", "lm.partial"}


def test_of_two_exports_to_one_place_one_wins_and_the_other_says_so(
    chain, tmp_path, monkeypatch, capsys
):
    """The second begins and ends while the first one reads its arrays."""
    out = tmp_path / "out"
    restore = checkpoint.restore_array
    codes = []

    def second_export(item, path):
        if not codes:
            codes.append(-1)
            codes.append(to_hf(chain.runs / "sft-tiny", out))
        return restore(item, path)

    monkeypatch.setattr(checkpoint, "restore_array", second_export)
    line = refused(capsys, convert.main, "--to_hf", chain.runs / "lm-tiny", "--out", out)
    assert codes[1] == 0 and f"--out {out}: an earlier export is there" in line
    winner = snapshot(out)
    assert to_hf(chain.runs / "sft-tiny", tmp_path / "alone") == 0
    assert snapshot(tmp_path / "alone") == winner
    assert {path.name for path in tmp_path.iterdir()} == {"out", "alone"}


def test_an_export_is_replaced_if_told_to_and_only_if_nothing_was_added(chain, tmp_path, capsys):
    out = tmp_path / "out"
    assert to_hf(chain.runs / "lm-tiny", out) == 0
    arguments = ("--to_hf", chain.runs / "sft-tiny", "--out", out)
    assert "replace it with --overwrite" in refused(capsys, convert.main, *arguments)
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)
    line = refused(capsys, convert.main, *arguments, "--overwrite")
    assert "notes.txt there was not written by the command" in line and snapshot(out) == before
    (out / "notes.txt").unlink()
    assert to_hf(chain.runs / "sft-tiny", out, "--overwrite") == 0
    assert snapshot(out) != before and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    line = refused(capsys, convert.main, *arguments[:3], tmp_path / "mine", "--overwrite")
    assert "already exists; name a new or empty directory" in line


def test_an_export_that_was_killed_is_cleared_away_by_the_next_one(chain, tmp_path):
    left = outputs.temporary_beside(tmp_path / "out")
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    other = outputs.temporary_beside(tmp_path / "other")
    other.mkdir()
    assert to_hf(chain.runs / "lm-tiny", tmp_path / "out") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", other.name}


def test_a_directory_of_results_is_claimed_before_anything_is_written(tmp_path):
    def check(directory: Path, overwrite: bool = False) -> None:
        output_directories.check_directory(
            directory, "--out", command=COMMAND, is_own=is_not_own, overwrite=overwrite
        )

    new = tmp_path / "new"
    check(new)
    assert not new.exists()
    output_directories.claim_directory(new, COMMAND)
    (new / "results.json").write_text("{}")
    check(new)
    mine = tmp_path / "mine"
    mine.mkdir()
    check(mine)
    (mine / "results.json").write_text("my results")
    with pytest.raises(UserError, match="holds files that the command has not written"):
        check(mine)
    check(mine, overwrite=True)


# ------------------------------------------------------------------------------ work directories


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer/vocabulary.txt", "precious"),
        ("lock", "the key is under the mat"),
        ("config.partial", "{}"),
        ("checkpoints/4/weights", "mine"),
        (".config.json.alignjax-mine.partial", "mine"),
        ("config.json", '{"model_type": "qwen2"}'),
    ],
)
def test_a_directory_that_holds_other_things_is_no_work_directory(name, content, tmp_path, capsys):
    path = tmp_path / "lm-tiny" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    before = snapshot(tmp_path)
    line = fails(capsys, *command("lm-tiny", tmp_path))
    assert "name another --workdir" in line
    assert snapshot(tmp_path) == before


def test_an_empty_directory_of_the_users_outlives_a_mistake(tmp_path, capsys):
    (tmp_path / "lm-tiny").mkdir()
    change = "--config.data.train=nowhere.jsonl"
    assert "nowhere.jsonl" in fails(capsys, *command("lm-tiny", tmp_path, change))
    assert snapshot(tmp_path) == {"lm-tiny": (tmp_path / "lm-tiny").lstat()[0]}
    (tmp_path / "lm-tiny").rmdir()
    fails(capsys, *command("lm-tiny", tmp_path, change))
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_a_work_directory_that_is_none_is_one_line(kind, tmp_path, capsys):
    path = tmp_path / "lm-tiny"
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("nowhere")
    line = fails(capsys, *command("lm-tiny", tmp_path))
    assert f"{path}: this is not a directory" in line
    assert path.is_symlink() or path.read_text() == "mine"


def test_errors_are_blamed_on_the_work_directory_only_for_its_own_files(tmp_path):
    """A reward function may fill another disk, and a parent's file may not be ours to read."""
    run = tmp_path / "run"
    elsewhere = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "cache"))
    unnamed = OSError(errno.EACCES, os.strerror(errno.EACCES))
    for error in (elsewhere, unnamed):
        with pytest.raises(OSError) as raised, lock.exclusive_use(run):
            raise error
        assert raised.value is error
    own = OSError(errno.EROFS, os.strerror(errno.EROFS), str(run / "checkpoints"))
    message = f"^{run / 'checkpoints'}: Read-only file system; fix that, and the same command"
    with pytest.raises(UserError, match=message), lock.exclusive_use(run):
        raise own
    with pytest.raises(UserError, match=message), lock.exclusive_use(run):
        with outputs.writing(run / "checkpoints"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_marker_says_whose_a_directory_is(tmp_path):
    with lock.exclusive_use(tmp_path / "run"):
        first = marker.read(tmp_path / "run")
        (tmp_path / "run" / "file").write_text("")
    assert first["made_by"] == "alignjax.train"
    with lock.exclusive_use(tmp_path / "run"):
        assert marker.read(tmp_path / "run") == first
    with lock.exclusive_use(tmp_path / "other"):
        assert marker.read(tmp_path / "other")["run"] != first["run"]


# ------------------------------------------------------------------------------------- studies

STUDY = """
import sys
from pathlib import Path
from alignjax.reports import study_runs
child = '''
import sys, threading
from alignjax.machine import signals
ended = threading.Event()
signals.watch_lifeline(ended.set)
open(sys.argv[1], "w").write("running")
assert ended.wait(60)
open(sys.argv[1], "w").write("ended")
'''
trial = study_runs.Trial(
    arm="arm", seed=0, workdir=Path(sys.argv[1]) / "run", steps=1,
    command=("python", "-c", child, sys.argv[1] + "/told"),
)
study_runs.launch(trial, [], study_runs.Children())
"""


def wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + 120
    while not (path.exists() and path.read_text() == text):
        assert time.monotonic() < end, f"no {text!r} in {path}"
        time.sleep(0.02)


def test_a_study_that_is_killed_takes_its_runs_along(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    study = subprocess.Popen([sys.executable, "-c", STUDY, str(tmp_path)], env=environment)
    wait_for(tmp_path / "told", "running")
    study.send_signal(signal.SIGKILL)
    study.wait()
    wait_for(tmp_path / "told", "ended")


def test_a_log_of_the_users_is_kept(tmp_path):
    (tmp_path / "run.log").write_text("mine")
    trial = study_runs.Trial(
        arm="arm", seed=0, workdir=tmp_path / "run", command=("python", "-c", "1/0"), steps=1
    )
    with pytest.raises(UserError, match="arm, seed 0: .*ZeroDivisionError.* in .*run-2.log"):
        study_runs.launch(trial, [], study_runs.Children())
    assert (tmp_path / "run.log").read_text() == "mine"


def test_a_directory_that_another_process_of_the_run_claims_meanwhile_is_free(
    tmp_path, monkeypatch
):
    read = marker.read

    def read_then_claim(directory):
        found = read(directory)
        (directory / marker.NAME).write_text(marker.dumps(lock.new_run()))
        return found

    monkeypatch.setattr(marker, "read", read_then_claim)
    lock.check_ours(tmp_path)
    assert (tmp_path / marker.NAME).exists()


def test_a_directory_in_which_another_process_writes_its_marker_is_free(tmp_path):
    with outputs.new_file(tmp_path / marker.NAME):
        assert len(list(tmp_path.iterdir())) == 1
        lock.check_ours(tmp_path)
