"""What a step of PPO compiles, and what stays in device memory, as shapes."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from alignjax import config as configs
from alignjax.algorithms import experience, lm
from alignjax.algorithms.experience import Experience, Reading, ResponseMicrobatch
from alignjax.algorithms.lm import TextMicrobatch
from alignjax.algorithms.optimisation import Accumulate, GradientSum, TrainState
from alignjax.algorithms.ppo_data import PretrainingText, PromptData, pretraining_rows
from alignjax.algorithms.ppo_programs import (
    Programs,
    TrainedRoles,
    head_of,
)
from alignjax.algorithms.responding import rollout_mesh, unchanged
from alignjax.algorithms.rewards import planned_readers
from alignjax.algorithms.stage import Loops, Program
from alignjax.algorithms.supervised import abstract_total, distinct_shapes
from alignjax.config import Config, reward_table
from alignjax.data import ladders, packing
from alignjax.data.ladders import Rungs
from alignjax.machine import sharding
from alignjax.models import lora
from alignjax.models.attention import decode_attention
from alignjax.sampling.slots import plan_slots
from alignjax.sampling.types import Prompts, Rollout
from alignjax.weights import roles

Mesh = jax.sharding.Mesh

READS_RESPONSES = ("scoring", "policy gradient", "value gradient")  # programs for each shape


@dataclass(frozen=True, kw_only=True)
class StepShapes:
    """The shapes of what the programs of a step read, each on the mesh and once."""

    prompts: list[Prompts]
    microbatches: list[ResponseMicrobatch]
    texts: list[TextMicrobatch]  # of the pretraining gradient
    microbatch_count: int = 1  # microbatches of a minibatch
    text_count: int = 1  # microbatches of an update's text


def longest_shapes(config: Config, mesh: Mesh) -> StepShapes:
    """Return the shapes if every example is as long as it may be.

    The largest microbatch stands for all of them.
    """
    row_shards = sharding.row_shards(mesh)
    responses = config.data.batch * config.ppo.samples_per_prompt
    microbatches = experience.pack_minibatch(
        config,
        np.full(responses, config.data.max_length, np.int32),
        np.full(responses, config.ppo.response_length, np.int32),
        np.arange(responses)[:: config.ppo.minibatches],
        row_shards,
    )
    texts = []
    if config.ppo.pretrain_coef:
        rows = lm.longest_rows(pretraining_rows(config), experience.longest_sequence(config))
        texts = lm.pack_minibatch(rows, config.microbatch_tokens, row_shards)
    width = packing.width_of(config.data.max_length, config.data.max_length)
    return StepShapes(
        prompts=[abstract_prompts(config, rollout_mesh(config, mesh), width)],
        microbatches=[sharding.abstract_batch(microbatches[0], mesh)],
        texts=[sharding.abstract_batch(text, mesh) for text in texts[:1]],
        microbatch_count=len(microbatches),
        text_count=len(texts),
    )


def known_shapes(
    config: Config, mesh: Mesh, prompts: PromptData, text: PretrainingText, ladder: Rungs
) -> StepShapes:
    """Return the shapes of a run: those of its first prompts and texts, and all of its ladder."""
    shards = sharding.row_shards(mesh)
    updates_of_step = config.ppo.epochs * config.ppo.minibatches
    first_update = config.ppo.value_warmup_steps
    last_update = min(updates_of_step * config.steps, first_update + ladders.MOST_BATCHES)
    texts = []
    if text.prefetch is not None:
        for update in range(first_update, last_update):
            texts += text.prefetch.make(update)
    steps = range(min(config.steps, ladders.MOST_BATCHES))
    widths = {prompts.prefetch.make(step)["prompts"].shape[1] for step in steps}
    sampling_mesh = rollout_mesh(config, mesh)
    microbatches = [experience.empty_microbatch(config, shape, shards) for shape in ladder.shapes]
    return StepShapes(
        prompts=[abstract_prompts(config, sampling_mesh, width) for width in sorted(widths)],
        microbatches=[sharding.abstract_batch(part, mesh) for part in microbatches],
        texts=distinct_shapes(texts, mesh),
    )


class PlannedPrograms:
    """The programs of a step of PPO with their shapes."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        programs: Programs,
        trained: TrainedRoles,
        *,
        params: dict[str, dict],
        learned: Experience,
        shapes: StepShapes,
    ):
        """Take the shapes of all roles' parameters, of the experience, and of what is read."""
        self.config = config
        self.mesh = mesh
        self.compiled = programs
        self.state = trained.abstract_state
        self.bases = trained.abstract_bases
        self.updates = config.ppo.epochs * config.ppo.minibatches
        self.params = params
        self.rollout = learned.rollout
        self.reading = abstract_reading(config, mesh)
        self.experience = learned
        self.shapes = shapes
        self.totals: dict[str, GradientSum] = {}  # of each role

    def programs(self) -> Iterable[Program]:
        """Yield the programs in the order of a step."""
        if not self.config.ppo.sampler:  # another sampler is not compiled by us
            yield from self.rollout_programs()
        for microbatch in self.shapes.microbatches:
            yield Program(
                name="scoring",
                calls=self.shapes.microbatch_count * self.config.ppo.minibatches,
                function=self.compiled.read,
                arguments=(self.params, self.rollout, self.reading, microbatch),
            )
        yield Program(
            name="experience",
            calls=1,
            function=self.compiled.make_experience,
            arguments=(
                self.state["stats"],
                self.state.get("source_stats", {}),
                self.rollout,
                self.reading,
                self.state.get("kl_control"),
            ),
        )
        if "value" in self.state:
            yield from self.value_programs()
        yield from self.policy_programs()

    def rollout_programs(self) -> Iterable[Program]:
        """Yield the program that casts and lays out the policy, if any, and the rollout."""
        responder = self.compiled.responder
        params = self.params["policy"]
        placed = params
        if responder.place_params is not unchanged:
            yield Program(
                name="layout of the rollout",
                calls=1,
                function=responder.place_params,
                arguments=(params,),
            )
            shapes = jax.eval_shape(responder.place_params, params)
            placed = sharding.abstract(shapes, responder.mesh)
        for prompts in self.shapes.prompts:
            yield Program(
                name="rollout",
                calls=1,
                function=responder.sample,
                arguments=(placed, prompts, abstract_key(responder.mesh)),
                loops=rollout_loops(self.config),
                mesh=responder.mesh,
            )

    def value_programs(self) -> Iterable[Program]:
        """Yield the programs of an update of the value model."""
        value = self.state["value"]
        gradient = self.compiled.value_gradient
        yield from self.gradient_programs("value", gradient)
        yield Program(
            name="value step",
            calls=self.updates,
            function=self.compiled.update_value,
            arguments=(value, self.total("value", gradient)),
        )

    def gradient_programs(self, role: str, gradient: Accumulate) -> Iterable[Program]:
        """Yield a role's gradient for each shape of a microbatch."""
        params = self.state[role].params
        total = self.total(role, gradient)
        for microbatch in self.shapes.microbatches:
            yield Program(
                name=f"{role} gradient",
                calls=self.shapes.microbatch_count * self.updates,
                function=gradient.add,
                arguments=(total, params, (self.experience, microbatch), self.bases[role]),
            )

    def total(self, role: str, gradient: Accumulate) -> GradientSum:
        """Return the shapes of a role's gradient over a minibatch."""
        if role not in self.totals:
            part = (self.experience, self.shapes.microbatches[0])
            params = self.state[role].params
            base = self.bases[role]
            self.totals[role] = abstract_total(gradient, params, part, self.mesh, base)
        return self.totals[role]

    def policy_programs(self) -> Iterable[Program]:
        """Yield the programs of an update of the policy, with the pretraining gradient if any."""
        policy = self.state["policy"]
        base = self.bases["policy"]
        yield from self.gradient_programs("policy", self.compiled.policy_gradient)
        total = self.total("policy", self.compiled.policy_gradient)
        text_total = None
        for text in self.shapes.texts:
            text_gradient = self.compiled.text_gradient
            text_total = abstract_total(text_gradient, policy.params, text, self.mesh, base)
            yield Program(
                name="pretraining gradient",
                calls=self.shapes.text_count * self.updates,
                function=text_gradient.add,
                arguments=(text_total, policy.params, text, base),
                beside=(total,),
            )
        yield Program(
            name="policy step",
            calls=self.updates,
            function=self.compiled.update_policy,
            arguments=(policy, total, text_total),
        )


def abstract_prompts(config: Config, mesh: Mesh, width: int) -> Prompts:
    """Return the shapes of a batch of prompts of this width."""
    count = config.data.batch
    prompts = Prompts(
        tokens=np.zeros((count, width), np.int32),
        lengths=np.zeros(count, np.int32),
        index=np.zeros(count, np.int32),
    )
    return sharding.abstract_batch(prompts, mesh)


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Return the shape of a random key."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def abstract_rollout(config: Config, mesh: Mesh) -> Rollout:
    """Return the shapes of a rollout of the longest prompts, in the layout of training."""
    responses = config.data.batch * config.ppo.samples_per_prompt
    response_length = config.ppo.response_length
    prompt_width = packing.width_of(config.data.max_length, config.data.max_length)
    rollout = Rollout(
        tokens=np.zeros((responses, prompt_width + response_length), np.int32),
        prompt_lengths=np.zeros(responses, np.int32),
        lengths=np.zeros(responses, np.int32),
        logprobs=np.zeros((responses, response_length), np.float32),
        truncated=np.zeros(responses, bool),
    )
    return sharding.abstract_batch(rollout, mesh)


def abstract_reading(config: Config, mesh: Mesh) -> Reading:
    """Return the shapes of the readings of a rollout."""
    responses = config.data.batch * config.ppo.samples_per_prompt
    tokens = np.zeros((responses, config.ppo.response_length), np.float32)
    reading = Reading(
        logprobs=tokens,
        entropy=tokens,
        ref_logprobs=tokens,
        values=tokens if configs.has_value(config) else None,
        scores=dict.fromkeys(reward_table(config), tokens[:, 0]),
    )
    return sharding.abstract_batch(reading, mesh)


def rollout_loops(config: Config) -> Loops:
    """Return how often the loops of a rollout run in which no response ends early, on average."""
    ppo = config.ppo
    prompts = config.data.batch
    plan = plan_slots(prompts, ppo.samples_per_prompt, ppo.slots)
    refills = -(-prompts // plan.prompts_per_fill)
    rounds = -(-prompts * ppo.samples_per_prompt // plan.slots)
    steps = rounds * (ppo.response_length - 1)
    longest = config.data.max_length + ppo.response_length
    filled = (longest - ppo.response_length / 2) / decode_attention.round_up(longest)
    if plan.prompts_per_fill == prompts:
        return Loops(0, steps, filled)
    return Loops(refills, -(-steps // refills), filled)


def trained_shapes(part: TrainState | dict) -> dict:
    """Return the parameters of a role among the resident shapes, without its base."""
    return part.params if isinstance(part, TrainState) else part


def frozen_shapes(config: Config, mesh: Mesh, role: str) -> dict:
    """Return the shapes of a frozen role; with adapters, of those alone: the base is shared."""
    ppo = config.ppo
    shapes = roles.abstract_trained(config.model, head_of(role), mesh, config.lora)
    if config.lora.rank:
        return shapes
    return roles.abstract_frozen(config.model, shapes, ppo.frozen_dtype, ppo.frozen_memory)


def resident_shapes(config: Config, mesh: Mesh, trained: TrainedRoles) -> dict[str, Any]:
    """Return, by name, the shapes of the state, the frozen roles and the experience of a step."""
    shapes = {role: trained.abstract_state[role] for role in configs.trained_roles(config)}
    shapes["reference"] = frozen_shapes(config, mesh, "reference")
    for reader in planned_readers(config):
        shapes[reader.role] = frozen_shapes(config, mesh, reader.role)
    if config.lora.rank:
        shapes["base"] = sharding.distinct_leaves(trained.abstract_bases)
    shapes["experience"] = abstract_experience(config, mesh)
    return shapes


def abstract_experience(config: Config, mesh: Mesh) -> Experience:
    """Return the shapes of the experience of a rollout."""
    reading = abstract_reading(config, mesh)
    tokens = reading.logprobs
    made = Experience(
        rollout=abstract_rollout(config, mesh),
        old_logprobs=tokens,
        advantages=tokens,
        old_values=reading.values,
        returns=reading.values,
    )
    if config.ppo.kl_in == "reward":
        return made
    coefficient = jax.ShapeDtypeStruct((), np.float32, sharding=sharding.replicated(mesh))
    return dataclasses.replace(made, ref_logprobs=tokens, kl_coef=coefficient)


def all_shapes(trained: TrainedRoles, resident: dict[str, Any]) -> dict[str, dict]:
    """Return the shapes of all parameters of each role, from what is resident."""
    return {
        role: lora.combine(base, trained_shapes(resident[role]))
        for role, base in trained.abstract_bases.items()
    }
