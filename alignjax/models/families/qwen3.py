"""Qwen3: Llama's format with norms on queries and keys."""

from typing import Any

from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    COMMON_DEFAULTS,
    QK_NORM_TENSORS,
    TENSORS,
    read_config_without_bias,
    write_config,
)

PRESETS = {
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "d_model": 1024,
        "layers": 28,
        "heads": 16,
        "kv_heads": 8,
        "head_size": 128,
        "d_ff": 3072,
        "rope_theta": 1000000.0,
        "max_length": 40960,
        "tied": True,
    },
}
# What transformers takes for a field that config.json lacks.
DEFAULTS = COMMON_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 4096,
    "num_key_value_heads": 32,
    "head_dim": 128,
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`; the size of a head is a number of its own."""
    config.require("head_dim")
    return read_config_without_bias(config)


QWEN3 = Family(
    name="qwen3",
    flags={"qkv_bias": False, "qk_norm": True},
    tensors=TENSORS | QK_NORM_TENSORS,
    classes={"lm": "Qwen3ForCausalLM", "scalar": "Qwen3ForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=DEFAULTS,
)
