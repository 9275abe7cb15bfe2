"""The rules of PPO's estimator, KL penalty and clips: what fits, and what would be ignored."""

from alignjax.config.errors import rule
from alignjax.config.estimators import Needs, needs_of
from alignjax.config.fields import Config, flatten

# Beginnings of the names of fields that only a value model reads.
VALUE_FIELDS = ("value_optimiser.", "ppo.value_", "ppo.lam")


def check_estimator(config: Config) -> None:
    """Check that the config suits its advantage estimator, and that no field is ignored."""
    needs = needs_of(config)
    ppo = config.ppo
    name = f"ppo.advantage_estimator={ppo.advantage_estimator!r}"
    if not needs.value:
        check_without_value(config, f"{name} has no value model")
    if not needs.gamma:
        check_default(config, "ppo.gamma", f"{name} does not discount")
    rule(
        not needs.group or ppo.samples_per_prompt >= 2,
        f"ppo.samples_per_prompt={ppo.samples_per_prompt} must be at least 2: {name} compares the "
        "responses to a prompt",
    )
    check_whitening(config, needs)
    check_kl(config)
    check_clips(config)
    check_length_penalty(config)


def check_default(config: Config, field: str, reason: str) -> None:
    """Check that a field that would be ignored has its default value."""
    value = dict(flatten(config))[field]
    default = dict(flatten(Config()))[field]
    rule(value == default, f"{field}={value!r} would be ignored: {reason}")


def check_without_value(config: Config, reason: str) -> None:
    """Check that the config names no value model and sets none of its fields."""
    role = config.parents.get("value")
    rule(role is None, f"parents.value={role!r} would be ignored: {reason}")
    for field, value in flatten(config):
        # 0 is what the warm-up of a value model amounts to if there is none.
        if field.startswith(VALUE_FIELDS) and (field, value) != ("ppo.value_warmup_steps", 0):
            check_default(config, field, reason)


def check_whitening(config: Config, needs: Needs) -> None:
    """Check that advantages are whitened where the estimator's equation says so."""
    name = config.ppo.advantage_estimator
    whitens = config.ppo.whiten_advantages
    wanted = needs.whitened
    reason = "has a scale of its own" if wanted is False else "is whitened over the rollout"
    rule(
        wanted is None or whitens == wanted,
        f"ppo.whiten_advantages={whitens} must be {wanted}: ppo.advantage_estimator={name!r} "
        f"{reason}",
    )


def check_kl(config: Config) -> None:
    """Check the KL penalty, and what adapts its coefficient."""
    ppo = config.ppo
    rule(
        ppo.kl_in == "reward" or ppo.kl_estimator != "k1",
        "ppo.kl_estimator='k1' would be ignored in the loss, where its mean gradient is 0; "
        "ppo.kl_in='loss' needs 'k2' or 'k3'",
    )
    rule(
        not ppo.kl_target or ppo.kl_coef > 0,
        f"ppo.kl_target={ppo.kl_target} would be ignored: it scales ppo.kl_coef, which is 0",
    )
    if not ppo.kl_target:
        check_default(config, "ppo.kl_horizon", "ppo.kl_target is 0")


def check_clips(config: Config) -> None:
    """Check the bounds of the ratio, and lambda of the value targets."""
    ppo = config.ppo
    upper = 1 + (ppo.clip_high or ppo.clip)
    rule(
        not ppo.dual_clip or ppo.dual_clip > upper,
        f"ppo.dual_clip={ppo.dual_clip} must be 0 or above the ratio's upper bound {upper:g}",
    )
    rule(
        ppo.value_lam == -1 or ppo.value_lam >= 0,
        f"ppo.value_lam={ppo.value_lam} must be -1, which is ppo.lam, or not below 0",
    )


def check_length_penalty(config: Config) -> None:
    """Check the penalty on responses that come close to the limit of their length."""
    ppo = config.ppo
    rule(
        ppo.overlong_buffer <= ppo.response_length,
        f"ppo.overlong_buffer={ppo.overlong_buffer} is over "
        f"ppo.response_length={ppo.response_length}",
    )
    if not ppo.overlong_buffer:
        check_default(config, "ppo.overlong_penalty", "ppo.overlong_buffer is 0")
