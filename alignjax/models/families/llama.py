"""Llama 3."""

from alignjax.models.families.family import Family
from alignjax.models.families.llama_like import TENSORS, read_config_without_bias, write_config

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
LLAMA = Family(
    name="llama",
    flags={"qkv_bias": False, "qk_norm": False},
    tensors=TENSORS,
    classes={"lm": "LlamaForCausalLM", "scalar": "LlamaForSequenceClassification"},
    read_config=read_config_without_bias,
    write_config=write_config,
    presets=PRESETS,
)
