"""OLMo 2: norms after attention and feed-forward, and over all heads of queries and keys."""

from typing import Any

from alignjax.config import Model
from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    ATTENTION_BIAS_TENSORS,
    LLAMA_DEFAULTS,
    QK_NORM_TENSORS,
    TENSORS,
    read_attention_bias,
    read_full_config,
    write_attention_bias,
    write_common_config,
)

OLMO2_TENSORS = {path: name for path, name in TENSORS.items() if "/norm" not in path} | {
    "layers/post_norm1/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/post_norm2/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
PRESETS = {
    "olmo2-7b": {
        "vocab_size": 100352,
        "d_model": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 32,
        "head_size": 128,
        "d_ff": 11008,
        "rope_theta": 500000.0,
        "max_length": 4096,
        "qkv_bias": False,
    },
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`."""
    return {**read_full_config(config), **read_attention_bias(config)}


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has."""
    return write_common_config(model) | write_attention_bias(model)


OLMO2 = Family(
    name="olmo2",
    flags={"qk_norm": True, "qk_norm_over": "width", "norms": "after"},
    tensors=OLMO2_TENSORS | QK_NORM_TENSORS,
    optional=ATTENTION_BIAS_TENSORS,
    classes={"lm": "Olmo2ForCausalLM", "scalar": "Olmo2ForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=LLAMA_DEFAULTS | {"vocab_size": 50304, "rms_norm_eps": 1e-5},
)
