"""Advantage estimators by name: from per-token rewards and values to advantages and returns.

To add one here, write a function and decorate it with `@advantage_estimator("name")`. From
outside the package, name it in a config: `ppo.advantage_estimator = "module:function"`. Either
way it is traced by jit, so it must be a pure function of its arrays.
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
from alignjax.config import UserError, nearest
from alignjax.machine import user_code


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AdvantageInputs:
    """What an estimator gets. Responses of one prompt are adjacent rows.

    `rewards` holds the KL penalty on each token and the normalised score on the last one.
    """

    rewards: Float[Array, "responses tokens"]
    values: Float[Array, "responses tokens"]  # of the value model, before each token
    mask: Bool[Array, "responses tokens"]  # the tokens of each response


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Advantages:
    """What an estimator returns; nothing is read where the mask does not hold.

    `advantages` are whitened afterwards if `ppo.whiten_advantages` says so. `returns` are the
    targets of the value model.
    """

    advantages: Float[Array, "responses tokens"]
    returns: Float[Array, "responses tokens"]


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
    raise UserError(
        f"ppo.advantage_estimator={name!r} is no estimator{nearest(name, list(ESTIMATORS))}; "
        "one of your own is named module:function"
    )


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
    inputs = AdvantageInputs(rewards=numbers, values=numbers, mask=mask)
    jax.eval_shape(lambda inputs: find_estimator(ppo.advantage_estimator)(inputs, ppo), inputs)


@advantage_estimator("gae")
def generalised_advantages(inputs: AdvantageInputs, ppo: configs.PPO) -> Advantages:
    """Estimate advantages by GAE with `ppo.gamma` and `ppo.lam`."""
    estimates, returns = advantages.gae(
        inputs.rewards, inputs.values, inputs.mask, ppo.gamma, ppo.lam
    )
    return Advantages(advantages=estimates, returns=returns)
