"""Mistral: Llama's format, in which all layers may see a window."""

from typing import Any

from alignjax.config import Model, UserError
from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    COMMON_DEFAULTS,
    SLIDING,
    TENSORS,
    read_common_config,
    read_layer_types,
    window_fields,
    write_common_config,
)

PRESETS = {
    "mistral-7b": {  # version 0.3
        "vocab_size": 32768,
        "d_model": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "head_size": 128,
        "d_ff": 14336,
        "rope_theta": 1000000.0,
        "max_length": 32768,
        "norm_eps": 1e-5,
    },
}
DEFAULTS = COMMON_DEFAULTS | {
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`; transformers takes no notice of `layer_types`."""
    fields = read_common_config(config)
    layers = fields["layers"]
    window = config.size_or("sliding_window", 0)
    types = read_layer_types(config, layers)
    if types is not None and any((kind == SLIDING) != bool(window) for kind in types):
        raise UserError(
            f"{config.where}: layer_types must be the same for all layers of a Mistral, with "
            f"sliding_window={window or None}"
        )
    return {**fields, **window_fields(config, [bool(window)] * layers, window)}


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has."""
    config = write_common_config(model) | {"sliding_window": model.window or None}
    config.pop("layer_types", None)
    return config


MISTRAL = Family(
    name="mistral",
    flags={"qkv_bias": False, "qk_norm": False},
    tensors=TENSORS,
    classes={"lm": "MistralForCausalLM", "scalar": "MistralForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=DEFAULTS,
)
