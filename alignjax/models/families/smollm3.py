"""SmolLM3: Llama's format, with layers that have no rotary positions."""

from typing import Any

from alignjax.config import Model
from alignjax.models import layer_kinds
from alignjax.models.families.family import Family
from alignjax.models.families.hf_config import HFConfig
from alignjax.models.families.llama_like import (
    ALL_BIAS_TENSORS,
    COMMON_DEFAULTS,
    SLIDING,
    TENSORS,
    read_biases,
    read_common_config,
    read_layer_types,
    read_window,
    window_fields,
    write_config_with_biases,
)

NOPE = "_nope"  # the end of the names of such layers
PRESETS = {
    "smollm3-3b": {
        "vocab_size": 128256,
        "d_model": 2048,
        "layers": 36,
        "heads": 16,
        "kv_heads": 4,
        "head_size": 128,
        "d_ff": 11008,
        "rope_theta": 5000000.0,
        "max_length": 65536,
        "tied": True,
        "qkv_bias": False,
        "layer_types": "full,full,full,full_nope",
    },
}
DEFAULTS = COMMON_DEFAULTS | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "no_rope_layer_interval": 4,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
}


def read_config(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model`."""
    fields = read_common_config(config)
    layers = fields["layers"]
    rotated = read_rotated(config, layers)
    window = read_window(config)
    types = read_layer_types(config, layers)
    if types is None:
        windowed = [bool(window) and not is_rotated for is_rotated in rotated]
    else:
        windowed = [kind == SLIDING for kind in types]
    fields |= window_fields(config, windowed, window)
    names = [
        ("window" if is_windowed else "full") + ("" if is_rotated else NOPE)
        for is_windowed, is_rotated in zip(windowed, rotated, strict=True)
    ]
    layer_types = layer_kinds.pattern_of(names)
    return {**fields, **read_biases(config), "layer_types": layer_types}


def read_rotated(config: HFConfig, layers: int) -> list[int]:
    """Return for each layer 1 or, if it has no rotary positions, 0."""
    rotated = config.get("no_rope_layers")
    if rotated is None:
        interval = config.size("no_rope_layer_interval")
        return [int((layer + 1) % interval != 0) for layer in range(layers)]
    is_list = isinstance(rotated, list) and all(one in (0, 1) for one in rotated)
    is_list = is_list and len(rotated) >= layers
    config.expect("no_rope_layers", is_list, f"a list of at least {layers} numbers, 0 or 1")
    return [int(one) for one in rotated[:layers]]


def write_config(model: Model) -> dict[str, Any]:
    """Return the fields of config.json that only this format has."""
    rotated = [int(not name.endswith(NOPE)) for name in layer_kinds.names(model)]
    return write_config_with_biases(model) | {"no_rope_layers": rotated}


SMOLLM3 = Family(
    name="smollm3",
    flags={"qk_norm": False},
    tensors=TENSORS,
    optional=ALL_BIAS_TENSORS,
    classes={"lm": "SmolLM3ForCausalLM", "scalar": "SmolLM3ForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    presets=PRESETS,
    defaults=DEFAULTS,
)
