"""Mistral: Llama's format, in which all layers may see a window."""

from typing import Any

from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    COMMON_DEFAULTS,
    TENSORS,
    read_common_config,
    read_window_of_all,
    write_window_of_all,
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
    window = config.size_or("sliding_window", 0)
    return {**fields, **read_window_of_all(config, fields["layers"], window)}


MISTRAL = Family(
    name="mistral",
    flags={"qkv_bias": False, "qk_norm": False},
    tensors=TENSORS,
    classes={"lm": "MistralForCausalLM", "scalar": "MistralForSequenceClassification"},
    read_config=read_config,
    write_config=write_window_of_all,
    presets=PRESETS,
    defaults=DEFAULTS,
)
