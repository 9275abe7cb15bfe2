"""Helpers for tests of whole runs: the tiny chain, its commands, what must repeat to the bit."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from alignjax import train
from alignjax.algorithms.stage import StepDetails, StepOutput
from alignjax.runs.log import TrainingLog
from alignjax.weights import checkpoint

ROOT = Path(__file__).resolve().parent.parent
# Each run of the tiny chain with the parents that it needs beside it.
PARENTS = {
    "lm-tiny": [],
    "sft-tiny": ["lm-tiny"],
    "rm-tiny": ["pmp-tiny"],
    "dpo-tiny": ["sft-tiny"],
    "ppo-tiny": ["sft-tiny", "rm-tiny"],
    "grpo-tiny": ["sft-tiny", "rm-tiny"],
}
STEPS = 4


class Chain(NamedTuple):
    """The tiny runs: five made by one command without interruption, and that of DPO."""

    runs: Path  # the directory that holds the runs
    printed: list[str]


def command(name: str, runs: Path, *more: str) -> list[str]:
    """Return the arguments of `alignjax.train` that make the run NAME in the directory `runs`."""
    config = f"{name.removesuffix('-tiny')}.py:tiny"
    return ["--config", config, "--workdir", str(runs / name), *more]


def files_of(run: Path, steps: int = STEPS) -> dict[str, object]:
    """Return everything that must repeat to the bit.

    These are the metrics, the samples, the evaluations and responses if there are any, the
    summary without its seconds, and every array of the last checkpoint.
    """
    names = ["metrics.jsonl", "samples.jsonl", "config.json"]
    for name in ("evaluations.jsonl", "responses.jsonl"):
        if (run / name).exists():
            names.append(name)
    contents = {name: (run / name).read_bytes() for name in names}
    summary = json.loads((run / "summary.json").read_text())
    contents["summary"] = {key: value for key, value in summary.items() if "seconds" not in key}
    return contents | checkpoint_bytes(run, steps)


def checkpoint_bytes(run: Path, steps: int) -> dict[str, bytes]:
    """Return the bytes of every array of the last checkpoint, which must be that of `steps`."""
    checkpoints = checkpoint.Checkpoints(run / "checkpoints", None)
    assert checkpoints.latest() == steps
    items = [
        path.name
        for path in (run / "checkpoints" / str(steps)).iterdir()
        if path.is_dir() and path.name not in ("metrics", "checksums")
    ]
    wanted = {item: checkpoint.ocp.args.StandardRestore() for item in items}
    restored = checkpoints.manager.restore(steps, args=checkpoint.ocp.args.Composite(**wanted))
    checkpoints.close()
    contents = {}
    for item in items:
        for path, array in jax.tree_util.tree_leaves_with_path(restored[item]):
            contents[item + jax.tree_util.keystr(path)] = np.asarray(array).tobytes()
    return contents


def rows(path: Path) -> list[dict]:
    """Return the rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_parents(name: str, chain_runs: Path, runs: Path) -> Path:
    """Copy the parents of the run NAME from the chain into `runs`, and return `runs`."""
    for parent in PARENTS[name]:
        shutil.copytree(chain_runs / parent, runs / parent)
    return runs


def cut(run: Path, other: Path) -> None:
    """Copy a run as it was after its checkpoint of step 2."""
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints" / str(STEPS))
    (other / "summary.json").unlink()


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run a command that ends in a user error, and return its one line on standard error."""
    assert train.main(list(arguments)) == 2
    printed = capsys.readouterr().err
    without_bar = [line for line in printed.splitlines() if line and "%|" not in line]
    assert len(without_bar) == 1 and without_bar[0].startswith("alignjax: "), printed
    return without_bar[0]


class Crash(BaseException):
    """A crash that a test causes; the commands let it through, as they would a kill."""


@contextlib.contextmanager
def act_in_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Call `act` in a step of every run in the context, once the log has the step's output."""
    write = TrainingLog.write

    def write_and_act(log: TrainingLog, current: int, output: StepOutput) -> None:
        write(log, current, output)
        if current == step:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLog, "write", write_and_act)
        yield


def step_output(
    metrics: dict,
    *,
    late_metrics: dict[str, float] | None = None,
    samples: list[dict] | None = None,
    details: Callable[[], StepDetails] | None = None,
    batch: dict[str, np.ndarray] | None = None,
) -> StepOutput:
    """Return the output of a step; `details` takes the place of `late_metrics` and `samples`."""
    at_once = StepDetails(metrics=late_metrics or {}, samples=samples or [])
    return StepOutput(
        metrics=metrics, details=details or (lambda: at_once), batch=lambda: batch or {}
    )
