"""What the stages with one model and one loss share: state, step, programs."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Self

import jax
import numpy as np

from alignjax.algorithms import optimisation
from alignjax.algorithms.optimisation import LossFunction, MinibatchUpdate
from alignjax.algorithms.stage import Program, RunInputs, State, StepDetails, StepOutput
from alignjax.config import Config
from alignjax.data import ladders
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


def distinct_shapes(microbatches: Iterable[Any], mesh: Mesh) -> list[Any]:
    """Return the shapes of microbatches on the mesh, each once."""
    shapes = {}
    for microbatch in microbatches:
        name = tuple(array.shape for array in jax.tree.leaves(microbatch))
        if name not in shapes:
            shapes[name] = sharding.abstract_batch(microbatch, mesh)
    return list(shapes.values())


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
        largest = sharding.abstract_batch(microbatches[0], self.mesh)
        yield from self.step_programs([largest], len(microbatches))

    def step_programs(self, microbatches: list[Any], calls: int) -> Iterable[Program]:
        """Yield the programs of a step: the gradient of each shape, and the optimiser step."""
        state = self.abstract_state[self.role]
        base = self.abstract_base
        accumulate = self.update.accumulate
        parts = self.parts(self.abstract_state, microbatches)
        total = abstract_total(accumulate, state.params, parts[0], self.mesh, base)
        for part in parts:
            yield Program(
                name="gradient",
                calls=calls,
                function=accumulate.add,
                arguments=(total, state.params, part, base),
            )
        yield Program(
            name="optimiser step",
            calls=1,
            function=self.update.update,
            arguments=(state, total),
        )

    def programs_ahead(self) -> Iterable[Program]:
        """Yield the programs of the first steps, whose examples are known, and of evaluation."""
        steps = range(min(self.num_steps, ladders.sample_size(self.config.data.batch)))
        packed = [self.data.prefetch.make(step) for step in steps]
        microbatches = distinct_shapes(itertools.chain(*packed), self.mesh)
        yield from self.step_programs(microbatches, 1)
        params = lora.combine(self.abstract_base, self.abstract_state[self.role].params)
        sampled = [packed[step][0] for step in steps if step % self.config.sample_every == 0]
        for microbatch in distinct_shapes(self.evaluated_microbatches(sampled), self.mesh):
            yield Program(
                name="evaluation",
                calls=1,
                function=self.evaluation_program,
                arguments=(params, microbatch),
            )

    @property
    def evaluation_program(self) -> Callable[[dict, Any], Any]:
        """Return the compiled function of parameters and a microbatch that evaluates."""
        raise NotImplementedError

    def evaluated_microbatches(self, sampled: list[Any]) -> Iterable[Any]:
        """Yield microbatches that the evaluation program reads, none by default.

        `sampled` are those of which the steps make a sample.
        """
        return []

    def resident(self) -> dict[str, Any]:
        """Return the shapes of the training state, and of the base if there is one."""
        resident = {"state": self.abstract_state[self.role]}
        return resident if self.abstract_base is None else resident | {"base": self.abstract_base}
