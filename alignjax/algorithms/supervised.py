"""What the stages with one model and one loss share: state, step, programs."""

import functools
from collections.abc import Iterable
from typing import Any, Self

import jax
import numpy as np

from alignjax.algorithms import optimisation
from alignjax.algorithms.optimisation import LossFunction, MinibatchUpdate
from alignjax.algorithms.stage import Program, RunInputs, State, StepDetails, StepOutput
from alignjax.config import Config
from alignjax.machine import sharding
from alignjax.machine.profile import Phases
from alignjax.models import lora
from alignjax.weights import roles
from alignjax.weights.role_reader import RoleReader

Mesh = jax.sharding.Mesh


def abstract_total(
    accumulate: optimisation.Accumulate,
    params: dict,
    microbatch: Any,
    mesh: Mesh,
    base: dict | None = None,
) -> optimisation.GradientSum:
    """Return the shapes of a sum over microbatches: a gradient laid out as its parameters."""
    metrics = accumulate.metric_shapes(params, microbatch, base)
    replicated = sharding.replicated(mesh)
    metrics = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), metrics
    )
    return optimisation.GradientSum(params, metrics)


class SupervisedStage:
    """The frame of a stage; a subclass has the loss, the data and the evaluation.

    `data` has `batches` and `prefetch`; it is None if the stage can only be compiled.
    """

    head: str  # "lm" or "scalar"
    role: str = "model"  # of the trained model: among the parents, in the state, in checkpoints

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        *,
        data: Any = None,
        reader: RoleReader | None = None,
        phases: Phases | None = None,
    ):
        self.config = config
        self.mesh = mesh
        self.data = data
        self.reader = reader
        self.phases = phases or Phases()
        self.num_steps = config.steps or (data.batches.epoch if data else 1)
        self.optimiser = optimisation.make_optimiser(config.optimiser, self.num_steps)
        abstract = optimisation.abstract_state(
            config.model, self.head, self.optimiser, mesh, config.lora
        )
        # Beneath the adapters, frozen; None if all parameters are trained.
        self.abstract_base = roles.abstract_base(config.model, self.head, mesh, config.lora)
        self.base = reader.base(self.role) if reader else None
        self.abstract_state: State = {self.role: abstract}
        self.loss_fn = self.make_loss(config)
        self.update = MinibatchUpdate(self.loss_fn, self.optimiser, abstract)

    @staticmethod
    def make_loss(config: Config) -> LossFunction:
        """Return the loss of a microbatch."""
        raise NotImplementedError

    @staticmethod
    def load_data(config: Config, mesh: Mesh, inputs: RunInputs) -> Any:
        """Read and tokenise what the config trains on and holds out."""
        raise NotImplementedError

    def longest_microbatches(self) -> list[Any]:
        """Return a minibatch of examples that are as long as they may be, for planning."""
        raise NotImplementedError

    @classmethod
    def load(cls, config: Config, mesh: Mesh, inputs: RunInputs) -> Self:
        """Read and tokenise the data, and return a stage that can train."""
        data = cls.load_data(config, mesh, inputs)
        reader = RoleReader(config, mesh, inputs.parents)
        return cls(config, mesh, data=data, reader=reader, phases=inputs.phases)

    @classmethod
    def plan(cls, config: Config, mesh: Mesh) -> Self:
        """Return a stage that can only be compiled."""
        return cls(config, mesh)

    def init_state(self) -> State:
        """Return the state of a fresh model, or of the parent's; a missing head is fresh."""
        abstract = self.abstract_state[self.role]
        params = self.reader.initial(self.role)
        return {self.role: optimisation.place_state(params, self.optimiser, abstract)}

    def params_of(self, state: State) -> dict:
        """Return all parameters of the model: what is trained, with its base if it has one."""
        return lora.combine(self.base, state[self.role].params)

    def step(self, state: State, step: int) -> tuple[State, StepOutput]:
        """Take one optimiser step."""
        microbatches = sharding.shard_batch(self.data.prefetch.get(step), self.mesh)
        self.phases.mark("data", microbatches)
        parts = self.parts(state, microbatches)
        observation = self.observe(state, step, parts)
        trained, metrics = self.update(state[self.role], parts, self.base)
        self.phases.mark("update", trained)
        output = StepOutput(
            metrics=metrics,
            details=functools.partial(self.details, step, observation),
            batch=functools.partial(self.learned_from, state, step),
        )
        return {**state, self.role: trained}, output

    def parts(self, state: State, microbatches: list[Any]) -> list[Any]:
        """Return what the loss takes for each microbatch: by default, the microbatch."""
        return microbatches

    def learned_from(self, state: State, step: int) -> dict[str, np.ndarray]:
        """Return the arrays from which the loss of a step can be computed again.

        It is called after later steps, which have donated the trained role's part of the state.
        """
        return self.data.batches.get(step)

    def observe(self, state: State, step: int, parts: list[Any]) -> Any:
        """Return what `details` needs of the state before the step; nothing by default."""
        return None

    def details(self, step: int, observation: Any) -> StepDetails:
        """Return a sample of the step's batch, if it is time for one."""
        raise NotImplementedError

    def finalise(self, state: State) -> State:
        """Return the state to save after the last step: by default, as it is."""
        return state

    def evaluate_midway(self, state: State) -> None:
        """Return nothing: such a stage is evaluated at the end only."""
        return None

    def programs(self) -> Iterable[Program]:
        """Yield the two programs of a step; the largest microbatch stands for all."""
        microbatches = self.longest_microbatches()
        microbatch = sharding.abstract_batch(microbatches[0], self.mesh)
        (part,) = self.parts(self.abstract_state, [microbatch])
        state = self.abstract_state[self.role]
        base = self.abstract_base
        total = abstract_total(self.update.accumulate, state.params, part, self.mesh, base)
        yield Program(
            name="gradient",
            calls=len(microbatches),
            function=self.update.accumulate.add,
            arguments=(total, state.params, part, base),
        )
        yield Program(
            name="optimiser step",
            calls=1,
            function=self.update.update,
            arguments=(state, total),
        )

    def resident(self) -> dict[str, Any]:
        """Return the shapes of the training state, and of the base if there is one."""
        resident = {"state": self.abstract_state[self.role]}
        return resident if self.abstract_base is None else resident | {"base": self.abstract_base}
