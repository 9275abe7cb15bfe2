"""From the readings of a rollout to rewards, advantages and returns, and what is logged of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignjax.algorithms import advantages, optimisation
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.estimators import AdvantageInputs, find_estimator
from alignjax.algorithms.experience import Experience, Reading, ScoredRollout
from alignjax.config import Config
from alignjax.sampling.types import Rollout

Metrics = dict[str, jax.Array]


def make_experience(
    config: Config, stats: RunningStats, rollout: Rollout, reading: Reading
) -> ScoredRollout:
    """Turn the readings of a rollout into rewards, advantages and returns.

    If a metric is not finite, advantages and returns become NaN, so every loss is NaN and no
    update is applied: the rollout produces no learning.
    """
    ppo = config.ppo
    mask = rollout.mask
    scores = jnp.where(rollout.truncated, ppo.truncated_score, reading.scores)
    stats = stats.update(scores)
    normalised = advantages.normalise(scores, stats, ppo.normalise_scores)
    rewards = advantages.shape_rewards(
        normalised, reading.logprobs, reading.ref_logprobs, mask, ppo.kl_coef
    )
    estimate = find_estimator(ppo.advantage_estimator)
    estimated = estimate(AdvantageInputs(rewards=rewards, values=reading.values, mask=mask), ppo)
    token_advantages = estimated.advantages
    if ppo.whiten_advantages:
        token_advantages = advantages.whiten(token_advantages, mask)
    log_ratio = jnp.where(mask, reading.logprobs - reading.ref_logprobs, 0.0)
    responses = {
        "score": reading.scores,
        "kl": log_ratio.sum(1),
        "entropy": jnp.where(mask, reading.entropy, 0.0).sum(1),
        "length": rollout.lengths,
        "truncated": rollout.truncated,
        "log_ratio": log_ratio,
    }
    explained = advantages.explained_variance(reading.values, estimated.returns, mask)
    metrics = score_metrics(scores, normalised, responses["kl"], ppo.kl_coef)
    metrics |= token_metrics(rollout, reading, responses)
    metrics |= {
        "value/explained_variance": explained,
        "reward/running_mean": stats.mean,
        "reward/running_std": stats.std,
    }
    finite = optimisation.all_finite(metrics)
    experience = Experience(
        rollout=rollout,
        old_logprobs=reading.logprobs,
        old_values=reading.values,
        advantages=jnp.where(finite, token_advantages, jnp.nan),
        returns=jnp.where(finite, estimated.returns, jnp.nan),
    )
    return ScoredRollout(experience=experience, stats=stats, metrics=metrics, responses=responses)


def score_metrics(
    scores: Float[Array, " responses"],
    normalised: Float[Array, " responses"],
    kl: Float[Array, " responses"],
    kl_coef: float,
) -> Metrics:
    """Return the metrics of scores and of the KL to the reference, per response."""
    mean_kl = kl.mean()
    return {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/kl": mean_kl,
        "objective/non_score_reward": -kl_coef * mean_kl,
        "objective/rlhf_reward": normalised.mean() - kl_coef * mean_kl,
    }


def token_metrics(rollout: Rollout, reading: Reading, responses: dict[str, jax.Array]) -> Metrics:
    """Return the metrics of tokens: entropy, lengths, and the sampler's drift.

    The drift is the difference between the log-probabilities of the sampler and of the scorer.
    """
    mask = rollout.mask
    token_count = mask.sum()
    drift = jnp.where(mask, jnp.abs(rollout.logprobs - reading.logprobs), 0.0)
    return {
        "objective/kl_per_token": responses["log_ratio"].sum() / token_count,
        "objective/entropy": -jnp.where(mask, reading.logprobs, 0.0).sum(1).mean(),
        "policy/entropy_avg": responses["entropy"].sum() / token_count,
        "response/length_mean": rollout.lengths.mean(),
        "response/length_max": rollout.lengths.max(),
        "response/truncated": rollout.truncated.mean(),
        "val/num_eos_tokens": (~rollout.truncated).sum(),
        "sampler/drift_mean": drift.sum() / token_count,
        "sampler/drift_max": drift.max(),
    }
