"""From the readings of a rollout to rewards, advantages and returns, and their metrics."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignjax import config as configs
from alignjax.algorithms import advantages, losses, optimisation
from alignjax.algorithms.advantages import KLControl, RunningStats
from alignjax.algorithms.estimators import AdvantageInputs, find_estimator
from alignjax.algorithms.experience import (
    Experience,
    Reading,
    ScoredRollout,
    response_figures,
)
from alignjax.config import Config, Reward, reward_table
from alignjax.sampling.types import Rollout

Metrics = dict[str, jax.Array]


def make_experience(
    config: Config,
    stats: RunningStats,
    source_stats: dict[str, RunningStats],
    rollout: Rollout,
    reading: Reading,
    kl_control: KLControl | None = None,
) -> ScoredRollout:
    """Turn the readings of a rollout into rewards, advantages and returns.

    `source_stats` are the running statistics of each entry of `ppo.rewards`. `kl_control` has the
    coefficient of the KL penalty, if it adapts. If a metric is not finite, advantages and returns
    become NaN, so every loss is NaN and no update is applied: the rollout produces no learning.
    """
    ppo = config.ppo
    mask = rollout.mask
    kl_coef = ppo.kl_coef if kl_control is None else kl_control.coef
    combined = combine_scores(reward_table(config), reading.scores, source_stats)
    scores = learned_scores(ppo, rollout, combined.total)
    stats = stats.update(scores)
    normalised = advantages.normalise(scores, stats, ppo.normalise_scores)
    if ppo.score_clip:
        normalised = jnp.clip(normalised, -ppo.score_clip, ppo.score_clip)
    responses = {"score": combined.total, **response_figures(rollout, reading)}
    inputs = AdvantageInputs(
        rewards=shape_rewards(ppo, normalised, reading, mask, kl_coef),
        values=reading.values,
        mask=mask,
        scores=normalised,
        log_ratio=responses["log_ratio"],
    )
    estimated = find_estimator(ppo.advantage_estimator)(inputs, ppo)
    token_advantages = estimated.advantages
    if ppo.whiten_advantages:
        token_advantages = advantages.whiten(token_advantages, mask)
    responses |= {f"score/{name}": reading.scores[name] for name in ppo.rewards}
    metrics = score_metrics(scores, normalised, responses["kl"], kl_coef)
    metrics |= token_metrics(rollout, reading, responses)
    if reading.values is not None:
        metrics["value/explained_variance"] = advantages.explained_variance(
            reading.values, estimated.returns, mask
        )
    metrics |= {"reward/running_mean": stats.mean, "reward/running_std": stats.std}
    metrics |= source_metrics(ppo.rewards, reading.scores, combined.stats)
    if configs.needs_of(config).group:
        metrics["objective/frac_zero_std"] = equal_groups(scores, ppo.samples_per_prompt)
    if kl_control is not None:
        metrics["objective/kl_coef"] = kl_coef
        kl_control = kl_control.update(
            metrics["objective/kl"], ppo.kl_target, len(scores), ppo.kl_horizon
        )
    finite = optimisation.all_finite(metrics)
    experience = Experience(
        rollout=rollout,
        old_logprobs=reading.logprobs,
        advantages=jnp.where(finite, token_advantages, jnp.nan),
    )
    if reading.values is not None:
        experience = dataclasses.replace(
            experience,
            old_values=reading.values,
            returns=jnp.where(finite, estimated.returns, jnp.nan),
        )
    if ppo.kl_in == "loss":
        experience = dataclasses.replace(
            experience,
            ref_logprobs=reading.ref_logprobs,
            kl_coef=jnp.asarray(kl_coef, jnp.float32),
        )
    return ScoredRollout(
        experience=experience,
        stats=stats,
        source_stats=combined.stats,
        scores=reading.scores,
        kl_control=kl_control,
        metrics=metrics,
        responses=responses,
    )


@dataclass(frozen=True, kw_only=True)
class CombinedScores:
    """The score of each response, and the statistics of what it is made of."""

    total: Float[Array, " responses"]
    stats: dict[str, RunningStats]  # with the scores of this rollout


def combine_scores(
    table: Mapping[str, Reward],
    scores: Mapping[str, Float[Array, " responses"]],
    stats: Mapping[str, RunningStats],
) -> CombinedScores:
    """Return the weighted sum of the scores of all sources, each normalised as its entry says.

    `stats` has the entries of `ppo.rewards`; other sources are not normalised.
    """
    total = jnp.zeros((), jnp.float32)
    updated = {}
    for name, source in table.items():
        part = scores[name]
        if name in stats:
            updated[name] = stats[name].update(part)
            part = advantages.normalise(part, updated[name], source.normalise)
        if source.weight:  # with 0 it is only logged: 0 times infinity would not be 0
            total = total + source.weight * part
    return CombinedScores(total=total, stats=updated)


def source_metrics(
    table: Mapping[str, Reward],
    scores: Mapping[str, Float[Array, " responses"]],
    stats: Mapping[str, RunningStats],
) -> Metrics:
    """Return the metrics of each source by itself."""
    metrics = {}
    for name, source in table.items():
        metrics[f"objective/rewards/{name}"] = scores[name].mean()
        metrics[f"objective/rewards_std/{name}"] = scores[name].std()
        if source.normalise != "none":
            metrics[f"reward/running_mean/{name}"] = stats[name].mean
            metrics[f"reward/running_std/{name}"] = stats[name].std
    return metrics


def learned_scores(
    ppo: configs.PPO, rollout: Rollout, scores: Float[Array, " responses"]
) -> Float[Array, " responses"]:
    """Return the scores that are learned from, before they are normalised.

    A truncated response has its own score, and long responses are penalised if the config says so.
    """
    scores = jnp.where(rollout.truncated, ppo.truncated_score, scores)
    if not ppo.overlong_buffer:
        return scores
    return scores - advantages.overlong_penalty(
        rollout.lengths, ppo.response_length, ppo.overlong_buffer, ppo.overlong_penalty
    )


def shape_rewards(
    ppo: configs.PPO,
    scores: Float[Array, " responses"],
    reading: Reading,
    mask: Bool[Array, "responses tokens"],
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "responses tokens"]:
    """Return per-token rewards, with the KL penalty unless it is a term of the loss."""
    kl = losses.kl_estimate(reading.logprobs, reading.ref_logprobs, ppo.kl_estimator)
    in_reward = kl_coef if ppo.kl_in == "reward" else 0.0
    return advantages.shape_rewards(scores, kl, mask, in_reward)


def score_metrics(
    scores: Float[Array, " responses"],
    normalised: Float[Array, " responses"],
    kl: Float[Array, " responses"],
    kl_coef: float | Float[Array, ""],
) -> Metrics:
    """Return the metrics of scores and of the KL to the reference, per response.

    The penalty is the same figure wherever it is applied: the coefficient times the KL by k1.
    """
    mean_kl = kl.mean()
    return {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/kl": mean_kl,
        "objective/non_score_reward": -kl_coef * mean_kl,
        "objective/rlhf_reward": normalised.mean() - kl_coef * mean_kl,
    }


def equal_groups(scores: Float[Array, " responses"], samples: int) -> Float[Array, ""]:
    """Return the share of prompts whose responses all have the same score."""
    groups = scores.reshape(-1, samples)
    return (groups == groups[:, :1]).all(1).mean()


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
