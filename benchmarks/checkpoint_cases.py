"""The Hugging Face checkpoints that checkpoints.py compares: what each of them says and holds.

A case is built by transformers from `built`, with random weights; then fields of its config.json
are changed, and its files. Cases with one topic are one row of the table in docs/data.md. This
module imports neither torch nor jax, because both sides of the comparison read it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("qwen2", "qwen3", "llama")
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
MIXTURE = {
    "head_dim": 8,
    "moe_intermediate_size": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
# The variants of every other family, and windows of these: name -> fields of its configuration.
# Each is read with more layers, and also decoded greedily.
OTHER_FAMILIES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "gemma2": {
        "caps": {
            "head_dim": 8,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
            "sliding_window": 5,
        },
        "no-caps": {
            "head_dim": 16,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 64,
            "attention_bias": True,
        },
    },
    "gemma3_text": {
        "pattern": {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
        "scaled": {
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    },
    "granite": {
        "multipliers": {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.5,
        },
        "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    },
    "olmo2": {"plain": {}, "biases": {"attention_bias": True, "tie_word_embeddings": True}},
    "seed_oss": {
        "plain": {},
        "biases": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    },
    "mistral": {"plain": {"sliding_window": None}, "window": {"sliding_window": 5}},
    "phi3": {
        "plain": {"tie_word_embeddings": True},
        "window": {"sliding_window": 5},
        "longrope": {
            "sliding_window": 17,
            "original_max_position_embeddings": 32,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.5, 1.25],
                "long_factor": [1.0, 4.0, 9.0],
            },
        },
    },
    "qwen2": {"window": WINDOW | {"max_window_layers": 1}},
    "qwen3": {"window": WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}},
    "qwen3_moe": {
        "plain": MIXTURE | {"norm_topk_prob": True, "attention_bias": True},
        "window": MIXTURE | WINDOW | {"num_experts_per_tok": 3},
        "one": MIXTURE | {"num_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    },
    "smollm3": {
        "window": WINDOW | {"no_rope_layer_interval": 2},
        "intervals": {"no_rope_layer_interval": 2},
        "list": {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "mlp_bias": True},
    },
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Within the small vocabulary; other families' defaults are not.
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LENGTH = 40  # tokens of a row; longer than the original lengths of scaled RoPE
PROMPT = 6  # tokens of a row after which others are decoded
NEW_TOKENS = 24
# The fields that each kind of scaling has beside its type and rope_theta.
SCALINGS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "short_factor": [1.0, 1.5, 1.25, 2.0],
        "long_factor": [1.0, 4.0, 9.0, 20.0],
        "original_max_position_embeddings": 32,
    },
}
SHORT = 24  # positions of models with dynamic scaling, which begins behind them
THETA = 500.0
YARN = {"rope_type": "yarn", "rope_theta": THETA, **SCALINGS["yarn"]}
LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, **SCALINGS["llama3"]}
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 2.0}
NO_LINEAR = {"built": SPECIAL_TOKENS, "fields": {"rope_parameters": LINEAR}}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint.

    topic: the row of the table.
    name: of the directory; tells cases of a topic apart.
    family: Hugging Face's model_type.
    head: "lm" or "scalar".
    built: fields of the configuration of which transformers makes the weights, beside SIZES.
    fields: what config.json says beside that, or instead.
    dropped: fields that config.json lacks.
    greedy: whether tokens are also decoded greedily.
    files: the name of a function of the judge that changes the files, or "".
    """

    topic: str
    name: str
    family: str = "qwen2"
    head: str = "lm"
    built: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    greedy: bool = False
    files: str = ""


def all_cases(only: str = "") -> list[Case]:
    """Return every case whose name has this text in it; no two have the same name."""
    cases = [
        *other_families(),
        *shapes(),
        *biases(),
        *scalings(),
        *longropes(),
        *both_places(),
        *lengths(),
        *without_effect(),
        *stored(),
    ]
    cases += [*unsupported(), *wrong()]
    return [case for case in cases if only in case.name]


def other_families() -> Iterator[Case]:
    """Yield the variants of the families that are not in FAMILIES, and their classifiers."""
    for family, variants in OTHER_FAMILIES.items():
        for name, fields in variants.items():
            yield Case(
                topic=f"{family}: logits, and tokens decoded greedily",
                name=f"{family}-{name}",
                family=family,
                built={"num_hidden_layers": 4} | SPECIAL_TOKENS | dict(fields),
                greedy=True,
            )
        if family not in ("granite", *FAMILIES):
            yield Case(
                topic="sequence classifiers of the other families",
                name=f"{family}-score",
                family=family,
                head="scalar",
                built={**SPECIAL_TOKENS, "tie_word_embeddings": False},
            )


def shapes() -> Iterator[Case]:
    """Yield heads, sizes and ties of every family, and fields that are absent or null."""
    for family in FAMILIES:
        topic = "as transformers saves it: tied or not, 1, 2 or 4 key and value heads, head_dim"
        for tied in (False, True):
            for kv_heads in (1, 2, 4):
                built = {"tie_word_embeddings": tied, "num_key_value_heads": kv_heads}
                yield Case(
                    topic=topic,
                    name=f"{family}-kv{kv_heads}-{'tied' if tied else 'untied'}",
                    family=family,
                    built={**built, "head_dim": 16},
                )
        yield Case(
            topic="a sequence classifier with one label, with and without `architectures`",
            name=f"{family}-score",
            family=family,
            head="scalar",
        )
        topic = "`head_dim` absent: 128 for Qwen3, else a head's share"
        size = 128 if family == "qwen3" else 8
        yield Case(
            topic=topic,
            name=f"{family}-no-head-dim",
            family=family,
            built={"head_dim": size},
            dropped=("head_dim",),
        )
        topic = "other fields absent, where transformers has defaults, or null"
        yield Case(
            topic=topic,
            name=f"{family}-null-kv",
            family=family,
            built={"num_key_value_heads": 4},
            fields={"num_key_value_heads": None},
        )
        yield Case(
            topic=topic,
            name=f"{family}-defaults",
            family=family,
            built={"max_position_embeddings": 2048 if family == "llama" else 32768},
            dropped=(
                "hidden_act",
                "max_position_embeddings",
                "rms_norm_eps",
                "rope_parameters",
                "tie_word_embeddings",
                "layer_types",
            ),
        )
    yield Case(
        topic="a sequence classifier with one label, with and without `architectures`",
        name="qwen2-score-no-architectures",
        head="scalar",
        dropped=("architectures",),
    )
    yield Case(
        topic="other fields absent, where transformers has defaults, or null",
        name="llama-no-kv",
        family="llama",
        built={"num_key_value_heads": 4},
        dropped=("num_key_value_heads",),
    )


def biases() -> Iterator[Case]:
    """Yield models with biases of families that mostly have none."""
    topic = "biases: `attention_bias`, `mlp_bias`"
    for name, family, built in (
        ("bias-llama", "llama", {"attention_bias": True}),
        ("bias-mlp", "llama", {"mlp_bias": True}),
        ("bias-qwen3", "qwen3", {"attention_bias": True}),
    ):
        yield Case(topic=topic, name=name, family=family, built=built)


def scalings() -> Iterator[Case]:
    """Yield every kind of RoPE, in each of the three forms that config files have it."""
    for family in FAMILIES:
        for kind, settings in SCALINGS.items():
            topic = (
                f"RoPE {kind}, in `rope_parameters`, or `rope_scaling` with `rope_type` or `type`"
            )
            built = {
                "head_dim": 8,
                "max_position_embeddings": SHORT if kind == "dynamic" else 64,
                "rope_parameters": {"rope_type": kind, "rope_theta": THETA, **settings},
            }
            yield Case(topic=topic, name=f"{family}-{kind}-new", family=family, built=built)
            for key in ("rope_type", "type"):
                yield Case(
                    topic=topic,
                    name=f"{family}-{kind}-{key}",
                    family=family,
                    built=built,
                    fields={"rope_theta": THETA, "rope_scaling": {key: kind, **settings}},
                    dropped=("rope_parameters",),
                )


def longropes() -> Iterator[Case]:
    """Yield the forms of longrope that configs of Phi-3 have, and sequences of both kinds."""
    topic = "longrope of Phi-3: `su` and `yarn`, lengths, factors, sequences short and long"
    factors = {"short_factor": [1.0, 1.5, 1.25], "long_factor": [1.0, 4.0, 9.0]}
    settings = {"rope_type": "longrope", "partial_rotary_factor": 0.75, **factors}
    at_the_top = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32}
    for name, changes, fields in (
        ("short", {"original_max_position_embeddings": 40}, {}),
        ("factor", {"factor": 3.0}, {}),
        ("factor-below-1", {"factor": 0.5}, {}),
        ("attention", {"attention_factor": 1.5}, {}),
        ("longest", {}, {"original_max_position_embeddings": 128}),
        ("su", {}, {"rope_scaling": {"type": "su", **factors, **at_the_top}}),
        ("yarn", {}, {"rope_scaling": {"type": "yarn", **factors}, **at_the_top}),
        ("type", {}, {"rope_scaling": {"type": "longrope", **factors}, **at_the_top}),
    ):
        length = changes.get("original_max_position_embeddings", 32)
        yield Case(
            topic=topic,
            name=f"longrope-{name}",
            family="phi3",
            built={
                **SPECIAL_TOKENS,
                "rope_parameters": settings | changes,
                "original_max_position_embeddings": length,
            },
            fields=fields,
            dropped=("rope_parameters",) if "rope_scaling" in fields else (),
        )
    yield Case(
        topic="`partial_rotary_factor` of Phi-3",
        name="partial-phi3",
        family="phi3",
        built=SPECIAL_TOKENS,
        fields={"partial_rotary_factor": 0.5},
        dropped=("rope_parameters",),
    )


def both_places() -> Iterator[Case]:
    """Yield configs in which one place of RoPE's settings says other things than another."""
    topic = "`rope_scaling` beside `rope_parameters`: the former alone counts"
    scaled = {"type": "yarn", **SCALINGS["yarn"]}
    for family in FAMILIES:
        common = {"topic": topic, "family": family}
        built = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
        yield Case(**common, name=f"{family}-beside", built=built, fields={"rope_scaling": scaled})
        yield Case(
            **common,
            name=f"{family}-beside-theta",
            built=built,
            fields={"rope_scaling": scaled, "rope_theta": THETA},
        )
    yield Case(
        topic=topic,
        name="beside-scaled",
        built={"rope_parameters": LLAMA3},
        fields={"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}},
    )
    topic = "`rope_scaling` null or empty, `rope_theta` beside `rope_parameters.rope_theta`"
    for name, fields in (
        ("null", {"rope_scaling": None}),
        ("empty", {"rope_scaling": {}}),
        ("theta", {"rope_theta": 77.0}),
        ("null-parameters", {"rope_parameters": None, "rope_theta": 77.0}),
    ):
        yield Case(topic=topic, name=f"rope-{name}", built={"rope_parameters": YARN}, fields=fields)


def lengths() -> Iterator[Case]:
    """Yield the lengths and factors of YaRN and llama3, given, absent, extreme."""
    topic = "`original_max_position_embeddings` at the top, in the settings, or absent"
    for family in FAMILIES:
        for kind, rope in (("yarn", YARN), ("llama3", LLAMA3)):
            yield Case(
                topic=topic,
                name=f"{family}-{kind}-top",
                family=family,
                built={"rope_parameters": rope},
                fields={"original_max_position_embeddings": 40},
            )
    for name, changes in (
        ("absent", {}),
        ("tiny", {"original_max_position_embeddings": 1}),
        ("huge", {"original_max_position_embeddings": 10**8}),
    ):
        rope = {key: value for key, value in YARN.items() if not key.startswith("original")}
        yield Case(topic=topic, name=f"yarn-{name}", built={"rope_parameters": rope | changes})
    topic = "YaRN's `beta_fast`, `beta_slow`, a null `factor`, attention factors"
    for name, changes in (
        ("betas", {"beta_fast": 8, "beta_slow": 2}),
        ("betas-zero", {"beta_fast": 0, "beta_slow": 0}),
        ("betas-equal", {"beta_fast": 2, "beta_slow": 2}),
        ("factor-null", {"factor": None}),
        ("factor-below-1", {"factor": 0.5}),
        ("mscale-alone", {"mscale": 0.7}),
        ("mscale-and-0", {"mscale": 1.0, "mscale_all_dim": 0.0}),
        ("attention-factor", {"attention_factor": 1.1386294361119891}),
        ("attention-other", {"attention_factor": 1.5}),
        ("mscales", {"mscale": 1.0, "mscale_all_dim": 1.0}),
    ):
        yield Case(topic=topic, name=f"yarn-{name}", built={"rope_parameters": YARN | changes})


def without_effect() -> Iterator[Case]:
    """Yield fields that change nothing."""
    topic = "dropout, fields of windows that no layer has, and others without effect"
    for name, family, fields in (
        ("dropout", "qwen2", {"attention_dropout": 0.1, "resid_pdrop": 0.1}),
        ("dropout-llama", "llama", {"attention_dropout": 0.1, "hidden_dropout": 0.3}),
        ("window-off", "qwen2", {"use_sliding_window": False, "sliding_window": 4}),
        ("window-of-listed", "qwen3", {"use_sliding_window": True, "sliding_window": 4}),
        ("window-null", "qwen2", {"use_sliding_window": True, "sliding_window": None}),
        ("window-llama", "llama", {"sliding_window": 4}),
        ("swish", "qwen2", {"hidden_act": "swish"}),
        ("tensor-parallel", "llama", {"pretraining_tp": 2}),
        ("code", "llama", {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}),
        ("bias-qwen2", "qwen2", {"attention_bias": False}),
        ("dtype", "qwen2", {"torch_dtype": "bfloat16", "dtype": "float16"}),
    ):
        yield Case(topic=topic, name=f"without-{name}", family=family, fields=fields)
    yield Case(
        topic=topic,
        name="without-window-late",
        fields={"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        dropped=("layer_types",),
    )


def stored() -> Iterator[Case]:
    """Yield ways in which the tensors may be in files."""
    for topic, name, changes in (
        ("shards with an index", "sharded", {}),
        ("`model.safetensors` beside an index: the file counts, not the index", "stale_index", {}),
        ("`model.safetensors` beside an index: the file counts, not the index", "stray_file", {}),
        ("tensors in bfloat16, float16, or several types", "bfloat16", {}),
        ("tensors in bfloat16, float16, or several types", "float16", {}),
        ("tensors in bfloat16, float16, or several types", "mixed_types", {}),
        ("saved without a head, so without the prefix `model.`", "no_prefix", {"tied": True}),
        ("a stored copy of a tied head; `inv_freq`", "tied_copy", {"tied": True}),
        ("a stored copy of a tied head; `inv_freq`", "inv_freq", {}),
        (
            "a language model's head in a sequence classifier: not read",
            "lm_head_left",
            {"rm": True},
        ),
    ):
        yield Case(
            topic=topic,
            name=name,
            files=name,
            head="scalar" if "rm" in changes else "lm",
            built={"tie_word_embeddings": True} if "tied" in changes else {},
        )


def unsupported() -> Iterator[Case]:
    """Yield what we don't compute; transformers reads most of it."""
    for topic, name, rope in (
        ("RoPE proportional", "proportional", {"rope_type": "proportional"}),
        ("YaRN with `truncate` false", "truncate", YARN | {"truncate": False}),
        (
            "`partial_rotary_factor` of families that rotate whole heads",
            "partial",
            {"rope_type": "default", "partial_rotary_factor": 0.5},
        ),
        ("sections of RoPE for several axes", "mrope", {"mrope_section": [2, 1, 1]}),
    ):
        yield Case(
            topic=topic, name=f"no-{name}", fields={"rope_parameters": {"rope_theta": THETA} | rope}
        )
    for topic, name, changes in (
        ("another `hidden_act`", "gelu", {"built": {"hidden_act": "gelu"}}),
        (
            "attention in both directions: `is_causal` false",
            "causal",
            {"fields": {"is_causal": False}},
        ),
        (
            "layers of several kinds: `per_layer_config`",
            "per-layer",
            {"fields": {"per_layer_config": {"0": {"num_key_value_heads": 2}}}},
        ),
        (
            "quantised weights",
            "quantised",
            {"fields": {"quantization_config": {"quant_method": "gptq", "bits": 4}}},
        ),
        (
            "weights in a file that config.json names",
            "weights-named",
            {"fields": {"transformers_weights": "model.safetensors"}},
        ),
        (
            "a classifier with several labels",
            "labels",
            {"head": "scalar", "built": {"num_labels": 2}},
        ),
        (
            "layers without experts among others",
            "sparse-step",
            {"family": "qwen3_moe", "built": MIXTURE, "fields": {"decoder_sparse_step": 2}},
        ),
        (
            "layers without experts among others",
            "mlp-only",
            {"family": "qwen3_moe", "built": MIXTURE | {"mlp_only_layers": [0]}},
        ),
        ("tensors in float64 or 8 bits", "float64", {"files": "float64"}),
        ("tensors in float64 or 8 bits", "float8", {"files": "float8"}),
        ("a tensor in two shards", "twice", {"files": "twice"}),
        ("a number that is NaN or infinite", "nan", {"files": "nan"}),
        ("a number that is NaN or infinite", "infinite", {"files": "infinite"}),
        ("a tensor is missing", "missing", {"files": "missing"}),
        ("a tensor is missing", "untied", {"files": "untied"}),
        ("a tensor more than the model has", "extra", {"files": "extra"}),
        ("`pytorch_model.bin` alone", "pickle", {"files": "pickle"}),
        ("scalings that Phi-3 lacks", "linear", {"family": "phi3", **NO_LINEAR}),
        ("another `model_type`", "mamba", {"fields": {"model_type": "mamba"}}),
    ):
        yield Case(**{"topic": topic, "name": f"no-{name}", **changes})
    for name, changes in (
        ("length", {"short_factor": [1.0] * 3}),
        ("text", {"long_factor": "1,1,1,1"}),
        ("negative", {"long_factor": [1.0, -1.0, 1.0, 1.0]}),
        ("zero", {"attention_factor": 0.0}),
    ):
        rope = {"rope_type": "longrope", "rope_theta": THETA, **SCALINGS["longrope"], **changes}
        yield Case(
            topic="factors of longrope that are too few, no numbers, or not above 0",
            name=f"no-longrope-{name}",
            fields={"rope_parameters": rope},
        )


def wrong() -> Iterator[Case]:
    """Yield files with faults."""
    topic = "wrong types and values"
    for number, fields in enumerate(
        (
            {"hidden_size": "32"},
            {"num_hidden_layers": 2.0},
            {"num_hidden_layers": True},
            {"num_hidden_layers": 0},
            {"num_attention_heads": -4},
            {"vocab_size": None},
            {"vocab_size": 10**12},
            {"rms_norm_eps": "1e-6"},
            {"rms_norm_eps": None},
            {"rms_norm_eps": float("nan")},
            {"tie_word_embeddings": None},
            {"tie_word_embeddings": "yes"},
            {"hidden_act": 5},
            {"hidden_act": None},
            {"max_position_embeddings": [64]},
            {"rope_parameters": [1]},
            {"rope_parameters": {"rope_type": "linear"}},
            {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
            {"rope_parameters": {"rope_type": ["linear"], "factor": 2.0}},
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": None}},
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            {"rope_scaling": "yarn"},
            {"pad_token_id": [0]},
            {"eos_token_id": "</s>"},
            {"layer_types": ["full_attention"]},
            {"layer_types": "full_attention"},
            {"use_sliding_window": None},
            {"num_key_value_heads": 3},
            {"num_key_value_heads": 0},
            {"model_type": ["qwen2"]},
            {"model_type": None},
            {"architectures": "Qwen2ForCausalLM"},
            {"id2label": []},
            {"dtype": 32},
        )
    ):
        yield Case(topic=topic, name=f"wrong-{number:02}", fields=fields)
    topic = "heads that do not divide the size, tensors of other shapes than config.json says"
    yield Case(topic=topic, name="heads-llama", family="llama", fields={"num_attention_heads": 3})
    yield Case(topic=topic, name="qwen3-null-head-dim", family="qwen3", fields={"head_dim": None})
    yield Case(topic=topic, name="kv-absent", dropped=("num_key_value_heads",))
    yield Case(topic=topic, name="vocabulary-absent", dropped=("vocab_size",))
    yield Case(topic=topic, name="wide", fields={"intermediate_size": 48})
    topic = "a damaged file, an index of another form"
    for name in (
        "truncated",
        "not_json",
        "negative_offset",
        "index_list",
        "index_numbers",
        "index_outside",
        "shard_gone",
    ):
        yield Case(topic=topic, name=name, files=name)


def by_topic(cases: list[Case]) -> dict[str, list[Case]]:
    """Return topic -> its cases, in the order of the topics' first cases."""
    topics: dict[str, list[Case]] = {}
    for case in cases:
        topics.setdefault(case.topic, []).append(case)
    return topics


def as_dict(case: Case) -> dict[str, Any]:
    """Return a case as a dictionary of its fields."""
    return dataclasses.asdict(case)
