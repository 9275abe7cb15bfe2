"""The report's own Qwen: a fused QKV projection with biases, and a config.json of its own."""

from typing import Any

from alignjax.config import Model, UserError
from alignjax.models.families.family import Family, common_fields
from alignjax.models.families.hf_config import HFConfig

TENSORS = {
    "embed/embedding": "transformer.wte.weight",
    "layers/norm1/scale": "transformer.h.{}.ln_1.weight",
    "layers/norm2/scale": "transformer.h.{}.ln_2.weight",
    "layers/attention/q/kernel": "transformer.h.{}.attn.c_attn.weight",
    "layers/attention/k/kernel": "transformer.h.{}.attn.c_attn.weight",
    "layers/attention/v/kernel": "transformer.h.{}.attn.c_attn.weight",
    "layers/attention/q/bias": "transformer.h.{}.attn.c_attn.bias",
    "layers/attention/k/bias": "transformer.h.{}.attn.c_attn.bias",
    "layers/attention/v/bias": "transformer.h.{}.attn.c_attn.bias",
    "layers/attention/out/kernel": "transformer.h.{}.attn.c_proj.weight",
    "layers/mlp/gate/kernel": "transformer.h.{}.mlp.w2.weight",
    "layers/mlp/up/kernel": "transformer.h.{}.mlp.w1.weight",
    "layers/mlp/down/kernel": "transformer.h.{}.mlp.c_proj.weight",
    "norm/scale": "transformer.ln_f.weight",
}
# The report's models, section 2, at its context of 2048 tokens. The vocabulary of the released 14B
# is padded further than the others'.
PRESETS = {
    "qwen-1.8b": {
        "vocab_size": 151936,
        "d_model": 2048,
        "layers": 24,
        "heads": 16,
        "kv_heads": 16,
        "head_size": 128,
        "d_ff": 5504,
        "rope_theta": 10000.0,
        "max_length": 2048,
    },
    "qwen-7b": {
        "vocab_size": 151936,
        "d_model": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 32,
        "head_size": 128,
        "d_ff": 11008,
        "rope_theta": 10000.0,
        "max_length": 2048,
    },
    "qwen-14b": {
        "vocab_size": 152064,
        "d_model": 5120,
        "layers": 40,
        "heads": 40,
        "kv_heads": 40,
        "head_size": 128,
        "d_ff": 13696,
        "rope_theta": 10000.0,
        "max_length": 2048,
    },
}
# What we compute. `use_dynamic_ntk` and `use_logn_attn` change nothing up to `seq_length`, which is
# where `max_length` ends.
FIXED_CONFIG = {
    "no_bias": True,
    "tie_word_embeddings": False,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`; the file's intermediate_size is twice `d_ff`."""
    fields = common_fields(config)
    for field, value in FIXED_CONFIG.items():
        config.allow(field, value)
    d_ff = config.size("intermediate_size")
    config.expect("intermediate_size", d_ff % 2 == 0, "an even number")
    return {
        **fields,
        "kv_heads": fields["heads"],
        "head_size": config.size("kv_channels"),
        "d_ff": d_ff // 2,
        "norm_eps": config.number("layer_norm_epsilon"),
        "rope_theta": config.positive("rotary_emb_base"),
        "max_length": config.size("seq_length"),
    }


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only Qwen has."""
    if (model.kv_heads, model.tied, model.rope_scaling) != (model.heads, False, ""):
        raise UserError(
            f"model.kv_heads={model.kv_heads}, model.tied={model.tied}, "
            f"model.rope_scaling={model.rope_scaling!r} must be {model.heads}, False, '' "
            "for model.family='qwen'"
        )
    return {
        "kv_channels": model.head_size,
        "intermediate_size": 2 * model.d_ff,
        "layer_norm_epsilon": model.norm_eps,
        "rotary_emb_base": model.rope_theta,
        "rotary_pct": 1.0,
        "seq_length": model.max_length,
        "no_bias": True,
        "max_position_embeddings": model.max_length,
        "scale_attn_weights": True,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
    }


QWEN = Family(
    name="qwen",
    flags={"qkv_bias": True, "qk_norm": False},
    tensors=TENSORS,
    classes={"lm": "QWenLMHeadModel", "scalar": "QWenForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults={"rotary_emb_base": 10000.0},
)
