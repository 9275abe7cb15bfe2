"""Qwen3: Llama's format with norms on queries and keys."""

from typing import Any

from alignjax.config import Model
from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    ATTENTION_BIAS_TENSORS,
    QK_NORM_TENSORS,
    QWEN_DEFAULTS,
    TENSORS,
    read_attention_bias,
    read_qwen_config,
    write_attention_bias,
    write_common_config,
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
        "qkv_bias": False,
    },
    "qwen3-8b": {
        "vocab_size": 151936,
        "d_model": 4096,
        "layers": 36,
        "heads": 32,
        "kv_heads": 8,
        "head_size": 128,
        "d_ff": 12288,
        "rope_theta": 1000000.0,
        "max_length": 40960,
        "qkv_bias": False,
    },
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`; the size of a head is a number of its own."""
    config.require("head_dim")
    return {**read_qwen_config(config), **read_attention_bias(config)}


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has."""
    return write_common_config(model) | write_attention_bias(model)


QWEN3 = Family(
    name="qwen3",
    flags={"qk_norm": True},
    tensors=TENSORS | QK_NORM_TENSORS,
    optional=ATTENTION_BIAS_TENSORS,
    classes={"lm": "Qwen3ForCausalLM", "scalar": "Qwen3ForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=QWEN_DEFAULTS | {"head_dim": 128},
)
