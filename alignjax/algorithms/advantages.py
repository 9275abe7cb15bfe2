"""From scores to advantages: pure functions of float32 arrays. Letters: b sequences, r response tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RunningStats(NamedTuple):
    """Count, mean and sum of squared deviations of all scores seen, each a float32 scalar."""

    count: jax.Array
    mean: jax.Array
    m2: jax.Array

    @staticmethod
    def zero():
        return RunningStats(*jnp.zeros((3,), jnp.float32))

    def update(self, x):
        """Statistics with the batch x[b] added (Chan et al. 1979); as they were if a score is not finite."""
        n = x.size
        delta, total = x.mean() - self.mean, self.count + n
        m2 = self.m2 + jnp.sum((x - x.mean()) ** 2) + delta**2 * self.count * n / total
        found = RunningStats(total, self.mean + delta * n / total, m2)
        return jax.tree.map(
            lambda new, old: jnp.where(jnp.isfinite(x).all(), new, old), found, self
        )

    @property
    def std(self):
        """Population standard deviation."""
        return jnp.sqrt(self.m2 / jnp.maximum(self.count, 1.0))


def normalise(scores, stats: RunningStats, how: str):
    """scores[b] less the running mean ("mean"), also over the running deviation ("mean_std"), or as they are ("none").

    The statistics are to hold the present batch already: update, then use.
    """
    if how == "none":
        return scores
    centred = scores - stats.mean
    return centred if how == "mean" else centred / (stats.std + 1e-8)


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """rewards[b r] float32: -kl_coef (logprobs - ref_logprobs) at each token, plus scores[b] at the last one.

    The penalty is the estimator k1, whose gradient through the return is unbiased (Ziegler et al. 2019, equation 2).
    """
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    penalty = jnp.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)
    return penalty + jnp.where(last, scores[:, None], 0.0).astype(jnp.float32)


def gae(rewards, values, mask, gamma, lam):
    """advantages[b r], returns[b r] (Schulman et al. 2016, equation 16); 0 and values' place-holder after the end.

    The value after the last token is 0, whatever `values` holds there; returns = advantages + values.
    """
    values = jnp.where(mask, values, 0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = jnp.where(mask, rewards + gamma * following - values, 0.0)

    def back(carry, x):
        delta, on = x
        carry = jnp.where(on, delta + gamma * lam * carry, 0.0)
        return carry, carry

    _, advantages = jax.lax.scan(
        back, jnp.zeros_like(rewards[:, 0]), (deltas.T, mask.T), reverse=True
    )
    return advantages.T, advantages.T + values


def whiten(x, mask):
    """x[b r] to mean 0 and population variance 1 over the mask of the whole batch (epsilon 1e-8), 0 elsewhere."""
    count = mask.sum()
    mean = jnp.where(mask, x, 0.0).sum() / count
    variance = jnp.where(mask, (x - mean) ** 2, 0.0).sum() / count
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the mask; 0 where the returns don't vary."""
    count = mask.sum()

    def variance(x):
        mean = jnp.where(mask, x, 0.0).sum() / count
        return jnp.where(mask, (x - mean) ** 2, 0.0).sum() / count

    total = variance(returns)
    return jnp.where(
        total > 0, 1 - variance(returns - values) / jnp.where(total > 0, total, 1.0), 0.0
    )
