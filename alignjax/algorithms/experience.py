"""What PPO learns from: responses, packed, read by the four roles, and turned into rewards, advantages and returns.

Letters: b prompts, n samples of each, r response tokens, m responses of a minibatch; rows, w, k: see `data.packing`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.algorithms import advantages, optimisation
from alignjax.algorithms.advantages import RunningStats
from alignjax.config import Config
from alignjax.data import packing
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.sampling.types import Rollout
from alignjax.weights import roles


class Reading(NamedTuple):
    """What the four roles say of each response."""

    logprobs: jax.Array  # [b*n r]
    entropy: jax.Array  # [b*n r]
    ref_logprobs: jax.Array  # [b*n r]
    values: jax.Array  # [b*n r]: before each token
    scores: jax.Array  # [b*n]: what the readers of text say, see `rewards`, and the reward model


class Experience(NamedTuple):
    """What the updates of one rollout learn from, all of it fixed before the first of them."""

    sampled: Rollout
    old_logprobs: jax.Array  # [b*n r] of the policy that sampled, by the scorer
    old_values: jax.Array  # [b*n r]
    advantages: jax.Array  # [b*n r], whitened over the whole of it
    returns: jax.Array  # [b*n r], before whitening


def microbatches(config: Config, prompt_lengths, lengths, rows, shards: int) -> list[dict]:
    """How the responses rows[m] are packed: sequence, place [rows w] of prompt and response, `at` [rows k] of the
    response's tokens, weights [rows k] that sum to 1 over the minibatch; and the way back: `member` [m] (b*n where
    there is none), `ends` [m], `source` [m r], places in rows * k. Lengths, [b*n], are the host's.
    """
    r, m, n = config.ppo.response_length, len(rows), len(lengths)
    longest = config.data.max_length + r
    out = []
    for layout in packing.pack(
        prompt_lengths + lengths, [[i] for i in rows], longest, config.microbatch_tokens, shards
    ):
        inside = layout.place - prompt_lengths[layout.sequence]  # the place in the response
        at, real = packing.targets(layout.real & (inside >= 0))
        owner, inside = (np.take_along_axis(x, at, axis=1)[real] for x in (layout.sequence, inside))
        source = np.zeros((len(layout.members), r), np.int32)
        source[np.searchsorted(layout.members, owner), inside] = np.flatnonzero(real)
        out.append(
            {
                "sequence": layout.sequence,
                "place": layout.place,
                "at": at,
                "weights": real.astype(np.float32) / lengths[rows].sum(),
                "member": packing.padded(layout.members, m, n),
                "ends": packing.padded(layout.ends(), m, 0),
                "source": packing.padded(source, m, 0),
            }
        )
    return out


def packed(sampled: Rollout, part: dict) -> dict:
    """The tokens of a part of `microbatches`, as `logprobs` reads them."""
    owner = jnp.maximum(part["sequence"], 0)
    start = sampled.tokens.shape[1] - sampled.logprobs.shape[1] - sampled.prompt_lengths
    real = part["sequence"] >= 0
    tokens = jnp.where(real, sampled.tokens[owner, start[owner] + part["place"]], 0)
    return sharding.constrain(
        {
            "tokens": tokens,
            "positions": part["place"],
            "segments": part["sequence"] + 1,
            "at": part["at"],
        }
    ) | {"ends": part["ends"]}


def read(
    config: Config, reward_model, params: dict, sampled: Rollout, said: Reading, part: dict
) -> Reading:
    """`said` with what the roles (params: role -> parameters) say of a part of `microbatches`.

    The reward model may be of another architecture than the rest. If it reads other tokens, it is not among the roles.
    """
    model, temperature, batch = config.model, config.ppo.temperature, packed(sampled, part)
    logprob, entropy = scoring.token_logprobs(model, params["policy"], batch, temperature)
    reference, _ = scoring.token_logprobs(
        model, roles.on_device(params["reference"]), batch, temperature
    )
    values = scoring.token_values(model, params["value"], batch)
    put = lambda old, x: old.at[part["member"]].set(x, mode="drop")
    tokens = (x.reshape(-1)[part["source"]] for x in (logprob, entropy, reference, values))
    scores = said.scores
    if "reward" in params:
        found = scoring.scores(reward_model, roles.on_device(params["reward"]), batch)
        scores = scores.at[part["member"]].add(config.ppo.reward_weight * found, mode="drop")
    return Reading(*(put(old, x) for old, x in zip(said[:-1], tokens, strict=True)), scores)


def make_experience(config: Config, stats: RunningStats, sampled: Rollout, said: Reading):
    """Experience, the running statistics with its scores, metrics, and figures of each response, [b*n], and of each of its
    tokens, log_ratio [b*n r]: log p of the policy less that of the reference."""
    p, mask = config.ppo, sampled.mask
    scores = jnp.where(sampled.truncated, p.truncated_score, said.scores)
    stats = stats.update(scores)
    normalised = advantages.normalise(scores, stats, p.normalise_scores)
    rewards = advantages.shape_rewards(
        normalised, said.logprobs, said.ref_logprobs, mask, p.kl_coef
    )
    gains, returns = advantages.gae(rewards, said.values, mask, p.gamma, p.lam)
    gains = advantages.whiten(gains, mask) if p.whiten_advantages else gains
    log_ratio = jnp.where(mask, said.logprobs - said.ref_logprobs, 0.0)
    tokens, length = mask.sum(), sampled.lengths
    per_response = {
        "score": said.scores,
        "kl": log_ratio.sum(1),
        "entropy": jnp.where(mask, said.entropy, 0.0).sum(1),
        "length": length,
        "truncated": sampled.truncated,
        "log_ratio": log_ratio,
    }
    kl, drift = (
        per_response["kl"].mean(),
        jnp.where(mask, jnp.abs(sampled.logprobs - said.logprobs), 0.0),
    )
    metrics = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/kl": kl,
        "objective/kl_per_token": log_ratio.sum() / tokens,
        "objective/non_score_reward": -p.kl_coef * kl,
        "objective/rlhf_reward": normalised.mean() - p.kl_coef * kl,
        "objective/entropy": -jnp.where(mask, said.logprobs, 0.0).sum(1).mean(),
        "policy/entropy_avg": per_response["entropy"].sum() / tokens,
        "value/explained_variance": advantages.explained_variance(said.values, returns, mask),
        "response/length_mean": length.mean(),
        "response/length_max": length.max(),
        "response/truncated": sampled.truncated.mean(),
        "val/num_eos_tokens": (~sampled.truncated).sum(),
        "sampler/drift_mean": drift.sum() / tokens,
        "sampler/drift_max": drift.max(),
        "reward/running_mean": stats.mean,
        "reward/running_std": stats.std,
    }
    sound = optimisation.finite(
        metrics
    )  # if not, nothing is learnt from it: every loss is NaN, and no update is applied
    gains, returns = (jnp.where(sound, x, jnp.nan) for x in (gains, returns))
    experience = Experience(sampled, said.logprobs, said.values, gains, returns)
    return experience, stats, metrics, per_response


def kept(experience: Experience, said: dict) -> dict:
    """Name -> array, on the host: figures of each response, and the fields of an Experience and its Rollout."""
    return {
        k: sharding.on_host(v)
        for k, v in (said | experience._asdict() | vars(experience.sampled)).items()
        if k != "sampled"
    }


def learnt(experience: Experience, part: dict) -> dict:
    """The batch of a part: its tokens, and what is fixed of its targets, each [rows k]."""
    batch = packed(experience.sampled, part)
    owner, place = (jnp.take_along_axis(part[x], part["at"], axis=1) for x in ("sequence", "place"))
    owner = jnp.maximum(owner, 0)
    inside = jnp.maximum(place - experience.sampled.prompt_lengths[owner], 0)
    fixed = {
        name: x[owner, inside] for name, x in experience._asdict().items() if name != "sampled"
    }
    return batch | sharding.constrain(fixed | {"weights": part["weights"]})
