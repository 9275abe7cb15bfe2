"""Tensor names and config.json of the families that follow Llama's checkpoint format."""

from typing import Any

from alignjax.config import Model, UserError
from alignjax.models.families.family import common_fields
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.rope_scaling import read_rope, write_rope

TENSORS = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/norm1/scale": "model.layers.{}.input_layernorm.weight",
    "layers/norm2/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/out/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
}
QKV_BIAS_TENSORS = {
    "layers/attention/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/v/bias": "model.layers.{}.self_attn.v_proj.bias",
}
OUT_BIAS_TENSOR = {"layers/attention/out/bias": "model.layers.{}.self_attn.o_proj.bias"}
MLP_BIAS_TENSORS = {
    "layers/mlp/gate/bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers/mlp/up/bias": "model.layers.{}.mlp.up_proj.bias",
    "layers/mlp/down/bias": "model.layers.{}.mlp.down_proj.bias",
}
ATTENTION_BIAS_TENSORS = QKV_BIAS_TENSORS | OUT_BIAS_TENSOR
ALL_BIAS_TENSORS = ATTENTION_BIAS_TENSORS | MLP_BIAS_TENSORS
QK_NORM_TENSORS = {
    "layers/attention/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
}


# What transformers takes for a field that config.json lacks.
COMMON_DEFAULTS = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LLAMA_DEFAULTS = COMMON_DEFAULTS | {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
}
# Qwen2's and Qwen3's classes share these.
QWEN_DEFAULTS = COMMON_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 4096,
    "num_key_value_heads": 32,
}
ACTIVATIONS = ("silu", "swish")  # two names of one function


def read_common_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`, except the family's flags."""
    fields = common_fields(config)
    config.allow("hidden_act", *ACTIVATIONS)
    check_layer_types(config, fields["layers"])
    check_window(config, fields["layers"])
    return {
        **fields,
        "kv_heads": config.size_or("num_key_value_heads", fields["heads"]),
        "head_size": config.size_or("head_dim", fields["d_model"] // fields["heads"]),
        "d_ff": config.size("intermediate_size"),
        "tied": config.flag("tie_word_embeddings"),
        "norm_eps": config.number("rms_norm_eps"),
        "max_length": config.size("max_position_embeddings"),
        **read_rope(config),
    }


def check_layer_types(config: HFConfig, layers: int) -> None:
    """Raise UserError for layers that do not attend to everything before them."""
    types = config.get("layer_types")
    if types is None:
        return
    is_list = isinstance(types, list) and all(isinstance(kind, str) for kind in types)
    config.expect("layer_types", is_list, "a list of texts or null")
    odd = sorted(set(types) - {"full_attention"})
    if odd:
        raise UserError(
            f"{config.where}: layer_types has {odd[0]!r}, but only 'full_attention' is supported"
        )
    if len(types) != layers:
        raise UserError(
            f"{config.where}: num_hidden_layers={layers}, but layer_types has {len(types)}"
        )


def check_window(config: HFConfig, layers: int) -> None:
    """Raise UserError if any layer attends to a window only.

    With `use_sliding_window`, layers from `max_window_layers` on do, unless there is no window.
    """
    config.allow("use_sliding_window", False, True)
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", False) and window is not None
    if not is_used or config.get("layer_types") is not None:
        return
    first = config.size("max_window_layers")
    if first < layers:
        raise UserError(
            f"{config.where}: use_sliding_window=True is not supported: with "
            f"sliding_window={window!r}, max_window_layers={first} and "
            f"num_hidden_layers={layers} it has an effect"
        )


def read_config_without_bias(config: HFConfig) -> dict[str, Any]:
    """Read the config of a family whose `attention_bias` must be off, because it adds biases."""
    config.allow("attention_bias", False)
    return read_common_config(config)


def read_attention_bias(config: HFConfig) -> dict[str, Any]:
    """Read whether all four projections of the attention have biases."""
    is_used = config.get("attention_bias") is not None and config.flag("attention_bias")
    return {"qkv_bias": is_used, "out_bias": is_used}


def read_mlp_bias(config: HFConfig) -> dict[str, Any]:
    """Read whether the three projections of the feed-forward network have biases."""
    return {"mlp_bias": config.get("mlp_bias") is not None and config.flag("mlp_bias")}


def read_biases(config: HFConfig) -> dict[str, Any]:
    """Read which projections have biases, by `attention_bias` and `mlp_bias`."""
    return read_attention_bias(config) | read_mlp_bias(config)


def write_attention_bias(model: Model) -> dict[str, Any]:
    """Return `attention_bias` of a family that has biases on all four projections or on none."""
    if model.qkv_bias != model.out_bias:
        raise UserError(
            f"model.qkv_bias={model.qkv_bias} and model.out_bias={model.out_bias} must be the "
            f"same for model.family={model.family!r}"
        )
    return {"attention_bias": model.qkv_bias}


def write_common_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has."""
    return {
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": model.max_length,
        **write_rope(model),
        "attention_bias": model.qkv_bias,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }


def write_config_with_biases(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has, `mlp_bias` among them."""
    config = write_common_config(model) | write_attention_bias(model)
    return config | {"mlp_bias": model.mlp_bias}
