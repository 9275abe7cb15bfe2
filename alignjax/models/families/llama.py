"""Llama 3."""

from typing import Any

from alignjax.config import UserError
from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    COMMON_DEFAULTS,
    TENSORS,
    read_config_without_bias,
    write_config,
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
    },
}
# What transformers takes for a field that config.json lacks.
DEFAULTS = COMMON_DEFAULTS | {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`; as transformers does, refuse heads that leave a rest."""
    fields = read_config_without_bias(config)
    if fields["d_model"] % fields["heads"]:
        raise UserError(
            f"{config.where}: num_attention_heads={fields['heads']} must divide "
            f"hidden_size={fields['d_model']}"
        )
    return fields


LLAMA = Family(
    name="llama",
    flags={"qkv_bias": False, "qk_norm": False},
    tensors=TENSORS,
    classes={"lm": "LlamaForCausalLM", "scalar": "LlamaForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=DEFAULTS,
)
