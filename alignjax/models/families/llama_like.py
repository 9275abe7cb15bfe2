"""Tensor names and config.json of the families that follow Llama's checkpoint format."""

from typing import Any

from alignjax.config import Model, UserError
from alignjax.models import layer_kinds
from alignjax.models.families.family import common_fields
from alignjax.models.families.hf_config import HFConfig, shown
from alignjax.models.families.rope_scaling import known_length, read_rope, write_rope

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
SLIDING = "sliding_attention"  # in `layer_types`
ACTIVATIONS = ("silu", "swish")  # two names of one function


def read_common_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`, except the family's flags."""
    config.allow("hidden_act", *ACTIVATIONS)
    fields = read_sizes(config)
    return {**fields, **read_rope(config, fields["head_size"])}


def read_sizes(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model` that are sizes, and those that all families share."""
    fields = common_fields(config)
    return {
        **fields,
        "kv_heads": config.size_or("num_key_value_heads", fields["heads"]),
        "head_size": config.size_or("head_dim", fields["d_model"] // fields["heads"]),
        "d_ff": config.size("intermediate_size"),
        "tied": config.flag("tie_word_embeddings"),
        "norm_eps": config.number("rms_norm_eps"),
        "max_length": config.size("max_position_embeddings"),
    }


def check_windows(config: HFConfig, layers: int) -> None:
    """Refuse windows of families that have none."""
    if SLIDING in (read_layer_types(config, layers) or []):
        raise UserError(
            f"{config.where}: layer_types has {SLIDING!r}, but only 'full_attention' is supported"
        )


def read_layer_types(config: HFConfig, layers: int) -> list[str] | None:
    """Return what `layer_types` lists for each layer, or None if it is absent."""
    types = config.get("layer_types")
    if types is None:
        return None
    is_list = isinstance(types, list) and all(isinstance(kind, str) for kind in types)
    config.expect("layer_types", is_list, "a list of texts or null")
    odd = sorted(set(types) - {"full_attention", SLIDING})
    if odd:
        raise UserError(
            f"{config.where}: layer_types has {odd[0]!r}, but only 'full_attention' and "
            f"{SLIDING!r} are supported"
        )
    if len(types) != layers:
        raise UserError(
            f"{config.where}: num_hidden_layers={layers}, but layer_types has {len(types)}"
        )
    return types


def read_window(config: HFConfig) -> int:
    """Return the window that `use_sliding_window` turns on, or 0."""
    config.allow("use_sliding_window", False, True)
    is_used = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
    return config.size("sliding_window") if is_used else 0


def read_qwen_windows(config: HFConfig, layers: int) -> dict[str, Any]:
    """Return which layers see a window: those of `layer_types`, or the last ones."""
    window = read_window(config)
    types = read_layer_types(config, layers)
    if types is None:
        first = config.size_or_zero("max_window_layers") if window else layers
        types = [SLIDING if layer >= first else "full_attention" for layer in range(layers)]
    return window_fields(config, [kind == SLIDING for kind in types], window)


def read_window_of_all(config: HFConfig, layers: int, window: int) -> dict[str, Any]:
    """Return `window` and `layer_types` of a family whose layers see a window all or none.

    A window of 0 is none. transformers takes no notice of such a family's `layer_types`.
    """
    types = read_layer_types(config, layers)
    if types is not None and any((kind == SLIDING) != bool(window) for kind in types):
        raise UserError(
            f"{config.where}: layer_types must be the same for all layers of this family, with "
            f"sliding_window={window or None}"
        )
    return window_fields(config, [bool(window)] * layers, window)


def window_fields(config: HFConfig, windowed: list[bool], window: int) -> dict[str, Any]:
    """Return `window` and `layer_types` of `config.Model`."""
    if not any(windowed):
        return {}
    if not window:
        raise UserError(
            f"{config.where}: layer_types has {SLIDING!r}, but sliding_window="
            f"{shown(config.get('sliding_window'))} with use_sliding_window="
            f"{shown(config.get('use_sliding_window'))} is no window"
        )
    names = ["window" if is_windowed else "full" for is_windowed in windowed]
    return {"window": window, "layer_types": layer_kinds.pattern_of(names)}


def write_windows(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that say which layers see a window."""
    if not model.window:
        return {"use_sliding_window": False}
    windowed = [kind.windowed for kind in layer_kinds.of(model)]
    return {
        "use_sliding_window": True,
        "sliding_window": model.window,
        "max_window_layers": windowed.index(True),
        "layer_types": [SLIDING if is_windowed else "full_attention" for is_windowed in windowed],
    }


def write_window_of_all(model: Model) -> dict[str, Any]:
    """Return a config whose `sliding_window` is that of all layers, or null."""
    config = write_common_config(model) | {"sliding_window": model.window or None}
    config.pop("layer_types", None)
    return config


def read_config_without_bias(config: HFConfig) -> dict[str, Any]:
    """Read the config of a family whose `attention_bias` must be off, because it adds biases."""
    config.allow("attention_bias", False)
    return read_full_config(config)


def read_full_config(config: HFConfig) -> dict[str, Any]:
    """Read the config of a family whose layers see everything before them."""
    fields = read_common_config(config)
    check_windows(config, fields["layers"])
    return fields


def read_qwen_config(config: HFConfig) -> dict[str, Any]:
    """Read the config of a family whose layers may see a window, as Qwen2's say it."""
    fields = read_common_config(config)
    return {**fields, **read_qwen_windows(config, fields["layers"])}


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
        "max_position_embeddings": known_length(model),
        **write_rope(model),
        "attention_bias": model.qkv_bias,
        "attention_dropout": 0.0,
        **write_windows(model),
    }


def write_config_with_biases(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has, `mlp_bias` among them."""
    config = write_common_config(model) | write_attention_bias(model)
    return config | {"mlp_bias": model.mlp_bias}
