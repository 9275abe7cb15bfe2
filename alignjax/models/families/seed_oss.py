"""Seed-OSS: Llama's format with biases on queries, keys and values."""

from typing import Any

from alignjax.config import Model
from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    ALL_BIAS_TENSORS,
    COMMON_DEFAULTS,
    TENSORS,
    read_full_config,
    read_mlp_bias,
    write_common_config,
)

PRESETS = {
    "seed-oss-36b": {
        "vocab_size": 155136,
        "d_model": 5120,
        "layers": 64,
        "heads": 80,
        "kv_heads": 8,
        "head_size": 128,
        "d_ff": 27648,
        "rope_theta": 10000000.0,
        "max_length": 524288,
    },
}
DEFAULTS = COMMON_DEFAULTS | {
    "vocab_size": 155136,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "max_position_embeddings": 524288,
    "head_dim": 128,
    "attention_bias": True,
    "attention_out_bias": False,
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`."""
    return {
        **read_full_config(config),
        **read_mlp_bias(config),
        "qkv_bias": config.flag("attention_bias"),
        "out_bias": config.flag("attention_out_bias"),
    }


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has."""
    return write_common_config(model) | {
        "attention_bias": model.qkv_bias,
        "attention_out_bias": model.out_bias,
        "mlp_bias": model.mlp_bias,
        "residual_dropout": 0.0,
    }


SEED_OSS = Family(
    name="seed_oss",
    flags={"qk_norm": False},
    tensors=TENSORS,
    optional=ALL_BIAS_TENSORS,
    classes={"lm": "SeedOssForCausalLM", "scalar": "SeedOssForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=DEFAULTS,
)
