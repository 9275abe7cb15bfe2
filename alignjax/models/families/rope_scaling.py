"""Scaled rotary embeddings in config.json: transformers 5 and the versions before it."""

import math
from typing import Any

from alignjax.config import Model, UserError
from alignjax.models.families.hf_config import HFConfig, is_real, shown
from alignjax.models.rope import yarn_magnitude

DEFAULT_THETA = 10000.0
KINDS = ("default", "linear", "llama3", "yarn")
# Settings that change the result if they have any other value than these.
UNSUPPORTED_UNLESS = {"partial_rotary_factor": 1.0, "mrope_section": None}
RopeFields = dict[str, Any]  # the rope_* fields of `config.Model`


def read_rope(config: HFConfig) -> RopeFields:
    """Return the rope_* fields of `config.Model`.

    transformers 5 has all of them in `rope_parameters`; before, `rope_theta` was beside
    `rope_scaling`. Where a file has both, transformers takes `rope_scaling` alone, because it is
    what a user adds by hand.
    """
    added = config.object("rope_scaling")
    rope = added if added.values else config.object("rope_parameters")
    refuse_unsupported(config, rope)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in KINDS:
        config.refuse(
            f"{config.where}: {rope.prefix}rope_type={shown(kind)} is not supported, only "
            f"{', '.join(map(repr, KINDS))}"
        )
        kind = "default"
    fields: RopeFields = {"rope_theta": read_theta(config, rope)}
    if kind == "default":
        return fields
    fields["rope_scaling"] = kind
    if kind == "linear":
        return fields | {"rope_factor": rope.positive("factor")}
    fields["rope_original_length"] = read_original_length(config, rope)
    if kind == "llama3":
        return fields | read_llama3(rope)
    return fields | read_yarn(config, rope, fields)


def refuse_unsupported(config: HFConfig, rope: HFConfig) -> None:
    """Raise UserError for a setting of RoPE that we don't compute."""
    for name, supported in UNSUPPORTED_UNLESS.items():
        rope.allow(name, supported)
        if name not in rope.values:
            config.allow(name, supported, None)
    for name, value in rope.values.items():
        if isinstance(value, dict):
            raise UserError(
                f"{config.where}: {rope.prefix}{name}={shown(value)} is not supported: "
                "all layers must rotate alike"
            )


def read_theta(config: HFConfig, rope: HFConfig) -> float:
    """Return the base of the wavelengths, which may be beside the other settings."""
    for source in (rope, config):
        if "rope_theta" in source.values:
            return source.positive("rope_theta")
    return config.defaults.get("rope_theta", DEFAULT_THETA)


def read_original_length(config: HFConfig, rope: HFConfig) -> int:
    """Return the length before scaling; as in transformers, one at the top comes first."""
    name = "original_max_position_embeddings"
    for source in (config, rope):
        if name in source.values:
            value = source.positive(name)
            source.expect(name, value == int(value), "a whole number")
            return int(value)
    return config.size("max_position_embeddings")


def read_llama3(rope: HFConfig) -> RopeFields:
    """Return the fields of llama3's scaling."""
    low = rope.positive("low_freq_factor")
    high = rope.positive("high_freq_factor")
    if low >= high:
        raise UserError(
            f"{rope.where}: {rope.prefix}low_freq_factor={low:g} must be below "
            f"high_freq_factor={high:g}"
        )
    return {
        "rope_factor": rope.positive("factor"),
        "rope_low_factor": low,
        "rope_high_factor": high,
    }


def read_yarn(config: HFConfig, rope: HFConfig, common: RopeFields) -> RopeFields:
    """Return the fields of YaRN's scaling; `common` has the others."""
    rope.allow("truncate", True)
    # transformers takes an explicit null as the ratio of the lengths, and 0 as not given.
    if rope.values.get("factor", "absent") is None:
        factor = config.size("max_position_embeddings") / common["rope_original_length"]
    else:
        factor = rope.positive("factor")
    fields = {
        "rope_factor": factor,
        "rope_low_factor": rope.number("beta_slow") if rope.get("beta_slow") else 1.0,
        "rope_high_factor": rope.number("beta_fast") if rope.get("beta_fast") else 32.0,
    }
    theta = common["rope_theta"]
    if theta == 1.0:
        raise UserError(f"{rope.where}: rope_theta={theta:g} leaves YaRN without wavelengths")
    check_magnitude(rope, Model(**common, **fields))
    return fields


def check_magnitude(rope: HFConfig, model: Model) -> None:
    """Raise UserError if settings ask for another factor on cosine and sine than we compute."""
    ours = yarn_magnitude(model)
    given = rope.get("attention_factor")
    scale = rope.get("mscale")
    scale_of_all = rope.get("mscale_all_dim")
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        value = rope.get(name)
        rope.expect(name, value is None or is_real(value), "a number or null")
    if given is not None:
        name = "attention_factor"
        wanted = given
    elif scale and scale_of_all:
        name = "mscale"
        wanted = magnitude(model.rope_factor, scale) / magnitude(model.rope_factor, scale_of_all)
    else:
        return
    if not math.isclose(wanted, ours, rel_tol=1e-6):
        raise UserError(
            f"{rope.where}: {rope.prefix}{name}={shown(rope.get(name))} is not supported: it asks "
            f"for a factor of {wanted:.6g}, and only {ours:.6g} is computed"
        )


def magnitude(factor: float, scale: float) -> float:
    """Return YaRN's factor on cosine and sine with a scale of its logarithm."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(model: Model) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling`, which all versions of transformers read."""
    return {"rope_theta": model.rope_theta, "rope_scaling": rope_scaling(model)}


def rope_scaling(model: Model) -> dict[str, Any] | None:
    """Return the content of `rope_scaling`, or None if frequencies are not scaled."""
    if not model.rope_scaling:
        return None
    rope = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling == "linear":
        return rope
    if model.rope_scaling == "llama3":
        rope["low_freq_factor"] = model.rope_low_factor
        rope["high_freq_factor"] = model.rope_high_factor
    else:
        rope["beta_slow"] = model.rope_low_factor
        rope["beta_fast"] = model.rope_high_factor
    rope["original_max_position_embeddings"] = model.rope_original_length
    return rope
