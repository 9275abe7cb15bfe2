"""What each advantage estimator needs: roles, several responses to a prompt, its loss.

`algorithms.estimators` has the functions. This table is here because the rules of a config, its
parents and the plan of a run depend on it.
"""

from dataclasses import dataclass

from alignjax.config.errors import UserError, nearest
from alignjax.config.fields import Config


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an advantage estimator needs."""

    value: bool = False  # a value model
    group: bool = False  # several responses to each prompt, which it compares
    gamma: bool = False  # it discounts by `ppo.gamma`
    # How tokens are weighted in the policy's loss if `ppo.loss_aggregation` is "".
    aggregation: str = "token"
    # Whether its advantages are whitened over the rollout; None leaves it to the config.
    whitened: bool | None = None


ESTIMATORS = {
    "gae": Needs(value=True, gamma=True),
    "rloo": Needs(group=True, aggregation="constant", whitened=False),
    "grpo": Needs(group=True, aggregation="sequence", whitened=False),
    "dr_grpo": Needs(group=True, aggregation="constant", whitened=False),
    "reinforce++": Needs(gamma=True, whitened=True),
    "reinforce++_baseline": Needs(group=True, whitened=True),
}


def is_external(config: Config) -> bool:
    """Return whether the estimator is a user's function, named module:function."""
    return ":" in config.ppo.advantage_estimator


def needs_of(config: Config) -> Needs:
    """Return what the estimator of a config needs.

    A user's function has a value model if `parents` names one.

    Raises:
      UserError: if there is no estimator of that name.
    """
    name = config.ppo.advantage_estimator
    if is_external(config):
        return Needs(value="value" in config.parents, gamma=True)
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    raise UserError(
        f"ppo.advantage_estimator={name!r} is no estimator{nearest(name, list(ESTIMATORS))}; "
        "one of your own is named module:function"
    )


def has_value(config: Config) -> bool:
    """Return whether a run of PPO has a value model."""
    return needs_of(config).value


def trained_roles(config: Config) -> tuple[str, ...]:
    """Return the roles that a run of PPO trains."""
    return ("policy", "value") if has_value(config) else ("policy",)


def value_warmup_steps(config: Config) -> int:
    """Return how many updates come before the policy's first one."""
    return config.ppo.value_warmup_steps if has_value(config) else 0


def loss_aggregation(config: Config) -> str:
    """Return how the tokens of a minibatch are weighted in the policy's loss."""
    return config.ppo.loss_aggregation or needs_of(config).aggregation
