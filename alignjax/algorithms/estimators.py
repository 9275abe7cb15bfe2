"""Advantage estimators by name: from per-token rewards and values to advantages and returns.

To add one here, write a function, decorate it with `@advantage_estimator("name")`, and say in
`config.estimators` what it needs. From outside the package, name it in a config:
`ppo.advantage_estimator = "module:function"`. Either way it is traced by jit, so it must be a pure
function of its arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignjax import config as configs
from alignjax.algorithms import advantages, plugins
from alignjax.config import UserError
from alignjax.machine import user_code


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AdvantageInputs:
    """What an estimator gets. Responses of one prompt are adjacent rows.

    `rewards` holds the KL penalty on each token, unless `ppo.kl_in` puts it into the loss, and the
    normalised score on the last one. The other fields are what it is made of.
    """

    rewards: Float[Array, "responses tokens"]
    mask: Bool[Array, "responses tokens"]  # the tokens of each response
    # Of the value model, before each token; None if the run has none.
    values: Float[Array, "responses tokens"] | None = None
    scores: Float[Array, " responses"] | None = None  # normalised
    # Log-probabilities of the policy less those of the reference.
    log_ratio: Float[Array, "responses tokens"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Advantages:
    """What an estimator returns; nothing is read where the mask does not hold.

    `advantages` are whitened afterwards if `ppo.whiten_advantages` says so. `returns` are the
    targets of the value model; without one they may be None.
    """

    advantages: Float[Array, "responses tokens"]
    returns: Float[Array, "responses tokens"] | None = None


AdvantageEstimator = Callable[[AdvantageInputs, configs.PPO], Advantages]
ESTIMATORS: dict[str, AdvantageEstimator] = {}


def advantage_estimator(name: str) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Register the decorated function under a name."""

    def register(estimate: AdvantageEstimator) -> AdvantageEstimator:
        ESTIMATORS[name] = estimate
        return estimate

    return register


def find_estimator(name: str) -> AdvantageEstimator:
    """Return the estimator that `ppo.advantage_estimator` names.

    Raises:
      UserError: if there is none of that name.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    if ":" in name:
        return functools.partial(call_external, name)
    raise UserError(f"ppo.advantage_estimator={name!r} is no estimator")  # `config.check` says more


def call_external(spec: str, inputs: AdvantageInputs, ppo: configs.PPO) -> Advantages:
    """Call a user's estimator, which `spec` names as module:function.

    Raises:
      UserError: for an exception of the estimator, with its traceback, and for a result that is
        not `Advantages` of the shape of the inputs.
    """
    name = f"ppo.advantage_estimator={spec}"
    estimate = plugins.load_function("ppo.advantage_estimator", spec)
    with user_code.errors_named(name):
        result = estimate(inputs, dataclasses.replace(ppo))
    if not isinstance(result, Advantages):
        raise UserError(f"{name}: expected Advantages, found {type(result).__name__}")
    if inputs.values is None:  # nothing reads returns
        result = dataclasses.replace(result, returns=result.advantages)
    shape = inputs.rewards.shape
    arrays = {}
    for field in dataclasses.fields(Advantages):
        value = getattr(result, field.name)
        with user_code.errors_named(f"{name}: {field.name}"):
            array = jnp.asarray(value)
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            description = f"{array.dtype}{list(array.shape)}"
            raise UserError(f"{name}: {field.name} is {description}, not floating{list(shape)}")
        arrays[field.name] = array
    return Advantages(**arrays)


def check_shapes(config: configs.Config) -> None:
    """Trace the estimator of a config with the shapes of a rollout; nothing is computed.

    Raises:
      UserError: as `call_external` does.
    """
    ppo = config.ppo
    responses = config.data.batch * ppo.samples_per_prompt
    numbers = jax.ShapeDtypeStruct((responses, ppo.response_length), jnp.float32)
    mask = jax.ShapeDtypeStruct(numbers.shape, jnp.bool_)
    inputs = AdvantageInputs(
        rewards=numbers,
        values=numbers if configs.has_value(config) else None,
        mask=mask,
        scores=jax.ShapeDtypeStruct((responses,), jnp.float32),
        log_ratio=numbers,
    )
    jax.eval_shape(lambda inputs: find_estimator(ppo.advantage_estimator)(inputs, ppo), inputs)


@advantage_estimator("gae")
def generalised_advantages(inputs: AdvantageInputs, ppo: configs.PPO) -> Advantages:
    """Estimate advantages by GAE with `ppo.gamma` and `ppo.lam`.

    `ppo.value_lam` gives the returns a lambda of their own (Yuan et al. 2025, arXiv 2503.01491,
    "decoupled GAE"): with 1 they are the sums of rewards, whatever the values are.
    """
    rewards = inputs.rewards
    values = inputs.values
    estimates, returns = advantages.gae(rewards, values, inputs.mask, ppo.gamma, ppo.lam)
    if ppo.value_lam >= 0:
        _, returns = advantages.gae(rewards, values, inputs.mask, ppo.gamma, ppo.value_lam)
    return Advantages(advantages=estimates, returns=returns)


@advantage_estimator("rloo")
def leave_one_out(inputs: AdvantageInputs, ppo: configs.PPO) -> Advantages:
    """Compare each response with the others to its prompt (Ahmadian et al. 2024, RLOO).

    A_i = R_i - sum over j != i of R_j / (samples - 1), on every token of response i, where R_i is
    the sum of its rewards (arXiv 2402.14740). Unlike there, the ratio of new to old probabilities
    is that of each token, and is clipped. At a ratio of 1 the gradient is the same.
    """
    totals = advantages.total_rewards(inputs.rewards, inputs.mask)
    estimates = advantages.leave_one_out(totals, ppo.samples_per_prompt)
    return Advantages(advantages=advantages.on_every_token(estimates, inputs.mask))


@advantage_estimator("grpo")
def group_relative(inputs: AdvantageInputs, ppo: configs.PPO) -> Advantages:
    """Normalise the totals of the responses to each prompt (Shao et al. 2024, GRPO).

    A_i = (R_i - mean(R)) / (std(R) + 1e-4), over the responses to a prompt, on every token of
    response i, where R_i is the sum of its rewards (arXiv 2402.03300, section 4.1.2). The paper
    leaves open which std it is. This is the sample's, with samples - 1, as in TRL and verl.
    """
    totals = advantages.total_rewards(inputs.rewards, inputs.mask)
    estimates = advantages.group_normalise(totals, ppo.samples_per_prompt)
    return Advantages(advantages=advantages.on_every_token(estimates, inputs.mask))


@advantage_estimator("dr_grpo")
def group_relative_unscaled(inputs: AdvantageInputs, ppo: configs.PPO) -> Advantages:
    """Subtract the group's mean and do not divide by its deviation (Liu et al. 2025, Dr. GRPO).

    A_i = R_i - mean(R), on every token of response i (arXiv 2503.20783). With the loss's constant
    in place of the response's length, easy and hard prompts, short and long responses count alike.
    """
    totals = advantages.total_rewards(inputs.rewards, inputs.mask)
    estimates = advantages.less_group_mean(totals, ppo.samples_per_prompt)
    return Advantages(advantages=advantages.on_every_token(estimates, inputs.mask))


@advantage_estimator("reinforce++")
def returns_to_go(inputs: AdvantageInputs, ppo: configs.PPO) -> Advantages:
    """Take the rewards from each token on, whitened over the rollout (Hu et al. 2025).

    A_t = sum over s >= t of gamma^(s - t) * rewards_s, then (A - mean) / std over all tokens
    (arXiv 2501.03262, REINFORCE++). It needs no second response to a prompt.
    """
    values = jnp.zeros_like(inputs.rewards)
    estimates, _ = advantages.gae(inputs.rewards, values, inputs.mask, ppo.gamma, 1.0)
    return Advantages(advantages=estimates)


@advantage_estimator("reinforce++_baseline")
def group_relative_whitened(inputs: AdvantageInputs, ppo: configs.PPO) -> Advantages:
    """Subtract the group's mean; whitening over the rollout follows (Hu et al. 2025).

    A_i = R_i - mean(R), on every token of response i, then (A - mean) / std over all tokens
    (arXiv 2501.03262, "REINFORCE++ w/ baseline"). RLOO, whitened, is the same.
    """
    return group_relative_unscaled(inputs, ppo)
