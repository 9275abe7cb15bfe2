"""Qwen2 and Qwen2.5: Llama's format with biases on queries, keys and values."""

from alignjax.models.families.family import Family
from alignjax.models.families.llama_like import (
    QKV_BIAS_TENSORS,
    QWEN_DEFAULTS,
    TENSORS,
    read_qwen_config,
    write_common_config,
)

PRESETS = {
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "d_model": 896,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "head_size": 64,
        "d_ff": 4864,
        "rope_theta": 1000000.0,
        "max_length": 32768,
        "tied": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "d_model": 3584,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "head_size": 128,
        "d_ff": 18944,
        "rope_theta": 1000000.0,
        "max_length": 131072,
    },
}
QWEN2 = Family(
    name="qwen2",
    flags={"qkv_bias": True, "qk_norm": False},
    tensors=TENSORS | QKV_BIAS_TENSORS,
    classes={"lm": "Qwen2ForCausalLM", "scalar": "Qwen2ForSequenceClassification"},
    read_config=read_qwen_config,  # whatever `attention_bias` says: Qwen2 always has its biases
    write_config=write_common_config,
    presets=PRESETS,
    defaults=QWEN_DEFAULTS,
)
