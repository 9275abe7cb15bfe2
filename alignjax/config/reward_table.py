"""The sources of a response's score, whichever way a config names them."""

from typing import Literal

from alignjax.config.fields import Config, Reward

SourceKind = Literal["model", "function", "endpoint"]

# Names of the sources that are named outside `ppo.rewards`.
FUNCTION = "function"  # ppo.reward_fn
MODEL = "reward"  # parents.reward


def is_config_file(spec: str) -> bool:
    """Return whether a parent is named by a config, rather than by a directory or hub name."""
    return spec.partition(":")[0].endswith(".py")


def is_function_spec(spec: str) -> bool:
    """Return whether a text has the form module:function; both parts may have dots."""
    module, _, function = spec.partition(":")
    return all(name.isidentifier() for name in [*module.split("."), *function.split(".")])


def kind_of_source(source: str) -> SourceKind:
    """Return what `Reward.source` names: an endpoint, a function, or else a reward model."""
    if source.lower().startswith(("http://", "https://")):
        return "endpoint"
    if is_function_spec(source) and not is_config_file(source):
        return "function"
    return "model"


def reward_table(config: Config) -> dict[str, Reward]:
    """Return {name: source} of all sources of a score.

    These are the entries of `ppo.rewards`, or else `ppo.reward_fn` and `parents.reward`.
    """
    ppo = config.ppo
    if ppo.rewards:
        return dict(ppo.rewards)
    table = {}
    if ppo.reward_fn:
        table[FUNCTION] = Reward(source=ppo.reward_fn, weight=ppo.reward_fn_weight)
    if "reward" in config.parents:
        table[MODEL] = Reward(source=config.parents["reward"], weight=ppo.reward_weight)
    return table


def role_of(config: Config, name: str) -> str:
    """Return the role of a reward model, by its name in `reward_table`."""
    return f"reward.{name}" if config.ppo.rewards else "reward"


def is_reward_role(role: str) -> bool:
    """Return whether a role is that of a reward model."""
    return role == "reward" or role.startswith("reward.")


def kind_of_role(role: str) -> str:
    """Return a role's name, and "reward" for any reward model."""
    return "reward" if is_reward_role(role) else role


def field_of_source(config: Config, name: str) -> str:
    """Return the field that names a source, by its name in `reward_table`."""
    if config.ppo.rewards:
        return f"ppo.rewards.{name}.source"
    return "ppo.reward_fn" if name == FUNCTION else "parents.reward"


def field_of_role(role: str) -> str:
    """Return the field that names the parent of a role."""
    if role.startswith("reward."):
        return f"ppo.rewards.{role.removeprefix('reward.')}.source"
    return f"parents.{role}"


def parent_specs(config: Config) -> dict[str, str]:
    """Return {role: parent} of all models that a run begins with or reads.

    A reward model of `ppo.rewards` has a role of its own.
    """
    specs = dict(config.parents)
    if config.stage == "ppo":
        for name, reward in config.ppo.rewards.items():
            if kind_of_source(reward.source) == "model":
                specs[role_of(config, name)] = reward.source
    return specs
