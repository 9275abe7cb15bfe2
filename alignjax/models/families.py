"""The model families as values of one config: Hugging Face's config.json in and out, tensor names, known sizes.

`qwen` is the report's own Qwen (fused and biased QKV, an intermediate_size of twice the feed-forward), `qwen2` is
Qwen2 and 2.5, `qwen3` has norms on q and k in place of biases, `llama` is Llama 3.
Letters: d model, n heads, k key-value heads, h head size, f feed-forward, l layers, v words.
"""

from alignjax.config import Model, UserError

LLAMA = {
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
QWEN2 = LLAMA | {
    "layers/attention/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/v/bias": "model.layers.{}.self_attn.v_proj.bias",
}
QWEN3 = LLAMA | {
    "layers/attention/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
}
QWEN = {
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
NAMES = {"qwen": QWEN, "qwen2": QWEN2, "qwen3": QWEN3, "llama": LLAMA}
# Hugging Face's sequence classifiers have no bias: they leave `score.bias`, a reward model's shift, unread.
HEADS = {
    "lm": {"head/kernel": "lm_head.weight"},
    "scalar": {"head/kernel": "score.weight", "head/bias": "score.bias"},
}
CLASSES = {"qwen": "QWen", "qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}

# family -> (qkv_bias, qk_norm), which no config.json says otherwise
SHAPES = {
    "qwen": (True, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
    "llama": (False, False),
}


def weight_names(model: Model, head: str) -> dict[str, str]:
    """Parameter path -> tensor name, "{}" standing for the layer; `head` is "lm" or "scalar".

    Paths that share a name are parts of one tensor, in this order along its first axis. A kernel lies as [out in] in
    the file, with heads and head size as one axis; all else lies as it is here.
    """
    names = NAMES[model.family] | HEADS[head]
    if head == "lm" and model.tied:
        del names["head/kernel"]
    return names


def model_from_hf(config: dict, where: str = "config.json") -> Model:
    """The Model that a Hugging Face config describes; UserError names `where`, field and value if we can't run it."""
    family = config.get("model_type")
    if family not in NAMES:
        raise UserError(
            f"{where}: model_type={family!r} must be one of {', '.join(map(repr, NAMES))}"
        )

    def need(field):
        if config.get(field) is None:
            raise UserError(f"{where}: {field} is missing")
        return config[field]

    def only(field, *values):
        """Refuse a field that is there with a value other than these."""
        if field in config and config[field] not in values:
            raise UserError(
                f"{where}: {field}={config[field]!r} is not supported, only {values[0]!r}"
            )

    bias, norm = SHAPES[family]
    common = dict(
        family=family,
        vocab_size=need("vocab_size"),
        d_model=need("hidden_size"),
        layers=need("num_hidden_layers"),
        heads=need("num_attention_heads"),
        qkv_bias=bias,
        qk_norm=norm,
    )
    if family == "qwen":
        for field, value in (
            ("no_bias", True),
            ("tie_word_embeddings", False),
            ("rotary_pct", 1.0),
            ("scale_attn_weights", True),
            ("attn_dropout_prob", 0.0),
            ("emb_dropout_prob", 0.0),
        ):
            only(field, value)
        # use_dynamic_ntk and use_logn_attn change nothing up to seq_length, which is where max_length ends.
        return Model(
            **common,
            kv_heads=need("num_attention_heads"),
            head_size=need("kv_channels"),
            d_ff=need("intermediate_size") // 2,
            norm_eps=need("layer_norm_epsilon"),
            rope_theta=float(config.get("rotary_emb_base", 10000)),
            max_length=need("seq_length"),
        )
    only("use_sliding_window", False, None)
    only("hidden_act", "silu")
    only("attention_dropout", 0.0)
    only("mlp_bias", False, None)
    if family != "qwen2":  # Qwen2 has its biases whatever this says
        only("attention_bias", False, None)
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(
            f"{where}: layer_types={config['layer_types']!r} is not supported, only 'full_attention'"
        )
    head_size = config.get("head_dim") or common["d_model"] // common["heads"]
    return Model(
        **common,
        kv_heads=config.get("num_key_value_heads") or common["heads"],
        head_size=head_size,
        d_ff=need("intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=need("rms_norm_eps"),
        max_length=need("max_position_embeddings"),
        **rope_from_hf(config, where),
    )


def rope_from_hf(config: dict, where: str) -> dict:
    """The Model's rope_* fields, from `rope_parameters` (transformers 5) or rope_theta and `rope_scaling` (before)."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(field) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    # Older configs name attention_factor, mscale and truncate with their defaults; other values change the result.
    for key, value in (
        ("partial_rotary_factor", 1.0),
        ("attention_factor", None),
        ("mscale", None),
        ("mscale_all_dim", None),
        ("truncate", True),
    ):
        if rope.get(key, config.get(key, value)) != value:
            raise UserError(
                f"{where}: {field}.{key}={rope.get(key, config.get(key))!r} is not supported, only {value!r}"
            )

    def need(key):
        if rope.get(key) is None:
            raise UserError(f"{where}: {field}.{key} is missing, which {kind!r} needs")
        return float(rope[key])

    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(
            f"{where}: {field}.rope_type={kind!r} must be one of 'default', 'linear', 'llama3', 'yarn'"
        )
    fields = {"rope_theta": theta, "rope_scaling": kind, "rope_factor": need("factor")}
    if kind == "linear":
        return fields
    original = int(
        rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    )
    low, high = (
        (need("low_freq_factor"), need("high_freq_factor"))
        if kind == "llama3"
        else (float(rope.get("beta_slow") or 1), float(rope.get("beta_fast") or 32))
    )
    return fields | {
        "rope_low_factor": low,
        "rope_high_factor": high,
        "rope_original_length": original,
    }


def hf_from_model(model: Model, head: str, dtype: str = "float32") -> dict:
    """config.json's content, for transformers 4 and 5. UserError if the family can't say what `model` says."""
    m = model
    if (m.qkv_bias, m.qk_norm) != SHAPES[m.family]:
        bias, norm = SHAPES[m.family]
        raise UserError(
            f"model.qkv_bias={m.qkv_bias}, model.qk_norm={m.qk_norm} must be {bias}, {norm} "
            f"for model.family={m.family!r}"
        )
    kind = "ForCausalLM" if head == "lm" else "ForSequenceClassification"
    config = {
        "architectures": [
            "QWenLMHeadModel" if (m.family, head) == ("qwen", "lm") else CLASSES[m.family] + kind
        ],
        "model_type": m.family,
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "torch_dtype": dtype,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "tie_word_embeddings": m.tied,
    }
    if head == "scalar":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if m.family == "qwen":
        if (m.kv_heads, m.tied, m.rope_scaling) != (m.heads, False, ""):
            raise UserError(
                f"model.kv_heads={m.kv_heads}, model.tied={m.tied}, model.rope_scaling={m.rope_scaling!r} "
                f"must be {m.heads}, False, '' for model.family='qwen'"
            )
        return config | {
            "kv_channels": m.head_size,
            "intermediate_size": 2 * m.d_ff,
            "layer_norm_epsilon": m.norm_eps,
            "rotary_emb_base": m.rope_theta,
            "rotary_pct": 1.0,
            "seq_length": m.max_length,
            "no_bias": True,
            "max_position_embeddings": m.max_length,
            "scale_attn_weights": True,
            "use_dynamic_ntk": False,
            "use_logn_attn": False,
            "attn_dropout_prob": 0.0,
            "emb_dropout_prob": 0.0,
        }
    rope = {"rope_type": m.rope_scaling, "factor": m.rope_factor}
    low, high = (
        ("low_freq_factor", "high_freq_factor")
        if m.rope_scaling == "llama3"
        else ("beta_slow", "beta_fast")
    )
    if m.rope_scaling in ("llama3", "yarn"):
        rope |= {low: m.rope_low_factor, high: m.rope_high_factor}
        rope["original_max_position_embeddings"] = m.rope_original_length
    return config | {
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_size,
        "intermediate_size": m.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_eps,
        "max_position_embeddings": m.max_length,
        "rope_theta": m.rope_theta,
        "rope_scaling": rope if m.rope_scaling else None,
        "attention_bias": m.qkv_bias,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }


def sized(
    family,
    vocab_size,
    d_model,
    layers,
    heads,
    kv_heads,
    head_size,
    d_ff,
    theta,
    max_length,
    tied=False,
    eps=1e-6,
):
    bias, norm = SHAPES[family]
    return Model(
        family=family,
        vocab_size=vocab_size,
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        d_ff=d_ff,
        rope_theta=theta,
        max_length=max_length,
        tied=tied,
        norm_eps=eps,
        qkv_bias=bias,
        qk_norm=norm,
        dtype="bfloat16",
        remat="everything",
    )


# Values to copy with dataclasses.replace. The first three are the report's, section 2, at its context of 2048; the
# released 14B has its vocabulary padded further than the others.
PRESETS = {
    "qwen-1.8b": sized("qwen", 151936, 2048, 24, 16, 16, 128, 5504, 1e4, 2048),
    "qwen-7b": sized("qwen", 151936, 4096, 32, 32, 32, 128, 11008, 1e4, 2048),
    "qwen-14b": sized("qwen", 152064, 5120, 40, 40, 40, 128, 13696, 1e4, 2048),
    "qwen2.5-0.5b": sized("qwen2", 151936, 896, 24, 14, 2, 64, 4864, 1e6, 32768, tied=True),
    "qwen2.5-7b": sized("qwen2", 152064, 3584, 28, 28, 4, 128, 18944, 1e6, 131072),
    "qwen3-0.6b": sized("qwen3", 151936, 1024, 28, 16, 8, 128, 3072, 1e6, 40960, tied=True),
    "llama3-8b": sized("llama", 128256, 4096, 32, 32, 8, 128, 14336, 5e5, 8192, eps=1e-5),
}
