"""Advantage estimators by name: from per-token rewards and values to advantages and returns.

To add one here, write a function and decorate it with `@advantage_estimator("name")`. From
outside the package, name it in a config: `ppo.advantage_estimator = "module:function"`. Either
way it is traced by jit, so it must be a pure function of its arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float

from alignjax import config as configs
from alignjax.algorithms import advantages, plugins
from alignjax.config import UserError, nearest


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
        return plugins.load_function("ppo.advantage_estimator", name)
    raise UserError(
        f"ppo.advantage_estimator={name!r} is no estimator{nearest(name, list(ESTIMATORS))}; "
        "one of your own is named module:function"
    )


@advantage_estimator("gae")
def generalised_advantages(inputs: AdvantageInputs, ppo: configs.PPO) -> Advantages:
    """Estimate advantages by GAE with `ppo.gamma` and `ppo.lam`."""
    estimates, returns = advantages.gae(
        inputs.rewards, inputs.values, inputs.mask, ppo.gamma, ppo.lam
    )
    return Advantages(advantages=estimates, returns=returns)
