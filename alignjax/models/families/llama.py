"""Llama 3, and other models of its format, with biases or without."""

from typing import Any

from alignjax.config import UserError
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

PRESETS = {
    "llama3-8b": {
        "vocab_size": 128256,
        "d_model": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "head_size": 128,
        "d_ff": 14336,
        "rope_theta": 500000.0,
        "max_length": 8192,
        "norm_eps": 1e-5,
        "qkv_bias": False,
    },
    "llama3.1-8b": {
        "vocab_size": 128256,
        "d_model": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "head_size": 128,
        "d_ff": 14336,
        "rope_theta": 500000.0,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_low_factor": 1.0,
        "rope_high_factor": 4.0,
        "rope_original_length": 8192,
        "max_length": 131072,
        "norm_eps": 1e-5,
        "qkv_bias": False,
    },
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`; as transformers does, refuse heads that leave a rest."""
    fields = read_full_config(config)
    if fields["d_model"] % fields["heads"]:
        raise UserError(
            f"{config.where}: num_attention_heads={fields['heads']} must divide "
            f"hidden_size={fields['d_model']}"
        )
    return {**fields, **read_biases(config)}


LLAMA = Family(
    name="llama",
    flags={"qk_norm": False},
    tensors=TENSORS,
    optional=ALL_BIAS_TENSORS,
    classes={"lm": "LlamaForCausalLM", "scalar": "LlamaForSequenceClassification"},
    read_config=read_config,
    write_config=write_config_with_biases,
    presets=PRESETS,
    defaults=LLAMA_DEFAULTS,
)
