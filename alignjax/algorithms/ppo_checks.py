"""Checks of the first rollout: a run stops with the figure that is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignjax.algorithms.endings import rows_with_ending
from alignjax.algorithms.experience import ScoredRollout, TokenReward, TokenRewards
from alignjax.config import Config, Model, UserError, field_of_source
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.sampling.types import Rollout
from alignjax.weights import roles

CHECKED_RESPONSES = 8  # which are scored once more, each alone

# Metric -> what is wrong if it is not finite, what spoils the others first.
CAUSES = {
    "objective/entropy": "the policy's logits are not finite",
    "sampler/drift_max": "the logits that the policy samples from are not finite",
    "objective/kl": "the reference's logits are not finite",
    "objective/scores": "a score is not finite",
    "value/explained_variance": "the value model's values are not finite",
}


def causes(config: Config) -> dict[str, str]:
    """Return {metric: what is wrong if it is not finite}, what spoils the others first."""
    sources = {
        f"objective/rewards/{name}": f"a score of {field_of_source(config, name)} is not finite"
        for name in config.ppo.rewards
    }
    return sources | CAUSES


def check_first_rollout(
    config: Config,
    first_metrics: dict[str, jax.Array],
    readers: TokenRewards,
    params: dict[str, dict],
    scored: ScoredRollout,
) -> None:
    """Check ratio, KL and packing before the first update.

    All logits are finite; the ratio is 1; the KL to the reference is 0 if the policy starts there;
    and a response scores alone as it scored among its neighbours.

    Args:
      config: of the run.
      first_metrics: of the clipped objective on the first minibatch.
      reward_model: architecture of the reward model.
      params: of all roles.
      scored: the rollout.
      texts: the text-based rewards, if there are any.
      ending: of what the reward model reads.

    Raises:
      UserError: with the figure that is not as it must be.
    """
    check_finite(config, scored)
    check_ratio(config, first_metrics)
    if config.parents["policy"] == config.parents["reference"]:
        largest = jnp.abs(scored.responses["kl"]).max()
        scoring.self_check(
            "the largest KL of a response to the reference", largest, config.model.dtype
        )
    for reader in readers:
        check_scores(config, reader, params[reader.role], scored)


def check_finite(config: Config, scored: ScoredRollout) -> None:
    """Check that the logits of policy and reference are finite.

    Parameters that are not finite cannot be loaded, so the computation overflows. A score that is
    not finite is reported elsewhere: the rollout is skipped.
    """
    for name in ("objective/entropy", "objective/kl"):
        if not np.isfinite(float(scored.metrics[name])):
            raise UserError(
                f"self-check at step 0: {CAUSES[name]}: they overflow in model.dtype="
                f"{config.model.dtype!r}; stopped"
            )


def check_ratio(config: Config, metrics: dict[str, jax.Array]) -> None:
    """Check that the ratio of new to old probabilities is 1 on the first minibatch."""
    deviation = abs(metrics["val/ratio"] - 1) + metrics["val/ratio_var"]
    scoring.self_check("|ratio - 1| of the policy", deviation, config.model.dtype)


def check_scores(config: Config, reader: TokenReward, params: dict, scored: ScoredRollout) -> None:
    """Check that some responses score alone as they scored packed with others."""
    score = jax.jit(functools.partial(score_alone, reader.model))
    rollout = jax.tree.map(lambda x: x[:CHECKED_RESPONSES], scored.experience.rollout)
    lengths = rollout.prompt_lengths + rollout.lengths
    tokens = left_aligned(rollout)
    if reader.ending is not None:
        tokens = rows_with_ending(tokens, lengths, rollout.truncated, reader.ending)
        lengths = lengths - 1 + len(reader.ending)
    alone = score(params, tokens, lengths)
    changes = sharding.on_host(alone - scored.scores[reader.name][:CHECKED_RESPONSES])
    scoring.check_packing("score", changes, reader.model)


def score_alone(
    model: Model, params: dict, tokens: jax.Array, lengths: jax.Array
) -> Float[Array, " responses"]:
    """Score sequences alone by parameters that may be kept in host memory."""
    return scoring.score_alone(model, roles.on_device(params), tokens, lengths)


def left_aligned(rollout: Rollout) -> jax.Array:
    """Return the rows of a rollout with the pads before the prompt moved to the end."""
    width = rollout.tokens.shape[1]
    prompt_width = width - rollout.logprobs.shape[1]
    start = (prompt_width - rollout.prompt_lengths)[:, None]
    return jnp.take_along_axis(rollout.tokens, (jnp.arange(width) + start) % width, axis=1)
