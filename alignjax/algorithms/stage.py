"""What the training loop drives and the planner compiles: the protocol of a stage.

A step with a figure that is not finite leaves WORKDIR/skipped/STEP.npz; docs/metrics.md says how
to compute its losses again.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.config import Config
from alignjax.machine.profile import Phases
from alignjax.weights.imported import Imported

# role -> TrainState, and whatever else a resume needs; its leaves are arrays on the mesh.
State = dict[str, Any]
# Given a number of batches, it opens a progress bar, and gives what to call after each of them.
OpenProgress = Callable[[int], AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def no_progress(batches: int) -> Iterator[Callable[[], None]]:
    """Show nothing: an `OpenProgress` for evaluations that nobody watches."""
    yield lambda: None


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run gives its stage beside the config and the mesh."""

    parents: dict[str, Path]  # role -> directory of a complete run or of a checkpoint
    tokenizer: PreTrainedTokenizerBase
    say: Callable[[str], None]  # prints a line
    phases: Phases  # where the time of a step goes
    imported: Imported = field(
        default_factory=Imported
    )  # from the checkpoint that the model came from
    evaluation_progress: OpenProgress = no_progress  # of the evaluation at the end


@dataclass(frozen=True, kw_only=True)
class StepDetails:
    """What is known of a step once its arrays are on the host."""

    metrics: dict[str, float]
    samples: list[dict]  # rows of samples.jsonl


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step returns beside the new state.

    `details` and `batch` are called after the next step has been dispatched, so they may read
    only host data that does not change and arrays that no later step donates.
    """

    metrics: dict[str, jax.Array]  # device scalars
    details: Callable[[], StepDetails]
    batch: Callable[[], dict[str, np.ndarray]]  # what the step learned from, to compute it again
    # Metric -> what is wrong if it is not finite. The first such metric explains the others.
    causes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures on held-out data, and rows that show where they come from."""

    figures: dict[str, float]
    rows: list[dict]


class Loops(NamedTuple):
    """How often the loops of a rollout run, whose ends depend on the data."""

    turns: int = 0  # of the outermost loop; 0: there is no such loop
    steps: int = 1  # decode steps in each turn
    filled: float = 1.0  # share of a cached row that a step reads, on average


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled function of a stage, with the shapes of its arguments."""

    name: str
    calls: int  # in one step of the loop
    function: Callable[..., Any]  # jitted
    arguments: tuple[Any, ...]  # shapes with shardings
    # Shapes in device memory during the call that are neither resident nor arguments.
    beside: tuple[Any, ...] = ()
    loops: Loops = Loops()
    mesh: jax.sharding.Mesh | None = None  # if it is not the one that is set


class Stage(Protocol):
    """One kind of training: language modelling, ranking, or PPO. Steps count from 0.

    A stage that was loaded trains. One that was only planned has no data and no parameters: it
    has its abstract state, its programs and what is resident.
    """

    mesh: jax.sharding.Mesh
    num_steps: int
    abstract_state: State  # shapes, types and shardings: what a restore needs
    progress_metrics: tuple[str, ...]  # shown on the progress bar

    @classmethod
    def load(cls, config: Config, mesh: jax.sharding.Mesh, inputs: RunInputs) -> Self:
        """Read the data and the frozen roles, and return a stage that can train."""
        ...

    @classmethod
    def plan(cls, config: Config, mesh: jax.sharding.Mesh) -> Self:
        """Return a stage that can only be compiled, for any mesh, without reading anything."""
        ...

    def init_state(self) -> State:
        """Return the state before the first step, fresh or from the parents."""
        ...

    def step(self, state: State, step: int) -> tuple[State, StepOutput]:
        """Return the state after a step; the arrays of the given state are donated."""
        ...

    def finalise(self, state: State) -> State:
        """Return the state to save after the last step."""
        ...

    def evaluate(self, state: State) -> Evaluation:
        """Return the figures of summary.json and the rows of responses.jsonl at the end."""
        ...

    def evaluate_midway(self, state: State) -> Evaluation | None:
        """Return a row of evaluations.jsonl and its samples, or None if the stage has none."""
        ...

    def table(self, figures: dict[str, float]) -> list[tuple[str, str]]:
        """Return the result of a run at a glance: (label, text) of each line."""
        ...

    def programs(self) -> Iterable[Program]:
        """Yield the compiled functions of a step with the shapes that they are called with.

        Resident shapes among the arguments are the same objects as in `resident`.
        """
        ...

    def programs_ahead(self) -> Iterable[Program]:
        """Yield the programs of the run with the shapes that it will call them with.

        They are compiled before the first step. One that is missing is compiled when it is called.
        """
        ...

    def resident(self) -> dict[str, Any]:
        """Return, by name, the shapes that stay in device memory throughout a step."""
        ...
