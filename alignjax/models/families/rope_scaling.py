"""Scaled rotary embeddings in config.json: transformers 5 and the versions before it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from alignjax.config import ROPE_BY_LENGTH, Model, UserError
from alignjax.models.families.hf_config import HFConfig, is_real, shown
from alignjax.models.rope import magnitude_of

DEFAULT_THETA = 10000.0
KINDS = ("default", "linear", "llama3", "yarn", *ROPE_BY_LENGTH)
# Settings that change the result if they have any other value than these.
UNSUPPORTED_UNLESS = {"partial_rotary_factor": 1.0, "mrope_section": None}
RopeFields = dict[str, Any]  # the rope_* fields of `config.Model`


def read_rope(
    config: HFConfig, head_size: int, kinds: Mapping[str, str] | None = None, partial: bool = False
) -> RopeFields:
    """Return the rope_* fields of `config.Model`.

    transformers 5 has all of them in `rope_parameters`; before, `rope_theta` was beside
    `rope_scaling`. Where a file has both, transformers takes `rope_scaling` alone, because it is
    what a user adds by hand.

    Args:
      config: the whole file.
      head_size: of the model.
      kinds: the names of the scalings that the family has, and which of KINDS each is; by default
        those of KINDS.
      partial: whether the family can leave a part of each head as it is.
    """
    kinds = kinds or dict(zip(KINDS, KINDS, strict=True))
    added = config.object("rope_scaling")
    rope = added if added.values else config.object("rope_parameters")
    refuse_unsupported(config, rope, partial)
    name = rope.values.get("rope_type", rope.values.get("type", "default"))
    if not isinstance(name, str) or name not in kinds:
        config.refuse(
            f"{config.where}: {rope.prefix}rope_type={shown(name)} is not supported, only "
            f"{', '.join(map(repr, kinds))}"
        )
        name = "default"
    fields: RopeFields = {"rope_theta": read_theta(config, rope)}
    if partial:
        fields["rope_share"] = read_share(config, rope, head_size)
    kind = kinds[name]
    if kind == "default":
        return fields
    fields["rope_scaling"] = kind
    if kind == "linear":
        return fields | {"rope_factor": rope.positive("factor")}
    if kind == "dynamic":
        return fields | read_dynamic(config, rope, head_size)
    fields["rope_original_length"] = read_original_length(config, rope)
    if kind == "llama3":
        return fields | read_llama3(rope)
    if kind == "longrope":
        return fields | read_longrope(config, rope, Model(head_size=head_size, **fields))
    return fields | read_yarn(config, rope, fields)


def refuse_unsupported(config: HFConfig, rope: HFConfig, partial: bool) -> None:
    """Raise UserError for a setting of RoPE that we don't compute."""
    for name, supported in UNSUPPORTED_UNLESS.items():
        if partial and name == "partial_rotary_factor":
            continue
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


def read_share(config: HFConfig, rope: HFConfig, head_size: int) -> float:
    """Return the share of a head that is rotated, which may be beside the other settings."""
    name = "partial_rotary_factor"
    source = rope if name in rope.values else config
    if name not in source.values:
        return 1.0
    share = source.positive(name)
    size = int(head_size * share)
    source.expect(
        name,
        share <= 1 and size % 2 == 0 and size > 0,
        f"at most 1, and {head_size} times it an even number",
    )
    return share


def read_original_length(config: HFConfig, rope: HFConfig) -> int:
    """Return the length before scaling; as in transformers, one at the top comes first."""
    name = "original_max_position_embeddings"
    for source in (config, rope):
        if name in source.values or name in source.defaults:
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
    return fields | read_magnitude(rope, Model(**common, **fields))


def read_magnitude(rope: HFConfig, model: Model) -> RopeFields:
    """Return the factor on cosine and sine if settings ask for another one than the formula's."""
    given = rope.get("attention_factor")
    scale = rope.get("mscale")
    scale_of_all = rope.get("mscale_all_dim")
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        value = rope.get(name)
        rope.expect(name, value is None or is_real(value), "a number or null")
    if given is not None:
        wanted = rope.positive("attention_factor")
    elif model.rope_scaling == "yarn" and scale and scale_of_all:
        wanted = magnitude(model.rope_factor, scale) / magnitude(model.rope_factor, scale_of_all)
        rope.expect("mscale", 0 < wanted < math.inf, "such that its factor is a number above 0")
    else:
        return {}
    if math.isclose(wanted, magnitude_of(model), rel_tol=1e-6):
        return {}
    return {"rope_magnitude": float(wanted)}


def magnitude(factor: float, scale: float) -> float:
    """Return YaRN's factor on cosine and sine with a scale of its logarithm."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_dynamic(config: HFConfig, rope: HFConfig, head_size: int) -> RopeFields:
    """Return the fields of dynamic scaling, which begins where the model's positions end."""
    if head_size <= 2:
        raise UserError(
            f"{config.where}: {rope.prefix}rope_type='dynamic' needs heads of more than "
            f"{head_size} numbers"
        )
    return {
        "rope_factor": rope.positive("factor"),
        "rope_original_length": config.size("max_position_embeddings"),
    }


def read_longrope(config: HFConfig, rope: HFConfig, model: Model) -> RopeFields:
    """Return the fields of longrope's scaling; `model` has the others."""
    original = model.rope_original_length
    if original < 2:
        raise UserError(
            f"{config.where}: original_max_position_embeddings={original} must be above 1"
        )
    if rope.get("factor") is None:
        factor = config.size("max_position_embeddings") / original
    else:
        factor = rope.positive("factor")
    scaled = dataclasses.replace(model, rope_factor=factor)
    return {
        "rope_factor": factor,
        "rope_short_factors": read_factors(rope, "short_factor", model.rotary_size // 2),
        "rope_long_factors": read_factors(rope, "long_factor", model.rotary_size // 2),
        **read_magnitude(rope, scaled),
    }


def read_factors(rope: HFConfig, name: str, count: int) -> str:
    """Read a list of numbers above 0; return them as text, separated by commas."""
    numbers = rope.require(name)
    is_list = isinstance(numbers, list) and len(numbers) == count
    is_list = is_list and all(is_real(one) and 0 < one < math.inf for one in numbers)
    rope.expect(name, is_list, f"a list of {count} numbers above 0")
    return ",".join(repr(float(one)) for one in numbers)


def write_rope(model: Model) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling`, which all versions of transformers read."""
    return {"rope_theta": model.rope_theta, "rope_scaling": rope_scaling(model)}


def rope_scaling(model: Model) -> dict[str, Any] | None:
    """Return the content of `rope_scaling`, or None if frequencies are not scaled."""
    if not model.rope_scaling:
        return None
    rope: dict[str, Any] = {"rope_type": model.rope_scaling}
    if model.rope_scaling != "longrope" or longrope_length(model) is None:
        rope["factor"] = model.rope_factor
    if model.rope_magnitude:
        rope["attention_factor"] = model.rope_magnitude
    if model.rope_scaling == "llama3":
        rope["low_freq_factor"] = model.rope_low_factor
        rope["high_freq_factor"] = model.rope_high_factor
    elif model.rope_scaling == "yarn":
        rope["beta_slow"] = model.rope_low_factor
        rope["beta_fast"] = model.rope_high_factor
    elif model.rope_scaling == "longrope":
        rope["short_factor"] = [float(one) for one in model.rope_short_factors.split(",")]
        rope["long_factor"] = [float(one) for one in model.rope_long_factors.split(",")]
    if model.rope_scaling not in ("linear", "dynamic"):
        rope["original_max_position_embeddings"] = model.rope_original_length
    return rope


def known_length(model: Model) -> int:
    """Return `max_position_embeddings`; where a scaling depends on it, whatever a run reads."""
    if model.rope_scaling == "dynamic":
        return model.rope_original_length
    if model.rope_scaling == "longrope":
        return longrope_length(model) or model.max_length
    return model.max_length


def longrope_length(model: Model) -> int | None:
    """Return the whole number that gives longrope's factor over the original length, or None."""
    length = round(model.rope_factor * model.rope_original_length)
    return length if length / model.rope_original_length == model.rope_factor else None
