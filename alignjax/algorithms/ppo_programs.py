"""The compiled functions of PPO: sampling, reading, and the updates of policy and value.

Frozen parameters are arguments of the compiled functions: closed over, they would become
constants of the executable.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alignjax import config as configs
from alignjax.algorithms import experience, experience_making, lm, losses, optimisation
from alignjax.algorithms.advantages import KLControl, RunningStats
from alignjax.algorithms.experience import (
    Experience,
    Reading,
    ResponseMicrobatch,
    ScoredRollout,
    TokenRewards,
    select_targets,
)
from alignjax.algorithms.optimisation import Accumulate, GradientSum, TrainState
from alignjax.algorithms.responding import Responder, make_responder
from alignjax.algorithms.stage import State
from alignjax.config import Config
from alignjax.machine import sharding
from alignjax.models import lora, scoring
from alignjax.sampling.types import Rollout
from alignjax.weights import bases, roles

Mesh = jax.sharding.Mesh
Metrics = dict[str, jax.Array]
LearningPart = tuple[Experience, ResponseMicrobatch]


def head_of(role: str) -> str:
    """Return the head of a role of PPO."""
    return roles.HEADS["ppo", configs.kind_of_role(role)]


def policy_loss_fn(config: Config, params: dict, part: LearningPart) -> tuple[jax.Array, Metrics]:
    """Return the clipped objective of a microbatch of experience, and its metrics.

    The config may add a KL penalty and an entropy bonus.
    """
    ppo = config.ppo
    batch = select_targets(*part)
    reading = scoring.read_tokens(
        config.model, params, batch.packed, batch.targets, ppo.temperature
    )
    logprobs = reading.logprobs
    loss_weights = losses.token_weights(
        configs.loss_aggregation(config),
        batch.weights,
        batch.lengths,
        config.data.batch * ppo.samples_per_prompt // ppo.minibatches,
        ppo.response_length,
    )
    loss, metrics = losses.policy_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.weights,
        ppo.clip,
        clip_high=ppo.clip_high,
        dual_clip=ppo.dual_clip,
        loss_weights=loss_weights,
    )
    if ppo.kl_in == "loss":
        penalty, kl_metrics = losses.kl_loss(
            logprobs, batch.ref_logprobs, loss_weights, ppo.kl_estimator
        )
        loss += batch.kl_coef * penalty
        metrics |= kl_metrics
    if ppo.entropy_coef:
        bonus, entropy_metrics = losses.entropy_bonus(reading.entropy, batch.weights)
        loss -= ppo.entropy_coef * bonus
        metrics |= entropy_metrics
    return losses.add_load_balancing(
        loss,
        metrics,
        reading.load_balancing,
        batch.weights,
        config.model.load_balancing_coef,
        "loss/load_balancing_avg",
    )


def value_loss_fn(config: Config, params: dict, part: LearningPart) -> tuple[jax.Array, Metrics]:
    """Return the clipped value loss of a microbatch of experience, and its metrics."""
    batch = select_targets(*part)
    reading = scoring.read_values(config.model, params, batch.packed, batch.targets)
    loss, metrics = losses.value_loss(
        reading.values, batch.old_values, batch.returns, batch.weights, config.ppo.value_clip
    )
    return losses.add_load_balancing(
        loss,
        metrics,
        reading.load_balancing,
        batch.weights,
        config.model.load_balancing_coef,
        "loss/value_load_balancing_avg",
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
        # The policy's gradient is 0 if the responses to each prompt have equal scores.
        norm = metrics["policy/grad_norm"]
        ratio = metrics["pretrain/grad_norm"] / jnp.where(norm > 0, norm, 1.0)
        metrics["pretrain/grad_norm_ratio"] = jnp.where(norm > 0, ratio, 0.0)
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
    value_optimiser: optax.GradientTransformation | None  # None: there is no value model
    policy_schedule: optax.Schedule  # updates of the policy -> learning rate
    abstract_state: State
    abstract_bases: dict[str, dict | None]  # beneath adapters; None where there are none


def trained_roles(config: Config, mesh: Mesh) -> TrainedRoles:
    """Return the optimisers of a run, whose schedules end with its last update."""
    ppo = config.ppo
    updates = config.steps * ppo.epochs * ppo.minibatches
    policy_updates = max(updates - configs.value_warmup_steps(config), 1)
    policy_optimiser = optimisation.make_optimiser(config.optimiser, policy_updates)
    abstract_role = functools.partial(abstract_trained_role, config, mesh)
    abstract_state = {
        "policy": abstract_role("policy", policy_optimiser),
        **sharding.abstract(jax.eval_shape(functools.partial(initial_counters, config)), mesh),
    }
    value_optimiser = None
    if configs.has_value(config):
        value_optimiser = optimisation.make_optimiser(config.value_optimiser, updates)
        abstract_state["value"] = abstract_role("value", value_optimiser)
    return TrainedRoles(
        policy_optimiser=policy_optimiser,
        value_optimiser=value_optimiser,
        policy_schedule=optimisation.learning_rate_schedule(config.optimiser, policy_updates),
        abstract_state=abstract_state,
        abstract_bases=abstract_bases(config, mesh),
    )


def abstract_bases(config: Config, mesh: Mesh) -> dict[str, dict | None]:
    """Return the shapes of the base beneath each role; those that share one have one object.

    Without adapters there are none, and each is None. A reward model's architecture is taken to
    be that of the others.
    """
    settings = config.lora
    specs = configs.parent_specs(config)
    wanted = [*configs.trained_roles(config), "reference"]
    wanted += [role for role in specs if configs.is_reward_role(role)]
    if not settings.rank:
        return dict.fromkeys(wanted)
    names = {role: bases.planned_base(specs[role], head_of(role), settings) for role in wanted}
    shared: dict[str, dict] = {}
    for name in names.values():
        sharing = [role for role in wanted if names[role] == name]
        head = "lm" if any(head_of(role) == "lm" for role in sharing) else "scalar"
        shared.setdefault(name, roles.abstract_base(config.model, head, mesh, settings))
    return {
        role: lora.without_head(shared[name]) if head_of(role) == "scalar" else shared[name]
        for role, name in names.items()
    }


def abstract_trained_role(
    config: Config, mesh: Mesh, role: str, optimiser: optax.GradientTransformation
) -> TrainState:
    """Return the shapes of the training state of a role."""
    return optimisation.abstract_state(config.model, head_of(role), optimiser, mesh, config.lora)


def initial_counters(config: Config) -> State:
    """Return the part of a new state that the updates do not change.

    It holds the statistics of scores and, with `ppo.rewards`, those of each of them; and the
    control of the KL penalty's coefficient, if it adapts. Nothing else, so that runs of earlier
    versions can be restored.
    """
    counters: State = {"stats": RunningStats.zero()}
    if config.ppo.rewards:
        counters["source_stats"] = {name: RunningStats.zero() for name in config.ppo.rewards}
    if config.ppo.kl_target:
        counters["kl_control"] = KLControl(jnp.float32(config.ppo.kl_coef))
    return counters


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled functions of a run."""

    responder: Responder
    # roles' parameters, rollout, reading (donated), microbatch -> reading
    read: Callable[[dict, Rollout, Reading, ResponseMicrobatch], Reading]
    # statistics of scores, those of each source, rollout, reading, and the control of the KL
    # penalty if there is one
    make_experience: Callable[..., ScoredRollout]
    policy_gradient: Accumulate  # of a LearningPart
    value_gradient: Accumulate | None  # of a LearningPart; None: there is no value model
    text_gradient: Accumulate  # of a TextMicrobatch
    update_policy: Callable[..., tuple[TrainState, Metrics]]
    update_value: Callable[..., tuple[TrainState, Metrics]] | None
    text_loss: Callable[..., tuple[jax.Array, Metrics]]
    learning_rate: Callable[[jax.Array], jax.Array]  # of the policy, by its updates


def compile_programs(
    config: Config,
    mesh: Mesh,
    trained: TrainedRoles,
    *,
    end_tokens: tuple[int, ...],
    readers: TokenRewards = (),
) -> Programs:
    """Return the compiled functions of a run on a mesh.

    Args:
      config: of the run.
      mesh: of training; a rollout may have a layout of its own on the same devices.
      trained: optimisers, and the shapes that the updates keep the state in.
      end_tokens: each of them ends a response.
      readers: the reward models that read the policy's tokens.
    """
    abstract = trained.abstract_state
    layout = sharding_of(abstract["stats"])
    control_layout = sharding_of(abstract.get("kl_control"))
    policy = abstract["policy"].params
    responses = config.data.batch * config.ppo.samples_per_prompt
    rows = sharding.row_layout((responses,), mesh)
    value_gradient = None
    update_value = None
    if trained.value_optimiser is not None:
        value_loss = functools.partial(value_loss_fn, config)
        value_gradient = Accumulate(value_loss, abstract["value"].params)
        update_value = optimisation.compile_update(
            functools.partial(optimisation.update_state, trained.value_optimiser),
            abstract["value"],
        )
    text_loss = functools.partial(lm.loss_fn, config.model)
    read = functools.partial(experience.read_roles, config, readers)
    return Programs(
        responder=make_responder(
            config,
            mesh,
            lora.combine(trained.abstract_bases["policy"], abstract["policy"].params),
            end_tokens,
        ),
        read=jax.jit(read, donate_argnums=2, out_shardings=rows),
        make_experience=jax.jit(
            functools.partial(experience_making.make_experience, config),
            out_shardings=ScoredRollout(
                experience=Experience(
                    rollout=rows,
                    old_logprobs=rows,
                    advantages=rows,
                    old_values=rows,
                    returns=rows,
                    ref_logprobs=rows,
                    kl_coef=sharding.replicated(mesh),
                ),
                stats=layout,
                source_stats=dict.fromkeys(config.ppo.rewards, layout),
                scores=None,
                kl_control=control_layout,
                metrics=None,
                responses=None,
            ),
        ),
        policy_gradient=Accumulate(functools.partial(policy_loss_fn, config), policy),
        value_gradient=value_gradient,
        text_gradient=Accumulate(text_loss, policy),
        update_policy=optimisation.compile_update(
            functools.partial(update_policy, config, trained.policy_optimiser), abstract["policy"]
        ),
        update_value=update_value,
        text_loss=jax.jit(text_loss),
        learning_rate=jax.jit(trained.policy_schedule),
    )


def sharding_of(abstract: Any) -> Any:
    """Return the shardings of a tree of shapes."""
    return jax.tree.map(lambda x: x.sharding, abstract)
