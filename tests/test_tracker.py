"""Weights & Biases by a module that only remembers: what it is told, by which step, and that nothing of it stops a run."""

import json
import math
import os
import signal
import sys
import types

import pytest
from runs import STEPS, command, fails, files_of

from alignjax import config as configs
from alignjax import train
from alignjax.runs import log as run_log
from alignjax.runs import records, tracker


class Run:
    """As far as we call it: `step` is the next one after those that the server has of the id."""

    def __init__(self, server, id):
        self.history, self.summary, self.ended = server.setdefault(id, {}), {}, None
        self.step = max(self.history, default=-1) + 1

    def log(self, figures, step):
        assert not self.history or step >= max(self.history), (
            "steps go down: W&B drops these figures"
        )
        self.history.setdefault(step, {}).update(figures)

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A fake module: inits, runs, and whether it is to fail."""
    fake, server = types.ModuleType("wandb"), {}
    fake.inits, fake.runs, fake.down = [], [], False

    def init(**asked):
        fake.inits.append(asked)
        if fake.down and asked.get("mode") != "offline":
            raise ConnectionError("no route\nto host")
        fake.runs.append(Run(server, asked["id"]))
        return fake.runs[-1]

    fake.init, fake.teardown = init, lambda: fake.inits.append({"teardown": True})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return fake


def plain(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("step", "samples")}


def test_runs_are_told_by_their_steps_and_go_on_as_the_same_ones(
    wandb, chain, tmp_path, monkeypatch
):
    """The parent is stopped by a signal in its first step; the same command goes on with it, and then runs its child."""
    write = run_log.Log.write
    with monkeypatch.context() as patch:
        stop = lambda self, step, *more: (
            write(self, step, *more),
            os.kill(os.getpid(), signal.SIGTERM),
        )
        patch.setattr(run_log.Log, "write", stop)
        assert train.main([*command("sft-tiny", tmp_path), "--wandb", "mine"]) == 0
    assert train.main([*command("sft-tiny", tmp_path), "--wandb", "mine"]) == 0
    assert [asked["name"] for asked in wandb.inits] == ["lm-tiny", "lm-tiny", "sft-tiny"]
    first, second, child = wandb.inits
    assert (
        first == second
        and first["id"] == (tmp_path / "lm-tiny" / "wandb-id").read_text().strip() != child["id"]
    )
    assert (child["project"], child["resume"], child["dir"]) == (
        "mine",
        "allow",
        tmp_path / "sft-tiny",
    )
    assert child["config"] == json.loads((tmp_path / "sft-tiny" / "config.json").read_text())
    assert [run.ended for run in wandb.runs] == [1, 0, 0] and wandb.runs[0].summary == {}
    for run, name in zip(wandb.runs[1:], ("lm-tiny", "sft-tiny"), strict=True):
        left = records.read(tmp_path / name)
        assert run.history == {
            i: plain(left.metrics[i]) | plain(left.timing[i]) for i in range(STEPS)
        }
        assert run.summary and run.summary.items() <= left.summary.items()
        assert files_of(tmp_path / name) == files_of(chain[0] / name)


def test_an_evaluation_stands_at_its_step_and_steps_do_not_go_down(wandb, tmp_path):
    config = configs.Config()
    with tracker.tracking("mine", config, tmp_path) as tracked:
        log = run_log.Log(tmp_path, "run", 0, 4, (), tracker=tracked)
        for i in range(4):
            if i == 2:
                log.evaluate(i, lambda state: ({"score": 0.5, "kl": math.nan}, []), None)
            log.write(i, {"loss": float(i)}, lambda: ({}, []))
            log.end_step(i, {"compilations": i})
        log.flush()
        log.close()
    timing = records.lines(tmp_path / "timing.jsonl")
    wanted = {i: {"loss": float(i), **plain(timing[i])} for i in range(4)}
    wanted[2] |= {"eval/score": 0.5}
    assert wandb.runs[0].history == wanted and "evaluation_seconds" in timing[2]


def test_what_is_there_already_is_not_told_again(wandb, tmp_path):
    """Of a run that was cut off after its checkpoint; the figures are the same."""
    said = []
    for steps in (range(5), range(3, 7)):
        with tracker.tracking("mine", configs.Config(), tmp_path, said.append) as tracked:
            for i in steps:
                tracked.log(i, {"loss": float(i)})
    assert said == [] and wandb.runs[1].history == {i: {"loss": float(i)} for i in range(7)}


def test_what_fails_is_said_and_stops_nothing(wandb, tmp_path):
    """At the start it is kept offline; later the run goes on without."""
    wandb.down, said = True, []
    with tracker.tracking("mine", configs.Config(), tmp_path, said.append) as tracked:
        online, teardown, offline = wandb.inits
        assert offline == online | {"mode": "offline"} and teardown == {"teardown": True}
        tracked.log(0, {"loss": 1.0})
        tracked.first = -1
        tracked.log(-1, {"loss": 1.0})  # which the fake refuses
        tracked.log(1, {"loss": 1.0})
        tracked.summary({"x": 1})
    assert (
        len(said) == 2
        and wandb.runs[0].history == {0: {"loss": 1.0}}
        and wandb.runs[0].summary == {}
    )
    assert said[0] == (
        "lm: Weights & Biases can't be used (ConnectionError: no route to host); the figures are kept "
        "offline, `wandb sync` sends them"
    )
    assert said[1].startswith("lm: Weights & Biases: AssertionError: ") and said[1].endswith(
        "the run goes on without it"
    )


def test_of_several_processes_the_first_alone_tells(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(tracker.jax, "process_index", lambda: 1)
    with tracker.tracking("mine", configs.Config(), tmp_path) as tracked:
        assert tracked is None
    with tracker.tracking("", configs.Config(), tmp_path) as tracked:
        assert tracked is None
    assert wandb.inits == [] and list(tmp_path.iterdir()) == []


def test_without_the_package_it_is_one_line_before_anything_is_done(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = fails(capsys, *command("lm-tiny", tmp_path), "--wandb", "mine")
    assert "--wandb: " in said and "pip install -c constraints.txt -e '.[wandb]'" in said
    assert list(tmp_path.iterdir()) == []
