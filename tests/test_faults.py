"""What can go wrong with a run, and that it goes on from there as if nothing had been."""

import collections
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import kills
import pytest
from runs import ROOT, command, fails, files_of, rows, with_parents

from alignjax import train
from alignjax.runs import log as run_log


class Crash(Exception):
    pass


def crash_in(step, act):
    """A Log.write that acts when it is handed a step."""
    write = run_log.Log.write

    def wrapped(self, at, *rest):
        write(self, at, *rest)
        if at == step:
            act()

    return wrapped


@pytest.mark.parametrize("name", ["lm-tiny", "rm-tiny", "ppo-tiny"])
def test_resume_is_exact_after_an_exception_and_a_sigterm(
    name, chain, tmp_path, monkeypatch, capsys
):
    """SIGTERM in the first step, an exception in the last one, then to the end: all is as if nothing had been."""
    runs = with_parents(name, chain[0], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            run_log.Log, "write", crash_in(0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        )
        assert train.main(command(name, runs)) == 0
    assert f"SIGTERM: {name} saved at step 1 of 4" in capsys.readouterr().err

    def crash():
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(run_log.Log, "write", crash_in(3, crash))
        with pytest.raises(Crash):
            train.main(command(name, runs))
    assert (
        len(rows(runs / name / "metrics.jsonl")) == 3
    )  # one past the checkpoint: to be dropped and written again
    assert train.main(command(name, runs)) == 0
    assert f"{name}: goes on from step 2" in capsys.readouterr().out
    assert files_of(runs / name) == files_of(chain[0] / name)


def test_twenty_kills_at_random_moments_change_nothing(chain, tmp_path):
    """See kills.py. What was killed is said in its result: at the start, in rollouts, updates, saves and evaluations, and
    elsewhere."""
    with_parents("ppo-tiny", chain[0], tmp_path)
    asked = [sys.executable, "tests/kills.py", str(tmp_path)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    hits = sum((collections.Counter(chain["hits"]) for chain in found), collections.Counter())
    assert hits.total() >= 20 and all(hits[kind] >= 4 for kind in kills.KINDS), hits
    print(dict(hits))
    whole = files_of(tmp_path / "whole", kills.STEPS)
    for run in (tmp_path / name for chain in found for name in chain["ended"]):
        assert files_of(run, kills.STEPS) == whole
        assert {path.name for path in run.iterdir()} == {
            path.name for path in (tmp_path / "whole").iterdir()
        }
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
            "11",
            "12",
        ]  # nothing half-written


def test_a_damaged_checkpoint_falls_back_to_the_one_before(chain, tmp_path, capsys):
    shutil.copytree(chain[0] / "lm-tiny", tmp_path / "lm-tiny")
    (tmp_path / "lm-tiny" / "summary.json").unlink()
    for file in (tmp_path / "lm-tiny" / "checkpoints" / "4" / "model").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert train.main(command("lm-tiny", tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "is damaged" in printed and "goes on from step 2" in printed
    assert files_of(tmp_path / "lm-tiny") == files_of(chain[0] / "lm-tiny")


def unfinished(chain, tmp_path):
    """lm-tiny as after step 2 of 4, cut off by force: its lines go on, there is a lock, and half a checkpoint."""
    shutil.copytree(chain[0] / "lm-tiny", tmp_path / "lm-tiny")
    (tmp_path / "lm-tiny" / "summary.json").unlink()
    checkpoints = tmp_path / "lm-tiny" / "checkpoints"
    (checkpoints / "4").rename(checkpoints / "4.orbax-checkpoint-tmp")
    (tmp_path / "lm-tiny" / "lock").write_text("process 1 on elsewhere")
    return tmp_path / "lm-tiny"


def test_if_all_checkpoints_are_damaged_nothing_is_touched(chain, tmp_path, capsys):
    shutil.copytree(chain[0] / "lm-tiny", tmp_path / "lm-tiny")
    (tmp_path / "lm-tiny" / "summary.json").unlink()
    for step in ("2", "4"):
        shutil.rmtree(tmp_path / "lm-tiny" / "checkpoints" / step / "model")
    before = {
        path: path.read_bytes() for path in (tmp_path / "lm-tiny").rglob("*") if path.is_file()
    }
    line = fails(capsys, *command("lm-tiny", tmp_path))
    assert "none of the checkpoints [4, 2] can be read" in line
    assert {
        path: path.read_bytes() for path in (tmp_path / "lm-tiny").rglob("*") if path.is_file()
    } == before


def test_a_damaged_parent_is_named(chain, tmp_path, capsys):
    """A finished run is its last step: no other is taken for it."""
    runs = with_parents("sft-tiny", chain[0], tmp_path)
    sums = runs / "lm-tiny" / "checkpoints" / "4" / "checksums" / "metadata"
    sums.write_text(sums.read_text().replace("1", "2"))
    line = fails(capsys, *command("sft-tiny", runs))
    assert (
        f"{runs / 'lm-tiny' / 'checkpoints' / '4'} is damaged (model/" in line
        and "checksum differs" in line
    )


def test_a_disk_that_is_full_in_a_save_is_one_line_and_the_same_command_goes_on(
    chain, tmp_path, capfd
):
    """No file may be longer than 20 KiB: the checkpoint's are."""
    run = unfinished(chain, tmp_path)
    kept = {
        path: path.read_bytes() for path in (run / "checkpoints" / "2").rglob("*") if path.is_file()
    }
    asked = ["bash", "-c", 'ulimit -f 20; exec "$@"', "-", sys.executable, "-m", "alignjax.train"]
    done = subprocess.run(
        [*asked, *command("lm-tiny", tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    told = [line for line in done.stderr.splitlines() if line and "%|" not in line]
    assert done.returncode == 2 and len(told) == 1, done.stderr
    assert told[0].startswith(
        f"alignjax: {run / 'checkpoints'}: a checkpoint can't be written (File too large); "
    )
    assert {
        path: path.read_bytes() for path in (run / "checkpoints" / "2").rglob("*") if path.is_file()
    } == kept
    assert not (run / "checkpoints" / "4").exists() and not (run / "summary.json").exists()
    assert train.main(command("lm-tiny", tmp_path)) == 0
    assert "goes on from step 2" in capfd.readouterr().out
    assert files_of(run) == files_of(chain[0] / "lm-tiny")


@pytest.mark.filterwarnings(
    "error::pytest.PytestUnhandledThreadExceptionWarning"
)  # what a thread leaves uncaught would be a traceback
@pytest.mark.parametrize("kind", ["metrics", "tensorboard"])
def test_a_disk_that_is_full_between_saves_is_one_line_too(
    kind, chain, tmp_path, monkeypatch, capfd
):
    run, write = unfinished(chain, tmp_path), run_log.Log.write

    def wrapped(self, step, *rest):
        if step == 3 and kind == "metrics":
            self.files["metrics"] = open("/dev/full", "a")
        if step == 3 and kind == "tensorboard":
            self.board._py_recordio_writer._writer, run_log.FLUSH = open("/dev/full", "wb"), 0
        write(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_log, "FLUSH", 60)
        patch.setattr(run_log.Log, "write", wrapped)
        line = fails(capfd, *command("lm-tiny", tmp_path))
    assert (
        line
        == f"alignjax: {run}: No space left on device; fix that, and the same command resumes the run"
    )
    assert train.main(command("lm-tiny", tmp_path)) == 0
    assert files_of(run) == files_of(chain[0] / "lm-tiny")


def test_a_second_process_on_a_work_directory_is_refused_at_once(chain, tmp_path, monkeypatch):
    """It is started in the third step of the first, which goes on; the lock of a run that is gone hinders nobody."""
    run, seen = unfinished(chain, tmp_path), []
    asked = [sys.executable, "-m", "alignjax.train", *command("lm-tiny", tmp_path)]

    def second():
        files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
        seen.append((done.returncode, done.stdout, done.stderr))

    monkeypatch.setattr(run_log.Log, "write", crash_in(2, second))
    assert train.main(command("lm-tiny", tmp_path)) == 0
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert seen == [
        (2, "", f"alignjax: {run}: in use by {holder}; wait for it to finish, or stop it\n")
    ]
    assert files_of(run) == files_of(chain[0] / "lm-tiny") and not (run / "lock").exists()


ELSEWHERE = """
import socket, sys, time
now = time.time
time.time, socket.gethostname = lambda: now() + 1e9, lambda: "elsewhere"
from alignjax import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_clock_zone_locale_host_directory_and_hash_seed_change_nothing(chain, tmp_path):
    """Nor what a process leaves that was killed as it claimed the directory."""
    claimed = tmp_path / "some where" / "lm-tiny"
    (claimed / "tokenizer.partial").mkdir(parents=True)
    for name in ("lock", "config.partial", "tokenizer.partial/tokenizer.json"):
        (claimed / name).write_text("{")
    around = os.environ | {
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONHASHSEED": "7",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    asked = [sys.executable, "-c", ELSEWHERE, *command("lm-tiny", tmp_path / "some where")]
    done = subprocess.run(asked, cwd=tmp_path, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(claimed) == files_of(chain[0] / "lm-tiny")
