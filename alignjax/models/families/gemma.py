"""Gemma 2 and the text models of Gemma 3: norms of 1 + w on both sides, GELU, caps, windows."""

import dataclasses
from typing import Any

from alignjax.config import Model
from alignjax.models import layer_kinds
from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    ATTENTION_BIAS_TENSORS,
    QK_NORM_TENSORS,
    SLIDING,
    TENSORS,
    read_attention_bias,
    read_layer_types,
    read_sizes,
    window_fields,
    write_attention_bias,
    write_common_config,
)
from alignjax.models.families.rope_scaling import read_rope, rope_scaling

FULL = "full_attention"
ACTIVATION = "gelu_pytorch_tanh"
GEMMA_TENSORS = TENSORS | {
    "layers/post_norm1/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/norm2/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/post_norm2/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
FLAGS = {"norms": "both", "norm_plus_one": True, "activation": "gelu_tanh"}
GEMMA2_PRESETS = {
    "gemma2-2b": {
        "vocab_size": 256000,
        "d_model": 2304,
        "layers": 26,
        "heads": 8,
        "kv_heads": 4,
        "head_size": 256,
        "d_ff": 9216,
        "max_length": 8192,
        "tied": True,
        "qkv_bias": False,
        "embedding_multiplier": 48.0,
        "attention_cap": 50.0,
        "logits_cap": 30.0,
        "layer_types": "window,full",
        "window": 4096,
    },
}
GEMMA3_PRESETS = {
    "gemma3-1b": {
        "vocab_size": 262144,
        "d_model": 1152,
        "layers": 26,
        "heads": 4,
        "kv_heads": 1,
        "head_size": 256,
        "d_ff": 6912,
        "max_length": 32768,
        "tied": True,
        "qkv_bias": False,
        "embedding_multiplier": 1152**0.5,
        "rope_theta": 1000000.0,
        "rope_window_theta": 10000.0,
        "layer_types": "window,window,window,window,window,full",
        "window": 512,
    },
    "gemma3-4b": {  # its text model
        "vocab_size": 262208,
        "d_model": 2560,
        "layers": 34,
        "heads": 8,
        "kv_heads": 4,
        "head_size": 256,
        "d_ff": 10240,
        "max_length": 131072,
        "tied": True,
        "qkv_bias": False,
        "embedding_multiplier": 2560**0.5,
        "rope_theta": 1000000.0,
        "rope_window_theta": 10000.0,
        "rope_scaling": "linear",
        "rope_factor": 8.0,
        "layer_types": "window,window,window,window,window,full",
        "window": 1024,
    },
}
# What transformers takes for a field that config.json lacks.
DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": ACTIVATION,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA2_DEFAULTS = DEFAULTS | {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "sliding_window_pattern": 2,
}
GEMMA3_DEFAULTS = DEFAULTS | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model` that both generations have, except those of RoPE."""
    config.allow("use_bidirectional_attention", False, None)
    config.require("hidden_activation")
    config.allow("hidden_activation", ACTIVATION)
    fields = read_sizes(config)
    layers = fields["layers"]
    types = read_layer_types(config, layers)
    if types is None:
        pattern = config.size("sliding_window_pattern")
        types = [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]
    window = config.size_or("sliding_window", 0)
    multiplier = config.positive("query_pre_attn_scalar") ** -0.5
    return {
        **fields,
        **read_attention_bias(config),
        **window_fields(config, [kind == SLIDING for kind in types], window),
        "embedding_multiplier": fields["d_model"] ** 0.5,
        "attention_multiplier": 0.0 if multiplier == fields["head_size"] ** -0.5 else multiplier,
        "attention_cap": read_cap(config, "attn_logit_softcapping"),
        "logits_cap": read_cap(config, "final_logit_softcapping"),
    }


def read_cap(config: HFConfig, name: str) -> float:
    """Return a cap, or 0 for null."""
    return (
        0.0 if config.values.get(name, config.defaults.get(name)) is None else config.positive(name)
    )


def read_gemma2(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`; all layers rotate alike."""
    fields = read_config(config)
    return {**fields, **read_rope(config, fields["head_size"])}


def read_gemma3(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`; layers with a window have a base of their own.

    transformers 5 has settings of RoPE for each kind of layers; before, the base of layers with a
    window was `rope_local_base_freq`, and everything else was for the other layers.
    """
    by_kind = config.object("rope_parameters")
    for name in by_kind.values:
        by_kind.expect(name, name in (FULL, SLIDING), f"in one of {FULL} and {SLIDING}")
    full = by_kind.object(FULL).values | config.object("rope_scaling").values
    theta = config.values.get("rope_theta", 1000000.0)
    others = {
        name: value
        for name, value in config.values.items()
        if name not in ("rope_scaling", "rope_theta")
    }
    others["rope_parameters"] = {"rope_theta": theta, **full}
    fields = read_config(config)
    rope = read_rope(dataclasses.replace(config, values=others), fields["head_size"])
    local = by_kind.object(SLIDING)
    local.allow("rope_type", "default")
    if "rope_theta" in local.values:
        window_theta = local.positive("rope_theta")
    else:
        window_theta = float(config.values.get("rope_local_base_freq", 10000.0))
    return {**fields, **rope, "rope_window_theta": window_theta}


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has."""
    config = write_common_config(model) | write_attention_bias(model)
    for name in ("hidden_act", "use_sliding_window", "max_window_layers"):
        config.pop(name, None)
    windowed = [kind.windowed for kind in layer_kinds.of(model)]
    return config | {
        "hidden_activation": ACTIVATION,
        "query_pre_attn_scalar": query_scalar(model),
        "attn_logit_softcapping": model.attention_cap or None,
        "final_logit_softcapping": model.logits_cap or None,
        "layer_types": [SLIDING if is_windowed else FULL for is_windowed in windowed],
        "sliding_window": model.window or None,
    }


def query_scalar(model: Model) -> int | float:
    """Return the number whose inverse square root multiplies scores, whole if it can be."""
    if not model.attention_multiplier:
        return model.head_size
    number = model.attention_multiplier**-2
    whole = round(number)
    return whole if whole**-0.5 == model.attention_multiplier else number


def write_gemma3(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has."""
    return write_config(model) | {
        "rope_theta": model.rope_theta,
        "rope_local_base_freq": model.rope_window_theta,
        "rope_scaling": rope_scaling(model),
    }


GEMMA2 = Family(
    name="gemma2",
    flags=FLAGS | {"qk_norm": False},
    tensors=GEMMA_TENSORS,
    optional=ATTENTION_BIAS_TENSORS,
    classes={"lm": "Gemma2ForCausalLM", "scalar": "Gemma2ForSequenceClassification"},
    read_config=read_gemma2,
    write_config=write_config,
    presets=GEMMA2_PRESETS,
    defaults=GEMMA2_DEFAULTS,
)
GEMMA3 = Family(
    name="gemma3_text",
    flags=FLAGS | {"qk_norm": True},
    tensors=GEMMA_TENSORS | QK_NORM_TENSORS,
    optional=ATTENTION_BIAS_TENSORS,
    classes={"lm": "Gemma3ForCausalLM", "scalar": "Gemma3TextForSequenceClassification"},
    read_config=read_gemma3,
    write_config=write_gemma3,
    presets=GEMMA3_PRESETS,
    defaults=GEMMA3_DEFAULTS,
)
