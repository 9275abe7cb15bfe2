"""From scores to advantages: pure functions of float32 arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Scores = Float[Array, " responses"]
TokenFloats = Float[Array, "responses tokens"]
TokenMask = Bool[Array, "responses tokens"]


class RunningStats(NamedTuple):
    """Count, mean and sum of squared deviations of all scores so far, each a float32 scalar."""

    count: Float[Array, ""]
    mean: Float[Array, ""]
    m2: Float[Array, ""]

    @staticmethod
    def zero() -> "RunningStats":
        """Return the statistics of no scores."""
        return RunningStats(*jnp.zeros((3,), jnp.float32))

    def update(self, scores: Scores) -> "RunningStats":
        """Add a batch of scores (Chan et al. 1979); change nothing if one is not finite."""
        size = scores.size
        delta = scores.mean() - self.mean
        total = self.count + size
        batch_m2 = jnp.sum((scores - scores.mean()) ** 2)
        m2 = self.m2 + batch_m2 + delta**2 * self.count * size / total
        updated = RunningStats(total, self.mean + delta * size / total, m2)
        finite = jnp.isfinite(scores).all()
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, self)

    @property
    def std(self) -> Float[Array, ""]:
        """Return the population standard deviation."""
        return jnp.sqrt(self.m2 / jnp.maximum(self.count, 1.0))


def normalise(scores: Scores, stats: RunningStats, how: str) -> Scores:
    """Normalise scores by running statistics that already hold this batch.

    `how` is "none" (unchanged), "mean" (subtract the running mean) or "mean_std" (also divide
    by the running standard deviation).
    """
    if how == "none":
        return scores
    centred = scores - stats.mean
    return centred if how == "mean" else centred / (stats.std + 1e-8)


def shape_rewards(
    scores: Scores,
    logprobs: TokenFloats,
    ref_logprobs: TokenFloats,
    mask: TokenMask,
    kl_coef: float,
) -> TokenFloats:
    """Return per-token rewards: a KL penalty on each token, and the score on the last one.

    The penalty is -kl_coef * (logprobs - ref_logprobs): the estimator k1, whose gradient
    through the return is unbiased (Ziegler et al. 2019, equation 2).
    """
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    penalty = jnp.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)
    return penalty + jnp.where(last, scores[:, None], 0.0).astype(jnp.float32)


def gae(
    rewards: TokenFloats, values: TokenFloats, mask: TokenMask, gamma: float, lam: float
) -> tuple[TokenFloats, TokenFloats]:
    """Return advantages and returns (Schulman et al. 2016, equation 16).

    The value after the last token is 0, whatever `values` holds there. After the end of a
    response both results are 0. returns = advantages + values.
    """
    values = jnp.where(mask, values, 0.0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = jnp.where(mask, rewards + gamma * next_values - values, 0.0)

    def backward_step(carry, token):
        delta, real = token
        carry = jnp.where(real, delta + gamma * lam * carry, 0.0)
        return carry, carry

    start = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(backward_step, start, (deltas.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def whiten(x: TokenFloats, mask: TokenMask) -> TokenFloats:
    """Scale x to mean 0 and population variance 1 over the mask of the whole batch, 0 elsewhere.

    The epsilon under the root is 1e-8.
    """
    count = mask.sum()
    mean = jnp.where(mask, x, 0.0).sum() / count
    variance = jnp.where(mask, (x - mean) ** 2, 0.0).sum() / count
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def masked_variance(x: TokenFloats, mask: TokenMask) -> Float[Array, ""]:
    """Return the population variance of x over the mask."""
    count = mask.sum()
    mean = jnp.where(mask, x, 0.0).sum() / count
    return jnp.where(mask, (x - mean) ** 2, 0.0).sum() / count


def explained_variance(
    values: TokenFloats, returns: TokenFloats, mask: TokenMask
) -> Float[Array, ""]:
    """Return 1 - Var(returns - values) / Var(returns); 0 if the returns do not vary."""
    total = masked_variance(returns, mask)
    residual = masked_variance(returns - values, mask)
    return jnp.where(total > 0, 1 - residual / jnp.where(total > 0, total, 1.0), 0.0)
