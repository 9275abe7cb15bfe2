"""From scores to advantages: pure functions of float32 arrays.

Responses to one prompt are adjacent, and every prompt has as many.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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


class KLControl(NamedTuple):
    """The coefficient of the KL penalty, which a controller adapts towards a target."""

    coef: Float[Array, ""]

    def update(
        self, kl: Float[Array, ""], target: float, responses: int, horizon: int
    ) -> "KLControl":
        """Return the control after a rollout (Ziegler et al. 2019, section 2.2).

        coef grows by the factor 1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon. It
        stays as it is if the KL is not finite.

        Args:
          kl: mean KL of the rollout's responses to the reference, in nats a response.
          target: what the KL is to be.
          responses: how many the rollout has.
          horizon: responses over which the coefficient would change by the clipped error.
        """
        error = jnp.clip(kl / target - 1, -0.2, 0.2)
        error = jnp.where(jnp.isfinite(kl), error, 0.0)
        return KLControl(self.coef * (1 + error * responses / horizon))


def normalise(scores: Scores, stats: RunningStats, how: str) -> Scores:
    """Normalise scores by running statistics that already hold this batch.

    `how` is "none" (unchanged), "mean" (subtract the running mean) or "mean_std" (also divide
    by the running standard deviation).
    """
    if how == "none":
        return scores
    centred = scores - stats.mean
    return centred if how == "mean" else centred / (stats.std + 1e-8)


def overlong_penalty(
    lengths: Int[Array, " responses"], response_length: int, buffer: int, penalty: float
) -> Scores:
    """Return what to subtract from the scores of long responses (Yu et al. 2025, equation 13).

    It is 0 up to response_length - buffer tokens, and grows linearly to `penalty` at
    response_length.
    """
    excess = lengths - (response_length - buffer)
    return penalty * jnp.maximum(excess, 0) / buffer


def shape_rewards(
    scores: Scores,
    kl: TokenFloats,
    mask: TokenMask,
    kl_coef: float | Float[Array, ""],
) -> TokenFloats:
    """Return per-token rewards: -kl_coef * kl on each token, and the score on the last one.

    With kl = logprobs - ref_logprobs, the estimator k1, the gradient through the return is
    unbiased (Ziegler et al. 2019, equation 2).
    """
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    penalty = jnp.where(mask, -kl_coef * kl, 0.0)
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


def total_rewards(rewards: TokenFloats, mask: TokenMask) -> Scores:
    """Return the sum of each response's rewards: its score less its KL penalty, if there is one."""
    return jnp.where(mask, rewards, 0.0).sum(1)


def on_every_token(figures: Scores, mask: TokenMask) -> TokenFloats:
    """Give each token of a response the response's figure, and 0 to what is no token."""
    return jnp.where(mask, figures[:, None], 0.0)


def less_group_mean(totals: Scores, samples: int) -> Scores:
    """Subtract from each response's total the mean over all `samples` responses to its prompt."""
    groups = totals.reshape(-1, samples)
    return (groups - groups.mean(1, keepdims=True)).reshape(-1)


def leave_one_out(totals: Scores, samples: int) -> Scores:
    """Subtract from each response's total the mean over the other responses to its prompt."""
    return less_group_mean(totals, samples) * samples / (samples - 1)


def group_normalise(totals: Scores, samples: int) -> Scores:
    """Scale the totals of the responses to each prompt to mean 0 and deviation 1.

    The deviation is the sample's, with samples - 1 in the denominator, and 1e-4 is added to it.
    So equal totals become 0.
    """
    centred = less_group_mean(totals, samples).reshape(-1, samples)
    deviation = jnp.sqrt((centred**2).sum(1, keepdims=True) / (samples - 1))
    return (centred / (deviation + 1e-4)).reshape(-1)


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
