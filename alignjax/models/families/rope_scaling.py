"""Scaled rotary embeddings in config.json: transformers 5 and the versions before it."""

from collections.abc import Mapping
from typing import Any

from alignjax.config import Model, UserError
from alignjax.models.families.family import HFConfig

KINDS = ("default", "linear", "llama3", "yarn")
# Older configs have some of these fields at their defaults. Other values change the result.
UNSUPPORTED_UNLESS = {
    "partial_rotary_factor": 1.0,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}


def read_rope(config: HFConfig) -> dict[str, Any]:
    """Return the rope_* fields of `config.Model`.

    transformers 5 has all of them in `rope_parameters`; before, `rope_theta` stood beside
    `rope_scaling`.
    """
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(field) or {}
    refuse_unsupported(config, field, rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.values.get("rope_theta", 10000.0))
    fields = {"rope_theta": float(theta)}
    if kind == "default":
        return fields
    if kind not in KINDS:
        raise UserError(
            f"{config.where}: {field}.rope_type={kind!r} must be one of "
            f"{', '.join(map(repr, KINDS))}"
        )

    def require(key: str) -> float:
        if rope.get(key) is None:
            raise UserError(f"{config.where}: {field}.{key} is missing, which {kind!r} needs")
        return float(rope[key])

    fields |= {"rope_scaling": kind, "rope_factor": require("factor")}
    if kind == "linear":
        return fields
    original = rope.get("original_max_position_embeddings")
    fields["rope_original_length"] = int(original or config.require("max_position_embeddings"))
    if kind == "llama3":
        fields["rope_low_factor"] = require("low_freq_factor")
        fields["rope_high_factor"] = require("high_freq_factor")
    else:
        fields["rope_low_factor"] = float(rope.get("beta_slow") or 1)
        fields["rope_high_factor"] = float(rope.get("beta_fast") or 32)
    return fields


def refuse_unsupported(config: HFConfig, field: str, rope: Mapping[str, Any]) -> None:
    """Raise UserError for a setting of RoPE that we don't compute."""
    for key, supported in UNSUPPORTED_UNLESS.items():
        value = rope.get(key, config.values.get(key, supported))
        if value != supported:
            raise UserError(
                f"{config.where}: {field}.{key}={value!r} is not supported, only {supported!r}"
            )


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
