"""The objectives: pure functions of arrays, float32.

Weights, not masks, come in: `weights = mask / mask.sum()` over the whole optimiser minibatch, so that every loss and
every metric is `sum(weights * x)`, microbatches and devices simply add, and no function knows how many there are.
Letters: b sequences, r response tokens, t tokens.
"""

import jax
import jax.numpy as jnp


def lm_loss(logprobs, weights):
    """Next-token loss, in nats: -sum(weights[b t] * logprobs[b t]) -> loss, metrics."""
    loss = -jnp.sum(weights * logprobs)
    return loss, {"loss": loss}


def ranking_loss(chosen, rejected, weights, margins=0.0, centring=0.0):
    """-log sigmoid(chosen - rejected - margin) (Bradley-Terry) over pairs [b] -> loss, metrics.

    `centring` weighs (chosen + rejected)^2, which pins the scores' free constant. A tie is counted as a tie, never as
    right: accuracy(swapped) = 1 - accuracy - ties.
    """
    difference = chosen - rejected
    loss = jnp.sum(weights * -jax.nn.log_sigmoid(difference - margins))
    total = loss + centring * jnp.sum(weights * (chosen + rejected) ** 2)
    mean = lambda x: jnp.sum(weights * x)
    return total, {
        "loss": loss,
        "accuracy": mean(difference > 0),
        "ties": mean(difference == 0),
        "margin": mean(difference),
        "mean_reward": mean(chosen + rejected) / 2,
    }


def policy_loss(logprobs, old_logprobs, advantages, weights, clip):
    """Clipped surrogate (Schulman et al. 2017, equation 7) over [b r] -> loss, metrics.

    -sum(w * min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)), ratio = exp(logprobs - old_logprobs).
    `policy/clipfrac_avg` is the share of tokens on which the clip binds (the clipped term is the smaller one), and
    `policy/approxkl_avg` the estimate (ratio - 1) - log ratio of KL(old, new).
    """
    difference = jnp.where(weights > 0, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(difference)
    free, clipped = ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    loss = -jnp.sum(weights * jnp.minimum(free, clipped))
    mean = lambda x: jnp.sum(weights * x)
    return loss, {
        "loss/policy_avg": loss,
        "policy/clipfrac_avg": mean(clipped < free),
        "policy/approxkl_avg": mean(ratio - 1 - difference),
        "val/ratio": mean(ratio),
        "val/ratio_var": mean((ratio - 1) ** 2),
    }


def value_loss(values, old_values, returns, weights, clip):
    """Half the squared error, clipped as in the original PPO code, over [b r] -> loss, metrics.

    sum(w * max((v - R)^2, (old + clip(v - old, +-clip) - R)^2)) / 2.
    """
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    free_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * jnp.sum(weights * jnp.maximum(free_error, clipped_error))
    return loss, {
        "loss/value_avg": loss,
        "val/clipfrac_avg": jnp.sum(weights * (clipped_error > free_error)),
    }
