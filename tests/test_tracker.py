"""The tracker, with a fake wandb that remembers what it receives."""

import json
import math
import os
import signal
import sys
import types

import jax
import pytest
from runs import STEPS, act_in_step, command, fails, files_of, step_output

from alignjax import config as configs
from alignjax import train
from alignjax.algorithms.stage import Evaluation
from alignjax.runs import records, tracker
from alignjax.runs.log import TrainingLog


class Run:
    """The part of wandb's run that the tracker uses.

    `step` is the next step after those that the server has for the run's id.
    """

    def __init__(self, server: dict[str, dict], run_id: str):
        self.history = server.setdefault(run_id, {})
        self.summary = {}
        self.exit_code = None
        self.step = max(self.history, default=-1) + 1

    def log(self, figures: dict, step: int) -> None:
        assert not self.history or step >= max(self.history), "the step decreases: W&B drops these"
        self.history.setdefault(step, {}).update(figures)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb(types.ModuleType):
    """A module wandb that remembers its calls."""

    def __init__(self):
        super().__init__("wandb")
        self.calls: list[dict] = []  # the arguments of `init`, and {"teardown": True}
        self.runs: list[Run] = []
        self.server = {}
        self.is_down = False

    def init(self, **settings) -> Run:
        self.calls.append(settings)
        if self.is_down and settings.get("mode") != "offline":
            raise ConnectionError("no route\nto host")
        self.runs.append(Run(self.server, settings["id"]))
        return self.runs[-1]

    def teardown(self) -> None:
        self.calls.append({"teardown": True})


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return fake


def figures_of(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("step", "samples")}


def test_runs_are_sent_by_step_and_resume_under_their_ids(wandb, chain, tmp_path):
    """A signal stops the parent in its first step; the same command resumes it, then its child."""
    with act_in_step(0, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train.main([*command("sft-tiny", tmp_path), "--wandb", "project"]) == 0
    assert train.main([*command("sft-tiny", tmp_path), "--wandb", "project"]) == 0
    assert [settings["name"] for settings in wandb.calls] == ["lm-tiny", "lm-tiny", "sft-tiny"]
    first, second, child = wandb.calls
    stored_id = (tmp_path / "lm-tiny" / "wandb-id").read_text().strip()
    assert first == second and first["id"] == stored_id != child["id"]
    assert child["project"] == "project" and child["resume"] == "allow"
    assert child["dir"] == tmp_path / "sft-tiny"
    assert child["config"] == json.loads((tmp_path / "sft-tiny" / "config.json").read_text())
    assert [run.exit_code for run in wandb.runs] == [1, 0, 0] and wandb.runs[0].summary == {}
    for run, name in zip(wandb.runs[1:], ("lm-tiny", "sft-tiny"), strict=True):
        left = records.read(tmp_path / name)
        assert run.history == {
            i: figures_of(left.metrics[i]) | figures_of(left.timing[i]) for i in range(STEPS)
        }
        assert run.summary and run.summary.items() <= left.summary.items()
        assert files_of(tmp_path / name) == files_of(chain.runs / name)


def test_an_evaluation_is_sent_with_its_step_and_steps_do_not_decrease(wandb, tmp_path):
    evaluation = Evaluation(figures={"score": 0.5, "kl": math.nan}, rows=[])
    with tracker.tracking("project", configs.Config(), tmp_path) as tracked:
        log = TrainingLog(tmp_path, "run", start=0, num_steps=4, tracker=tracked)
        for step in range(4):
            if step == 2:
                log.evaluate(step, lambda: evaluation)
            log.write(step, step_output({"loss": float(step)}))
            log.end_step(step, {"compilations": step})
        log.flush()
        log.close()
    timing = records.read_lines(tmp_path / "timing.jsonl")
    wanted = {i: {"loss": float(i), **figures_of(timing[i])} for i in range(4)}
    wanted[2] |= {"eval/score": 0.5}
    assert wandb.runs[0].history == wanted and "evaluation_seconds" in timing[2]


def test_steps_that_the_server_has_are_not_sent_again(wandb, tmp_path):
    """A run that was cut off after its checkpoint repeats steps, with the same figures."""
    printed = []
    for steps in (range(5), range(3, 7)):
        config = configs.Config()
        with tracker.tracking("project", config, tmp_path, printed.append) as tracked:
            for step in steps:
                tracked.log(step, {"loss": float(step)})
    assert printed == [] and wandb.runs[1].history == {i: {"loss": float(i)} for i in range(7)}


def test_a_failure_is_reported_and_stops_nothing(wandb, tmp_path):
    """A failure at the start keeps the figures offline; a later one ends the tracking."""
    wandb.is_down = True
    printed = []
    with tracker.tracking("project", configs.Config(), tmp_path, printed.append) as tracked:
        online, teardown, offline = wandb.calls
        assert offline == online | {"mode": "offline"} and teardown == {"teardown": True}
        tracked.log(0, {"loss": 1.0})
        tracked.first_step = -1
        tracked.log(-1, {"loss": 1.0})  # the fake refuses this
        tracked.log(1, {"loss": 1.0})
        tracked.summary({"x": 1})
    assert len(printed) == 2
    assert wandb.runs[0].history == {0: {"loss": 1.0}} and wandb.runs[0].summary == {}
    assert printed[0] == (
        "lm: cannot use Weights & Biases (ConnectionError: no route to host); the figures are "
        "kept offline, and `wandb sync` sends them"
    )
    assert printed[1].startswith("lm: Weights & Biases: AssertionError: ")
    assert printed[1].endswith("the run continues without it")


def test_only_the_first_of_several_processes_tracks_and_only_with_a_project(
    wandb, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: 1)
        with tracker.tracking("project", configs.Config(), tmp_path) as tracked:
            assert tracked is None
    with tracker.tracking("", configs.Config(), tmp_path) as tracked:
        assert tracked is None
    assert wandb.calls == [] and list(tmp_path.iterdir()) == []


def test_without_the_package_the_command_fails_at_once_with_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = fails(capsys, *command("lm-tiny", tmp_path), "--wandb", "project")
    assert "--wandb: " in line and "pip install -c constraints.txt -e '.[wandb]'" in line
    assert list(tmp_path.iterdir()) == []
