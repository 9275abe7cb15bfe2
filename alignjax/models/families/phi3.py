"""Phi-3, Phi-3.5 and Phi-4: fused projections, heads that are rotated in part, longrope."""

from typing import Any

from alignjax.config import Model
from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    ACTIVATIONS,
    COMMON_DEFAULTS,
    TENSORS,
    read_sizes,
    read_window_of_all,
    write_window_of_all,
)
from alignjax.models.families.rope_scaling import read_rope

# The projections that are one tensor in the files, one below the other in this order.
FUSED_TENSORS = {
    "layers/attention/q/kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_up_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.gate_up_proj.weight",
}
# Whatever transformers takes for longrope here; its first releases had other names for it.
SCALINGS = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
# The longrope of Phi-4-mini, for 48 pairs of numbers in each head.
PHI4_MINI_SHORT = ",".join(["1.0"] * 48)
PHI4_MINI_LONG = (
    "1.0,1.118320672,1.250641126,1.398617824,1.564103225,1.74916897,1.956131817,2.187582649,"
    "2.446418898,2.735880826,3.059592084,3.421605075,3.826451687,4.279200023,4.785517845,"
    "5.351743533,5.984965424,6.693110555,7.485043894,8.370679318,9.36110372,10.4687158,"
    "11.70738129,13.09260651,14.64173252,16.37415215,18.31155283,20.47818807,22.90118105,"
    "25.61086418,28.64115884,32.03,32.1,32.13,32.23,32.6,32.61,32.64,32.66,32.7,32.71,32.93,"
    "32.97,33.28,33.49,33.5,44.16,47.77"
)
PRESETS = {
    "phi-3-mini": {  # of 4096 tokens
        "vocab_size": 32064,
        "d_model": 3072,
        "layers": 32,
        "heads": 32,
        "kv_heads": 32,
        "head_size": 96,
        "d_ff": 8192,
        "max_length": 4096,
        "norm_eps": 1e-5,
        "layer_types": "window",
        "window": 2047,
    },
    "phi-4-mini": {
        "vocab_size": 200064,
        "d_model": 3072,
        "layers": 32,
        "heads": 24,
        "kv_heads": 8,
        "head_size": 128,
        "d_ff": 8192,
        "rope_share": 0.75,
        "rope_scaling": "longrope",
        "rope_factor": 32.0,
        "rope_original_length": 4096,
        "rope_short_factors": PHI4_MINI_SHORT,
        "rope_long_factors": PHI4_MINI_LONG,
        "max_length": 131072,
        "norm_eps": 1e-5,
        "tied": True,
        "layer_types": "window",
        "window": 262144,
    },
    "phi-4": {
        "vocab_size": 100352,
        "d_model": 5120,
        "layers": 40,
        "heads": 40,
        "kv_heads": 10,
        "head_size": 128,
        "d_ff": 17920,
        "rope_theta": 250000.0,
        "max_length": 16384,
        "norm_eps": 1e-5,
    },
}
DEFAULTS = COMMON_DEFAULTS | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`."""
    config.allow("hidden_act", *ACTIVATIONS)
    config.allow("attention_bias", False, None)
    fields = read_sizes(config)
    window = config.size_or("sliding_window", 0)
    return {
        **fields,
        **read_rope(config, fields["head_size"], SCALINGS, partial=True),
        **read_window_of_all(config, fields["layers"], window),
    }


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has.

    transformers 4 wants longrope with three settings exactly, and the original length at the top.
    """
    config = write_window_of_all(model) | {
        "partial_rotary_factor": model.rope_share,
        "original_max_position_embeddings": model.rope_original_length,
    }
    if model.rope_scaling:
        rope = dict(config["rope_scaling"])
        del rope["original_max_position_embeddings"]
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    return config


PHI3 = Family(
    name="phi3",
    flags={"qkv_bias": False, "qk_norm": False},
    tensors=TENSORS | FUSED_TENSORS,
    classes={"lm": "Phi3ForCausalLM", "scalar": "Phi3ForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=DEFAULTS,
)
