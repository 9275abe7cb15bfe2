"""Qwen3-MoE: Qwen3 with a mixture of experts in the place of each feed-forward network."""

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
    read_common_config,
    read_window,
    read_window_of_all,
    write_attention_bias,
    write_common_config,
)

EXPERT_TENSORS = {
    "layers/experts/router/kernel": "model.layers.{}.mlp.gate.weight",
    "layers/experts/gate/kernel": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers/experts/up/kernel": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "layers/experts/down/kernel": "model.layers.{}.mlp.experts.{}.down_proj.weight",
}
SHARED_TENSORS = {path: name for path, name in TENSORS.items() if "/mlp/" not in path}
PRESETS = {
    "qwen3-30b-a3b": {
        "vocab_size": 151936,
        "d_model": 2048,
        "layers": 48,
        "heads": 32,
        "kv_heads": 4,
        "head_size": 128,
        "d_ff": 768,
        "experts": 128,
        "experts_per_token": 8,
        "normalise_experts": True,
        "rope_theta": 1000000.0,
        "max_length": 40960,
        "qkv_bias": False,
    },
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`; every layer must have experts."""
    config.allow("decoder_sparse_step", 1)
    config.allow("mlp_only_layers", [], None)
    fields = read_common_config(config)
    experts = read_experts(config)
    chosen = config.size("num_experts_per_tok")
    config.expect("num_experts_per_tok", chosen <= experts, f"at most the {experts} experts")
    return {
        **fields,
        **read_window_of_all(config, fields["layers"], read_window(config)),
        **read_attention_bias(config),
        "d_ff": config.size("moe_intermediate_size"),
        "experts": experts,
        "experts_per_token": chosen,
        "normalise_experts": config.flag("norm_topk_prob"),
    }


def read_experts(config: HFConfig) -> int:
    """Return the number of experts: transformers 4 writes num_experts, 5 num_local_experts."""
    if "num_local_experts" not in config.values:
        return config.size("num_experts")
    experts = config.size("num_local_experts")
    if "num_experts" in config.values:
        config.expect("num_experts", config.size("num_experts") == experts, str(experts))
    return experts


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has.

    `intermediate_size` is that of layers without experts, of which there are none. Released models
    have the width of all experts of a token there.
    """
    config = write_common_config(model) | write_attention_bias(model)
    config.pop("layer_types", None)
    return config | {
        "intermediate_size": model.d_ff * model.experts_per_token,
        "moe_intermediate_size": model.d_ff,
        "num_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "norm_topk_prob": model.normalise_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    flags={"qk_norm": True},
    tensors=SHARED_TENSORS | QK_NORM_TENSORS | EXPERT_TENSORS,
    optional=ATTENTION_BIAS_TENSORS,
    classes={"lm": "Qwen3MoeForCausalLM", "scalar": "Qwen3MoeForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=QWEN_DEFAULTS
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
)
