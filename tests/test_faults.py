"""What can go wrong with a run, and that it goes on from there as if nothing had been."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from runs import ROOT, command, files_of, rows, with_parents

from alignjax import metrics, train


class Crash(Exception):
    pass


def crash_in(step, act):
    """A Log.write that acts when it is handed a step."""
    write = metrics.Log.write

    def wrapped(self, at, *rest):
        write(self, at, *rest)
        if at == step:
            act()

    return wrapped


@pytest.mark.parametrize("name", ["lm-tiny", "rm-tiny", "ppo-tiny"])
def test_resume_is_exact_after_an_exception_and_a_sigterm(name, chain, tmp_path, monkeypatch, capsys):
    """SIGTERM in the first step, an exception in the last one, then to the end: all is as if nothing had been."""
    runs = with_parents(name, chain[0], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Log, "write", crash_in(0, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert train.main(command(name, runs)) == 0
    assert f"SIGTERM: {name} saved at step 1 of 4" in capsys.readouterr().err

    def crash():
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Log, "write", crash_in(3, crash))
        with pytest.raises(Crash):
            train.main(command(name, runs))
    assert len(rows(runs / name / "metrics.jsonl")) == 3  # one past the checkpoint: to be dropped and written again
    assert train.main(command(name, runs)) == 0
    assert f"{name}: goes on from step 2" in capsys.readouterr().out
    assert files_of(runs / name) == files_of(chain[0] / name)


KILLED = """
import os, signal, sys
sys.path[:0] = ["tests", "."]
import conftest
from test_faults import crash_in
from alignjax import metrics, train
metrics.Log.write = crash_in(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
train.main(sys.argv[1:])
"""


def test_resume_is_exact_after_a_sigkill(chain, tmp_path):
    runs = with_parents("ppo-tiny", chain[0], tmp_path)
    asked = command("ppo-tiny", runs)
    killed = subprocess.run([sys.executable, "-c", KILLED, *asked], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (runs / "ppo-tiny" / "summary.json").exists()
    assert train.main(asked) == 0
    assert files_of(runs / "ppo-tiny") == files_of(chain[0] / "ppo-tiny")


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
