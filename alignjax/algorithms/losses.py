"""The objectives: pure float32 functions of arrays.

They take weights, not masks: `weights = mask / mask.sum()` over the whole optimiser minibatch.
So every loss and every metric is `sum(weights * x)`, microbatches and devices simply add, and
no function needs to know how many there are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Loss = Float[Array, ""]
Tokens = Float[Array, "*tokens"]
Metrics = dict[str, Float[Array, ""]]


def lm_loss(
    logprobs: Float[Array, "*tokens"], weights: Float[Array, "*tokens"]
) -> tuple[Loss, Metrics]:
    """Return the next-token loss in nats, -sum(weights * logprobs), and its metrics."""
    loss = -jnp.sum(weights * logprobs)
    return loss, {"loss": loss}


def add_load_balancing(
    loss: Loss,
    metrics: Metrics,
    load_balancing: Tokens | None,
    weights: Tokens,
    coefficient: float,
    name: str = "load_balancing",
) -> tuple[Loss, Metrics]:
    """Return a loss plus the load-balancing loss of a mixture of experts, and all metrics.

    Args:
      loss: to which coefficient * sum(weights * load_balancing) is added.
      metrics: of the loss, which gain that sum.
      load_balancing: of the sequence of each token, see `models.experts.load_balancing`; None adds
        nothing.
      weights: of the tokens.
      coefficient: of the load-balancing loss.
      name: of the metric.
    """
    if load_balancing is None:
        return loss, metrics
    mean = jnp.sum(weights * load_balancing)
    return loss + coefficient * mean, metrics | {name: mean}


def ranking_loss(
    chosen: Float[Array, " pairs"],
    rejected: Float[Array, " pairs"],
    weights: Float[Array, " pairs"],
    margins: Float[Array, " pairs"] | float = 0.0,
    centring: float = 0.0,
) -> tuple[Loss, Metrics]:
    """Return -log sigmoid(chosen - rejected - margin) (Bradley-Terry) and its metrics.

    `centring` weighs (chosen + rejected)^2, which fixes the free constant of the scores. A tie
    counts as a tie, never as correct: accuracy(swapped) = 1 - accuracy - ties.
    """
    difference = chosen - rejected
    loss = jnp.sum(weights * -jax.nn.log_sigmoid(difference - margins))
    total = loss + centring * jnp.sum(weights * (chosen + rejected) ** 2)
    metrics = {
        "loss": loss,
        "accuracy": jnp.sum(weights * (difference > 0)),
        "ties": jnp.sum(weights * (difference == 0)),
        "margin": jnp.sum(weights * difference),
        "mean_reward": jnp.sum(weights * (chosen + rejected)) / 2,
    }
    return total, metrics


def sigmoid_losses(
    log_ratios: Float[Array, "pairs 2"], beta: float, label_smoothing: float
) -> Float[Array, " pairs"]:
    """Return each pair's loss of DPO (Rafailov et al. 2023, equation 7), with smoothed labels.

    `log_ratios` are log p of a response under the policy less that under the reference, of the
    chosen response first. With d = beta * (chosen - rejected), the loss is
    -(1 - e) * log sigmoid(d) - e * log sigmoid(-d), where e = `label_smoothing` is the share of
    labels that are taken to be wrong (Mitchell 2023, "conservative DPO").
    """
    difference = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    agreeing = -jax.nn.log_sigmoid(difference)
    disagreeing = -jax.nn.log_sigmoid(-difference)
    return (1 - label_smoothing) * agreeing + label_smoothing * disagreeing


def ipo_losses(
    log_ratios: Float[Array, "pairs 2"], lengths: Float[Array, "pairs 2"], beta: float
) -> Float[Array, " pairs"]:
    """Return each pair's loss of IPO (Azar et al. 2023, equation 17), beta being its tau.

    The loss is (h - 1 / (2 beta))^2, where h is the difference of the log-ratios, each divided by
    the tokens of its response. The paper does not state this division; its authors told those of
    TRL that its results are of that form.
    """
    per_token = log_ratios / lengths
    return (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2


def implicit_reward_metrics(
    logprobs: Float[Array, "pairs 2"],
    log_ratios: Float[Array, "pairs 2"],
    weights: Float[Array, " pairs"],
    beta: float,
) -> Metrics:
    """Return the metrics of DPO by TRL's names; an implicit reward is beta times a log-ratio."""
    rewards = beta * log_ratios
    difference = rewards[:, 0] - rewards[:, 1]
    return {
        "rewards/chosen": jnp.sum(weights * rewards[:, 0]),
        "rewards/rejected": jnp.sum(weights * rewards[:, 1]),
        "rewards/accuracies": jnp.sum(weights * (difference > 0)),
        "rewards/margins": jnp.sum(weights * difference),
        "logps/chosen": jnp.sum(weights * logprobs[:, 0]),
        "logps/rejected": jnp.sum(weights * logprobs[:, 1]),
    }


def policy_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    weights: Tokens,
    clip: float,
    *,
    clip_high: float = 0.0,
    dual_clip: float = 0.0,
    loss_weights: Tokens | None = None,
) -> tuple[Loss, Metrics]:
    """Return the clipped surrogate (Schulman et al. 2017, equation 7) and its metrics.

    The loss is -sum(w * min(ratio * A, clip(ratio, 1 - clip, 1 + clip_high) * A)) with
    ratio = exp(logprobs - old_logprobs). `policy/clipfrac_avg` is the share of tokens on which
    the clip binds, that is, where the clipped term is the smaller one. `policy/approxkl_avg` is
    the estimate (ratio - 1) - log ratio of KL(old, new).

    Args:
      logprobs: of the policy.
      old_logprobs: of the policy that sampled.
      advantages: of each token.
      weights: of the metrics.
      clip: how far the ratio may fall below 1.
      clip_high: how far it may rise above 1 (Yu et al. 2025, DAPO's "clip higher"); 0 is `clip`.
      dual_clip: where A < 0, the term is at least dual_clip * A (Ye et al. 2020), so that a
        large ratio has no gradient there either; 0 is no such bound.
      loss_weights: w of the loss, see `token_weights`; None is `weights`.
    """
    loss_weights = weights if loss_weights is None else loss_weights
    log_ratio = jnp.where(weights > 0, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    unclipped = ratio * advantages
    clipped = jnp.clip(ratio, 1 - clip, 1 + (clip_high or clip)) * advantages
    surrogate = jnp.minimum(unclipped, clipped)
    dual_metrics = {}
    if dual_clip:
        bound = dual_clip * advantages
        binds = (advantages < 0) & (surrogate < bound)
        surrogate = jnp.where(binds, bound, surrogate)
        dual_metrics["policy/dual_clipfrac_avg"] = jnp.sum(weights * binds)
    loss = -jnp.sum(loss_weights * surrogate)
    metrics = {
        "loss/policy_avg": loss,
        "policy/clipfrac_avg": jnp.sum(weights * (clipped < unclipped)),
        "policy/approxkl_avg": jnp.sum(weights * (ratio - 1 - log_ratio)),
        "val/ratio": jnp.sum(weights * ratio),
        "val/ratio_var": jnp.sum(weights * (ratio - 1) ** 2),
    }
    return loss, metrics | dual_metrics


def token_weights(
    aggregation: str,
    weights: Tokens,
    lengths: Int[Array, "*tokens"],
    responses: int,
    response_length: int,
) -> Tokens:
    """Return the weights of tokens in the policy's loss.

    "token" is the mean over all tokens of the minibatch (DAPO, and PPO in common practice):
    `weights`. "sequence" is the mean over responses of the mean over their tokens (GRPO): a token
    of a long response counts less. "constant" divides the sum over a response's tokens by
    `response_length`, whatever its length (Dr. GRPO), and takes the mean over responses: to a
    factor, this is the gradient of the log-probabilities of whole responses.

    Args:
      aggregation: token, sequence or constant.
      weights: 1 / tokens of the minibatch; 0 on padding.
      lengths: of the response that each token belongs to.
      responses: how many the minibatch has.
      response_length: the longest response that is allowed.
    """
    if aggregation == "token":
        return weights
    per_response = response_length if aggregation == "constant" else jnp.maximum(lengths, 1)
    return jnp.where(weights > 0, 1.0 / (per_response * responses), 0.0)


def kl_estimate(logprobs: Tokens, ref_logprobs: Tokens, estimator: str) -> Tokens:
    """Return an estimate of KL(policy, reference) at each token (Schulman 2020).

    With d = logprobs - ref_logprobs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. For tokens of the
    policy itself, k1 and k3 are unbiased, k2 and k3 are never negative.

    Their gradients differ. As a reward, k1 gives the gradient of the KL. As a loss, k1 has a mean
    gradient of 0, k2 that of the KL, and k3 that of KL(reference, policy).
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return jnp.exp(-log_ratio) - 1 + log_ratio


def kl_loss(
    logprobs: Tokens, ref_logprobs: Tokens, weights: Tokens, estimator: str
) -> tuple[Loss, Metrics]:
    """Return the weighted sum of `kl_estimate` and its metrics."""
    real = weights > 0
    estimates = kl_estimate(
        jnp.where(real, logprobs, 0.0), jnp.where(real, ref_logprobs, 0.0), estimator
    )
    loss = jnp.sum(weights * estimates)
    return loss, {"loss/kl_avg": loss}


def entropy_bonus(entropy: Tokens, weights: Tokens) -> tuple[Loss, Metrics]:
    """Return the mean entropy of the tokens' distributions, in nats, and its metrics."""
    bonus = jnp.sum(weights * entropy)
    return bonus, {"loss/entropy_avg": bonus}


def value_loss(
    values: Float[Array, "*tokens"],
    old_values: Float[Array, "*tokens"],
    returns: Float[Array, "*tokens"],
    weights: Float[Array, "*tokens"],
    clip: float,
) -> tuple[Loss, Metrics]:
    """Return half the squared error, clipped as in the original PPO code, and its metrics.

    The loss is sum(w * max((v - R)^2, (old + clip(v - old, -clip, clip) - R)^2)) / 2.
    """
    clipped_values = old_values + jnp.clip(values - old_values, -clip, clip)
    error = (values - returns) ** 2
    clipped_error = (clipped_values - returns) ** 2
    loss = 0.5 * jnp.sum(weights * jnp.maximum(error, clipped_error))
    metrics = {
        "loss/value_avg": loss,
        "val/clipfrac_avg": jnp.sum(weights * (clipped_error > error)),
    }
    return loss, metrics
