"""The rules of `ppo.rewards`."""

import math
import re
import urllib.parse

from alignjax.config.errors import rule
from alignjax.config.fields import NORMALISATIONS, Config, Reward
from alignjax.config.reward_table import kind_of_source

REWARD_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_rewards(config: Config) -> None:
    """Check the table of rewards, and that no field beside it would be ignored."""
    ppo = config.ppo
    if not ppo.rewards:
        return
    rule(
        "reward" not in config.parents,
        f"parents.reward={config.parents.get('reward')!r} would be ignored, because ppo.rewards "
        f"has {', '.join(ppo.rewards)}: make it an entry, ppo.rewards.NAME.source",
    )
    rule(
        not ppo.reward_fn,
        f"ppo.reward_fn={ppo.reward_fn!r} would be ignored, because ppo.rewards has "
        f"{', '.join(ppo.rewards)}: make it an entry, ppo.rewards.NAME.source",
    )
    for key in ("reward_weight", "reward_fn_weight"):
        value = getattr(ppo, key)
        rule(
            value == 1,
            f"ppo.{key}={value} would be ignored, because ppo.rewards has "
            f"{', '.join(ppo.rewards)}: set ppo.rewards.NAME.weight",
        )
    for name, reward in ppo.rewards.items():
        check_reward(name, reward)
    rule(
        any(reward.weight for reward in ppo.rewards.values()),
        "ppo.rewards: all weights are 0, so there is no score to learn from",
    )


def check_reward(name: str, reward: Reward) -> None:
    """Check one entry of the table of rewards."""
    where = f"ppo.rewards.{name}"
    rule(
        bool(REWARD_NAME.fullmatch(name)),
        f"{where}: {name!r} must be a name of letters, digits, '_' and '-', since metrics are "
        "named after it",
    )
    rule(
        bool(reward.source.strip()),
        f"{where}.source={reward.source!r} must name a reward model, a function module:function "
        "or an endpoint http://...",
    )
    rule(math.isfinite(reward.weight), f"{where}.weight={reward.weight} must be finite")
    options = ", ".join(map(repr, NORMALISATIONS))
    rule(
        reward.normalise in NORMALISATIONS,
        f"{where}.normalise={reward.normalise!r} must be one of {options}",
    )
    rule(reward.batch >= 1, f"{where}.batch={reward.batch} must be at least 1")
    rule(reward.retries >= 0, f"{where}.retries={reward.retries} must not be below 0")
    rule(
        0 < reward.timeout < math.inf,
        f"{where}.timeout={reward.timeout} must be above 0 and finite",
    )
    kind = kind_of_source(reward.source)
    for key in ("batch", "timeout", "retries"):
        value = getattr(reward, key)
        rule(
            kind == "endpoint" or value == getattr(Reward(), key),
            f"{where}.{key}={value} has a meaning for an endpoint only, but "
            f"{where}.source={reward.source!r} is a {kind}",
        )
    if kind == "endpoint":
        check_url(f"{where}.source", reward.source)


def check_url(field: str, url: str) -> None:
    """Check that an endpoint's address has a host, and neither blanks nor a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number
        is_address = False
    is_printable = url.isascii() and url.isprintable() and " " not in url
    rule(
        is_address and is_printable,
        f"{field}={url!r} must be an address such as http://localhost:5000/score",
    )
    rule(
        parts.username is None and parts.password is None,
        f"{field}: a name or a password in an address is not supported; it would be in config.json",
    )
