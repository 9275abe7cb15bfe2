"""IBM's Granite 3: Llama's format with four multipliers."""

from typing import Any

from alignjax.config import Model
from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    ALL_BIAS_TENSORS,
    LLAMA_DEFAULTS,
    TENSORS,
    read_biases,
    read_full_config,
    write_config_with_biases,
)

# Field of `config.Model` -> field of config.json.
MULTIPLIERS = {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_multiplier",
    "logits_divisor": "logits_scaling",
}
PRESETS = {
    "granite-3.3-2b": {
        "vocab_size": 49159,
        "d_model": 2048,
        "layers": 40,
        "heads": 32,
        "kv_heads": 8,
        "head_size": 64,
        "d_ff": 8192,
        "rope_theta": 10000000.0,
        "max_length": 131072,
        "norm_eps": 1e-5,
        "tied": True,
        "qkv_bias": False,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_divisor": 8.0,
    },
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`."""
    fields = {**read_full_config(config), **read_biases(config)}
    multipliers = {field: config.positive(name) for field, name in MULTIPLIERS.items()}
    if multipliers["attention_multiplier"] == fields["head_size"] ** -0.5:
        multipliers["attention_multiplier"] = 0.0
    return fields | multipliers


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has.

    An attention multiplier of 0 is written as the number that it stands for.
    """
    multipliers = {name: getattr(model, field) for field, name in MULTIPLIERS.items()}
    multipliers["attention_multiplier"] = model.attention_multiplier or model.head_size**-0.5
    return write_config_with_biases(model) | multipliers


GRANITE = Family(
    name="granite",
    flags={"qk_norm": False},
    tensors=TENSORS,
    optional=ALL_BIAS_TENSORS,
    classes={"lm": "GraniteForCausalLM"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=LLAMA_DEFAULTS | dict.fromkeys(MULTIPLIERS.values(), 1.0),
)
