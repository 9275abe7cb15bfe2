"""The compiled functions of PPO: sampling, reading, and the updates of policy and value.

Frozen parameters are arguments of the compiled functions: closed over, they would become
constants of the executable.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax.algorithms import experience, lm, losses, optimisation, plugins
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.endings import Ending
from alignjax.algorithms.experience import (
    Experience,
    Reading,
    ResponseMicrobatch,
    ScoredRollout,
    select_targets,
)
from alignjax.algorithms.optimisation import Accumulate, GradientSum, TrainState
from alignjax.algorithms.stage import Loops, Program, State
from alignjax.algorithms.supervised import abstract_total
from alignjax.config import Config, Model
from alignjax.data import packing
from alignjax.machine import sharding
from alignjax.models import scoring, transformer
from alignjax.models.attention import decode_attention
from alignjax.sampling import rollout as default_sampler
from alignjax.sampling.external import ExternalSampler
from alignjax.sampling.slots import plan_slots
from alignjax.sampling.types import Prompts, Rollout, SamplingSettings

Mesh = jax.sharding.Mesh
Metrics = dict[str, jax.Array]
LearningPart = tuple[Experience, ResponseMicrobatch]

HEADS = {"policy": "lm", "value": "scalar"}  # of the trained roles


def policy_loss_fn(config: Config, params: dict, part: LearningPart) -> tuple[jax.Array, Metrics]:
    """Return the clipped objective of a microbatch of experience, and its metrics."""
    batch = select_targets(*part)
    logprobs, _ = scoring.token_logprobs(
        config.model, params, batch.packed, batch.targets, config.ppo.temperature
    )
    return losses.policy_loss(
        logprobs, batch.old_logprobs, batch.advantages, batch.weights, config.ppo.clip
    )


def value_loss_fn(config: Config, params: dict, part: LearningPart) -> tuple[jax.Array, Metrics]:
    """Return the clipped value loss of a microbatch of experience, and its metrics."""
    batch = select_targets(*part)
    values = scoring.token_values(config.model, params, batch.packed, batch.targets)
    return losses.value_loss(
        values, batch.old_values, batch.returns, batch.weights, config.ppo.value_clip
    )


def update_policy(
    config: Config,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    total: GradientSum,
    pretraining: GradientSum | None,
) -> tuple[TrainState, Metrics]:
    """Take one optimiser step by the clipped objective, plus the pretraining gradient if any.

    The step is skipped if either is not finite.
    """
    gradient = total.gradient
    metrics = {**total.metrics, "policy/grad_norm": optax.tree.norm(gradient)}
    if pretraining is not None:
        coefficient = config.ppo.pretrain_coef
        added = jax.tree.map(lambda x: coefficient * x, pretraining.gradient)
        metrics["loss/pretrain_avg"] = pretraining.metrics["loss"]
        metrics["pretrain/grad_norm"] = optax.tree.norm(added)
        gradient = jax.tree.map(jnp.add, gradient, added)
    state, skipped = optimisation.apply_gradients(optimiser, state, gradient, metrics)
    if pretraining is not None:
        ratio = metrics["pretrain/grad_norm"] / metrics["policy/grad_norm"]
        metrics["pretrain/grad_norm_ratio"] = ratio
    return state, {**metrics, "policy/skipped": skipped}


@jax.jit
def average_metrics(updates: list[Metrics]) -> Metrics:
    """Return each metric's mean over the updates that have it."""
    averages = {}
    for name in dict.fromkeys(name for metrics in updates for name in metrics):
        values = [metrics[name] for metrics in updates if name in metrics]
        averages[name] = sum(values) / len(values)
    return averages


@dataclass(frozen=True, kw_only=True)
class TrainedRoles:
    """The optimisers of policy and value, and the shapes of the training state."""

    policy_optimiser: optax.GradientTransformation
    value_optimiser: optax.GradientTransformation
    policy_schedule: optax.Schedule  # updates of the policy -> learning rate
    abstract_state: State


def trained_roles(config: Config, mesh: Mesh) -> TrainedRoles:
    """Return the optimisers of a run, whose schedules end with its last update."""
    ppo = config.ppo
    value_updates = config.steps * ppo.epochs * ppo.minibatches
    policy_updates = max(value_updates - ppo.value_warmup_steps, 1)
    policy_optimiser = optimisation.make_optimiser(config.optimiser, policy_updates)
    value_optimiser = optimisation.make_optimiser(config.value_optimiser, value_updates)
    abstract_state = {
        "policy": optimisation.abstract_state(config.model, "lm", policy_optimiser, mesh),
        "value": optimisation.abstract_state(config.model, "scalar", value_optimiser, mesh),
        "stats": sharding.abstract(jax.eval_shape(RunningStats.zero), mesh),
    }
    return TrainedRoles(
        policy_optimiser=policy_optimiser,
        value_optimiser=value_optimiser,
        policy_schedule=optimisation.learning_rate_schedule(config.optimiser, policy_updates),
        abstract_state=abstract_state,
    )


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled functions of a run."""

    sample: Callable[[dict, Prompts, jax.Array], Rollout]
    # policy parameters -> the same in the layout and type that `sample` takes
    place_params: Callable[[dict], dict]
    # rollout -> the same in the layout of training
    place_rollout: Callable[[Rollout], Rollout]
    # roles' parameters, rollout, reading (donated), microbatch -> reading
    read: Callable[[dict, Rollout, Reading, ResponseMicrobatch], Reading]
    make_experience: Callable[[RunningStats, Rollout, Reading], ScoredRollout]
    policy_gradient: Accumulate  # of a LearningPart
    value_gradient: Accumulate  # of a LearningPart
    text_gradient: Accumulate  # of a TextMicrobatch
    update_policy: Callable[..., tuple[TrainState, Metrics]]
    update_value: Callable[..., tuple[TrainState, Metrics]]
    text_loss: Callable[..., tuple[jax.Array, Metrics]]
    learning_rate: Callable[[jax.Array], jax.Array]  # of the policy, by its updates


def rollout_mesh(config: Config, mesh: Mesh) -> Mesh:
    """Return the mesh that a rollout runs on: its own if the config says so."""
    return sharding.with_tensor(mesh, config.ppo.rollout_tensor)


def sampling_settings(config: Config, end_tokens: tuple[int, ...]) -> SamplingSettings:
    """Return how a run samples."""
    ppo = config.ppo
    return SamplingSettings(
        model=dataclasses.replace(config.model),  # the config may change, static arguments must not
        samples_per_prompt=ppo.samples_per_prompt,
        response_length=ppo.response_length,
        temperature=ppo.temperature,
        top_p=ppo.top_p,
        end_tokens=end_tokens,
        slots=ppo.slots,
        cache_dtype=ppo.cache_dtype,
    )


def make_sampler(
    config: Config, mesh: Mesh, settings: SamplingSettings
) -> Callable[[dict, Prompts, jax.Array], Rollout]:
    """Return the sampler that `ppo.sampler` names, or ours, compiled, if it names none."""
    spec = config.ppo.sampler
    if not spec:
        return jax.jit(functools.partial(default_sampler.generate, settings=settings))
    function = plugins.load_function("ppo.sampler", spec)
    return ExternalSampler(spec=spec, function=function, settings=settings, mesh=mesh)


def compile_programs(
    config: Config,
    mesh: Mesh,
    trained: TrainedRoles,
    *,
    end_tokens: tuple[int, ...],
    reward_model: Model | None = None,
    ending: Ending = None,
) -> Programs:
    """Return the compiled functions of a run on a mesh.

    Args:
      config: of the run.
      mesh: of training; a rollout may have a layout of its own on the same devices.
      trained: optimisers, and the shapes that the updates keep the state in.
      end_tokens: each of them ends a response.
      reward_model: architecture of the reward model, if it is not `config.model`.
      ending: of what the reward model reads.
    """
    abstract = trained.abstract_state
    stats_layout = jax.tree.map(lambda x: x.sharding, abstract["stats"])
    text_loss = functools.partial(lm.loss_fn, config.model)
    read = functools.partial(
        experience.read_roles, config, reward_model or config.model, ending=ending
    )
    return Programs(
        sample=make_sampler(config, mesh, sampling_settings(config, end_tokens)),
        place_params=params_placement(config, mesh, abstract["policy"].params),
        place_rollout=rollout_placement(config, mesh),
        read=jax.jit(read, donate_argnums=2),
        make_experience=jax.jit(
            functools.partial(experience.make_experience, config),
            out_shardings=ScoredRollout(
                experience=None, stats=stats_layout, metrics=None, responses=None
            ),
        ),
        policy_gradient=optimisation.compile_accumulate(functools.partial(policy_loss_fn, config)),
        value_gradient=optimisation.compile_accumulate(functools.partial(value_loss_fn, config)),
        text_gradient=optimisation.compile_accumulate(text_loss),
        update_policy=optimisation.compile_update(
            functools.partial(update_policy, config, trained.policy_optimiser), abstract["policy"]
        ),
        update_value=optimisation.compile_update(
            functools.partial(optimisation.update_state, trained.value_optimiser),
            abstract["value"],
        ),
        text_loss=jax.jit(text_loss),
        learning_rate=jax.jit(trained.policy_schedule),
    )


def params_placement(config: Config, mesh: Mesh, abstract_params: dict) -> Callable[[dict], dict]:
    """Return the function that casts and lays out the policy's parameters for a rollout.

    Decoding reads every matrix for every token: half of the bytes if they are cast once before,
    no transfers over fsdp if they are laid out anew, and fewer products if they are joined.
    """
    has_own_layout = config.ppo.rollout_tensor > 0
    joins = transformer.joins_products()
    if not (has_own_layout or joins) and config.model.dtype == "float32":
        return unchanged
    place = functools.partial(transformer.for_sampling, config.model)
    layout = None
    if has_own_layout or joins:
        shapes = jax.eval_shape(place, abstract_params)
        layout = sharding.param_shardings(shapes, rollout_mesh(config, mesh))
    return jax.jit(place, out_shardings=layout)


def rollout_placement(config: Config, mesh: Mesh) -> Callable[[Rollout], Rollout]:
    """Return the function that lays out a rollout for training."""
    if not config.ppo.rollout_tensor:
        return unchanged
    responses = config.data.batch * config.ppo.samples_per_prompt
    return jax.jit(unchanged, out_shardings=sharding.row_layout((responses,), mesh))


def unchanged(x: Any) -> Any:
    """Return x."""
    return x


class PlannedPrograms:
    """The programs of a step of PPO with their shapes, every example as long as it may be.

    The largest microbatch stands for all of them.
    """

    def __init__(
        self, config: Config, mesh: Mesh, programs: Programs, state: State, resident: dict
    ):
        ppo = config.ppo
        data = config.data
        self.config = config
        self.mesh = mesh
        self.compiled = programs
        self.state = state
        self.responses = data.batch * ppo.samples_per_prompt
        self.updates = ppo.epochs * ppo.minibatches
        self.params = {
            role: part.params if role in state else part
            for role, part in resident.items()
            if role != "experience"
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
            arguments=(self.state["stats"], self.rollout, self.reading),
        )
        yield from self.value_programs()
        yield from self.policy_programs()

    def rollout_programs(self) -> Iterable[Program]:
        """Yield the program that casts and lays out the policy, if any, and the rollout."""
        mesh = rollout_mesh(self.config, self.mesh)
        params = self.state["policy"].params
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
        total = abstract_total(self.compiled.value_gradient, value.params, part, self.mesh)
        yield Program(
            name="value gradient",
            calls=len(self.microbatches) * self.updates,
            function=self.compiled.value_gradient,
            arguments=(total, value.params, part),
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
        total = abstract_total(self.compiled.policy_gradient, policy.params, part, self.mesh)
        yield Program(
            name="policy gradient",
            calls=len(self.microbatches) * self.updates,
            function=self.compiled.policy_gradient,
            arguments=(total, policy.params, part),
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
            text_total = abstract_total(text_gradient, policy.params, text, self.mesh)
            yield Program(
                name="pretraining gradient",
                calls=len(texts) * self.updates,
                function=text_gradient,
                arguments=(text_total, policy.params, text),
                beside=(total,),
            )
        yield Program(
            name="policy step",
            calls=self.updates,
            function=self.compiled.update_policy,
            arguments=(policy, total, text_total),
        )


def pretraining_rows(config: Config) -> int:
    """Return how many windows of text the pretraining gradient of an update reads."""
    minibatch = config.data.batch * config.ppo.samples_per_prompt // config.ppo.minibatches
    return int(config.ppo.pretrain_ratio * minibatch)


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
        logprobs=tokens, entropy=tokens, ref_logprobs=tokens, values=tokens, scores=tokens[:, 0]
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
