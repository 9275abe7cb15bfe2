"""What a step of PPO compiles, and what stays in device memory, as shapes."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from alignjax import config as configs
from alignjax.algorithms import experience, lm
from alignjax.algorithms.experience import Experience, Reading, ResponseMicrobatch
from alignjax.algorithms.optimisation import TrainState
from alignjax.algorithms.ppo_data import pretraining_rows
from alignjax.algorithms.ppo_programs import (
    ROLE_HEADS,
    Programs,
    TrainedRoles,
    rollout_mesh,
    unchanged,
)
from alignjax.algorithms.stage import Loops, Program
from alignjax.algorithms.supervised import abstract_total
from alignjax.config import Config
from alignjax.data import packing
from alignjax.machine import sharding
from alignjax.models import lora
from alignjax.models.attention import decode_attention
from alignjax.sampling.slots import plan_slots
from alignjax.sampling.types import Prompts, Rollout
from alignjax.weights import roles

Mesh = jax.sharding.Mesh


class PlannedPrograms:
    """The programs of a step of PPO with their shapes, every example as long as it may be.

    The largest microbatch stands for all of them.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        programs: Programs,
        trained: TrainedRoles,
        resident: dict[str, Any],
    ):
        ppo = config.ppo
        data = config.data
        self.config = config
        self.mesh = mesh
        self.compiled = programs
        self.state = trained.abstract_state
        self.bases = trained.abstract_bases
        self.responses = data.batch * ppo.samples_per_prompt
        self.updates = ppo.epochs * ppo.minibatches
        self.params = {
            role: lora.combine(base, trained_shapes(resident[role]))
            for role, base in self.bases.items()
        }
        self.rollout = abstract_rollout(config, mesh)
        self.reading = abstract_reading(config, mesh)
        self.experience = resident["experience"]
        self.microbatches = self.pack_first_minibatch()
        self.microbatch = sharding.abstract_batch(self.microbatches[0], mesh)

    def pack_first_minibatch(self) -> list[ResponseMicrobatch]:
        """Return the microbatches of a minibatch of the longest prompts and responses."""
        lengths = np.full(self.responses, self.config.ppo.response_length, np.int32)
        prompt_lengths = np.full(self.responses, self.config.data.max_length, np.int32)
        first = np.arange(self.responses)[:: self.config.ppo.minibatches]
        return experience.pack_minibatch(
            self.config, prompt_lengths, lengths, first, sharding.row_shards(self.mesh)
        )

    def programs(self) -> Iterable[Program]:
        """Yield the programs in the order of a step."""
        if not self.config.ppo.sampler:  # another sampler is not compiled by us
            yield from self.rollout_programs()
        minibatches = self.config.ppo.minibatches
        scorer_arguments = (self.params, self.rollout, self.reading, self.microbatch)
        yield Program(
            name="scoring",
            calls=len(self.microbatches) * minibatches,
            function=self.compiled.read,
            arguments=scorer_arguments,
        )
        yield Program(
            name="experience",
            calls=1,
            function=self.compiled.make_experience,
            arguments=(
                self.state["stats"],
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
        mesh = rollout_mesh(self.config, self.mesh)
        params = self.params["policy"]
        placed = params
        if self.compiled.place_params is not unchanged:
            yield Program(
                name="layout of the rollout",
                calls=1,
                function=self.compiled.place_params,
                arguments=(params,),
            )
            shapes = jax.eval_shape(self.compiled.place_params, params)
            placed = sharding.abstract(shapes, mesh)
        yield Program(
            name="rollout",
            calls=1,
            function=self.compiled.sample,
            arguments=(placed, abstract_prompts(self.config, mesh), abstract_key(mesh)),
            loops=rollout_loops(self.config),
            mesh=mesh,
        )

    def value_programs(self) -> Iterable[Program]:
        """Yield the programs of an update of the value model."""
        value = self.state["value"]
        part = (self.experience, self.microbatch)
        base = self.bases["value"]
        total = abstract_total(self.compiled.value_gradient, value.params, part, self.mesh, base)
        yield Program(
            name="value gradient",
            calls=len(self.microbatches) * self.updates,
            function=self.compiled.value_gradient.add,
            arguments=(total, value.params, part, base),
        )
        yield Program(
            name="value step",
            calls=self.updates,
            function=self.compiled.update_value,
            arguments=(value, total),
        )

    def policy_programs(self) -> Iterable[Program]:
        """Yield the programs of an update of the policy, with the pretraining gradient if any."""
        policy = self.state["policy"]
        part = (self.experience, self.microbatch)
        base = self.bases["policy"]
        total = abstract_total(self.compiled.policy_gradient, policy.params, part, self.mesh, base)
        yield Program(
            name="policy gradient",
            calls=len(self.microbatches) * self.updates,
            function=self.compiled.policy_gradient.add,
            arguments=(total, policy.params, part, base),
        )
        text_total = None
        if self.config.ppo.pretrain_coef:
            longest = experience.longest_sequence(self.config)
            texts = lm.pack_minibatch(
                lm.longest_rows(pretraining_rows(self.config), longest),
                self.config.microbatch_tokens,
                sharding.row_shards(self.mesh),
            )
            text = sharding.abstract_batch(texts[0], self.mesh)
            text_gradient = self.compiled.text_gradient
            text_total = abstract_total(text_gradient, policy.params, text, self.mesh, base)
            yield Program(
                name="pretraining gradient",
                calls=len(texts) * self.updates,
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


def abstract_prompts(config: Config, mesh: Mesh) -> Prompts:
    """Return the shapes of a batch of the longest prompts."""
    count = config.data.batch
    longest = config.data.max_length
    width = packing.width_of(longest, longest)
    prompts = Prompts(
        tokens=np.zeros((count, width), np.int32),
        lengths=np.full(count, longest, np.int32),
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
        scores=tokens[:, 0],
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
    shapes = roles.abstract_trained(config.model, ROLE_HEADS[role], mesh, config.lora)
    if config.lora.rank:
        return shapes
    return roles.abstract_frozen(config.model, shapes, ppo.frozen_dtype, ppo.frozen_memory)


def distinct_leaves(tree: Any) -> list[jax.ShapeDtypeStruct]:
    """Return the leaves of a tree, those that are one object once."""
    return list({id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def resident_shapes(config: Config, mesh: Mesh, trained: TrainedRoles) -> dict[str, Any]:
    """Return, by name, the shapes of the state, the frozen roles and the experience of a step."""
    shapes = {role: trained.abstract_state[role] for role in configs.trained_roles(config)}
    shapes["reference"] = frozen_shapes(config, mesh, "reference")
    if "reward" in config.parents:  # its architecture is taken to be that of the others
        shapes["reward"] = frozen_shapes(config, mesh, "reward")
    if config.lora.rank:
        shapes["base"] = distinct_leaves(trained.abstract_bases)
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
