"""Tensor names and config.json of the families that follow Llama's checkpoint format."""

from typing import Any

from alignjax.config import Model, UserError
from alignjax.models.families.family import HFConfig, common_fields
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
QK_NORM_TENSORS = {
    "layers/attention/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`, except the family's flags."""
    fields = common_fields(config)
    config.allow("use_sliding_window", False, None)
    config.allow("hidden_act", "silu")
    config.allow("attention_dropout", 0.0)
    config.allow("mlp_bias", False, None)
    layer_types = config.get("layer_types", [])
    if set(layer_types) - {"full_attention"}:
        raise UserError(
            f"{config.where}: layer_types={layer_types!r} is not supported, only 'full_attention'"
        )
    return {
        **fields,
        "kv_heads": config.get("num_key_value_heads") or fields["heads"],
        "head_size": config.get("head_dim") or fields["d_model"] // fields["heads"],
        "d_ff": config.require("intermediate_size"),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "norm_eps": config.require("rms_norm_eps"),
        "max_length": config.require("max_position_embeddings"),
        **read_rope(config),
    }


def read_config_without_bias(config: HFConfig) -> dict[str, Any]:
    """Read the config of a family whose `attention_bias` must be off, because it adds biases."""
    config.allow("attention_bias", False, None)
    return read_config(config)


def write_config(model: Model) -> dict[str, Any]:
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
