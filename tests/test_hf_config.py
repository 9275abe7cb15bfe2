"""config.json of other people: what transformers would compute, or a refusal in one line.

`benchmarks/checkpoints.py` compares logits with transformers itself, over a grid that has these
configs and more.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.config import Model, UserError
from alignjax.models import families, rope

GOLDEN = Path(__file__).parent / "golden"
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {"type": "longrope", "short_factor": [1] * 4, "long_factor": [2.0] * 4}


def config_of(family, dropped=(), **fields) -> dict:
    """Return a family's config.json with fields changed or dropped."""
    config = json.loads((GOLDEN / family / "config.json").read_text())
    return {key: value for key, value in (config | fields).items() if key not in dropped}


def read(family="qwen2", dropped=(), **fields) -> Model:
    """Return the model that a changed config.json describes."""
    return families.model_from_hf(config_of(family, dropped, **fields))


def refusal(family="qwen2", dropped=(), **fields) -> str:
    """Return the error for a changed config.json, which must be one line that names the file."""
    with pytest.raises(UserError) as raised:
        read(family, dropped, **fields)
    message = str(raised.value)
    assert message.startswith("config.json: ")
    assert "\n" not in message
    return message


def test_rope_scaling_comes_before_rope_parameters():
    """As model cards tell users to add it to a file that transformers 5 has saved."""
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    scaling = {"type": "yarn", **YARN}
    model = read(rope_parameters=parameters, rope_theta=1e6, rope_scaling=scaling)
    assert (model.rope_scaling, model.rope_factor, model.rope_theta) == ("yarn", 4.0, 1e6)
    assert model.rope_original_length == 16
    # The theta of the settings that do not count does not count either.
    assert read(rope_parameters=parameters, rope_scaling=scaling).rope_theta == 10000.0


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_rope_scaling_leaves_rope_parameters(empty):
    parameters = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}
    model = read(rope_parameters=parameters, rope_scaling=empty, rope_theta=5.0)
    assert (model.rope_scaling, model.rope_factor, model.rope_theta) == ("linear", 3.0, 77.0)


@pytest.mark.parametrize("settings", [{"rope_type": "yarn", **YARN}, LLAMA3])
def test_the_original_length_at_the_top_comes_first(settings):
    model = read(rope_parameters=settings, original_max_position_embeddings=200)
    assert model.rope_original_length == 200
    without = {key: value for key, value in settings.items() if not key.startswith("original")}
    assert read(rope_parameters=without).rope_original_length == read().max_length


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths():
    settings = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    assert read(rope_parameters=settings, max_position_embeddings=64).rope_factor == 4.0


@pytest.mark.parametrize(
    "settings",
    [
        {"mscale": 0.7},
        {"mscale": 1.0, "mscale_all_dim": 0},
        {"attention_factor": 1.1386294361119891},
        {"attention_factor": None},
    ],
)
def test_an_attention_factor_equal_to_ours_is_accepted(settings):
    assert read(rope_parameters={"rope_type": "yarn", **YARN, **settings}).rope_factor == 4.0


def test_another_attention_factor_is_kept_and_written():
    yarn = {"rope_type": "yarn", **YARN}
    assert read(rope_parameters=yarn | {"attention_factor": 1.5}).rope_magnitude == 1.5
    model = read(rope_parameters=yarn | {"mscale": 1.0, "mscale_all_dim": 1.0})
    assert model.rope_magnitude == 1.0
    assert families.model_from_hf(families.hf_from_model(model, "lm")) == model


def test_longrope_of_any_factor_is_written_as_it_was_read():
    for settings in ({}, {"factor": 2.5}, {"factor": 1 / 3}, {"attention_factor": 2.0}):
        model = read(rope_scaling=LONGROPE | settings, original_max_position_embeddings=16)
        assert (model.rope_factor, model.rope_long_factors) == (
            settings.get("factor", 4.0),
            "2.0,2.0,2.0,2.0",
        )
        written = families.hf_from_model(dataclasses.replace(model, max_length=20), "lm")
        again = families.model_from_hf(written)
        assert dataclasses.replace(again, max_length=64) == model


def test_the_length_at_which_dynamic_scaling_begins_is_written_whatever_a_run_reads():
    model = read(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert (model.rope_original_length, model.rope_varies) == (64, False)
    longer = dataclasses.replace(model, max_length=100)
    assert longer.rope_varies
    assert families.model_from_hf(families.hf_from_model(longer, "lm")) == model


def test_the_config_of_a_phi3_is_one_that_transformers_4_reads():
    model = read("phi3")
    assert (model.rope_share, model.rope_factor, model.window) == (0.75, 2.0, 5)
    written = families.hf_from_model(model, "lm")
    assert set(written["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert written["original_max_position_embeddings"] == 32
    assert families.model_from_hf(written) == model
    message = refusal("phi3", partial_rotary_factor=0.7, rope_parameters=None)
    assert "partial_rotary_factor=0.7 must be" in message


@pytest.mark.parametrize("original", [1, 10**8])
def test_yarn_at_extreme_lengths_ramps_as_in_its_definition(original):
    """A ramp that ends before it begins leaves all frequencies kept, or all stretched."""
    size = 8
    model = Model(
        head_size=size,
        rope_theta=500.0,
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_low_factor=1.0,
        rope_high_factor=32.0,
        rope_original_length=original,
    )
    plain = 500.0 ** (-np.arange(0, size, 2) / size)
    low = max(np.floor(rope.yarn_dimension(model, 32.0)), 0)
    high = min(np.ceil(rope.yarn_dimension(model, 1.0)), size - 1)
    assert high < low
    ramp = np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
    expected = plain * (1 - ramp) + plain / 4 * ramp
    frequencies = rope.yarn_frequencies(model, jnp.asarray(plain, jnp.float32))
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)


@pytest.mark.parametrize(("family", "size"), [("qwen3", 128), ("qwen2", 8), ("llama", 8)])
def test_an_absent_head_dim_is_that_of_the_family(family, size):
    assert read(family, dropped=("head_dim",)).head_size == size


def test_absent_fields_are_those_of_transformers():
    dropped = ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "hidden_act")
    qwen = read("qwen2", dropped)
    assert (qwen.norm_eps, qwen.tied, qwen.max_length) == (1e-6, False, 32768)
    llama = read("llama", (*dropped, "num_key_value_heads", "vocab_size"))
    assert (llama.kv_heads, llama.max_length, llama.vocab_size) == (4, 2048, 32000)
    assert "num_key_value_heads=32 (the default)" in refusal("qwen2", ("num_key_value_heads",))
    assert read("qwen2", num_key_value_heads=None).kv_heads == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_dropout": 0.1},
        {"sliding_window": 4, "use_sliding_window": False},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 4},  # layer_types has no such layer
        {"hidden_act": "swish"},
        {"auto_map": {"AutoConfig": "mine.Config"}},
    ],
)
def test_fields_without_effect_are_accepted(fields):
    assert read(**fields) == read()


def test_the_layers_that_see_a_window_are_those_of_transformers():
    window = {"use_sliding_window": True, "sliding_window": 4}
    assert read(dropped=("layer_types",), **window, max_window_layers=2) == read()
    late = read(dropped=("layer_types",), **window, max_window_layers=1)
    assert (late.window, late.layer_types) == (4, "full,window")
    everywhere = read(layer_types=["sliding_attention"] * 2, **window)
    assert (everywhere.window, everywhere.layer_types) == (4, "window")
    message = refusal(layer_types=["sliding_attention"] * 2, use_sliding_window=False)
    assert "with use_sliding_window=false is no window" in message
    assert read("mistral", sliding_window=None).window == 0
    assert read("mistral", dropped=("sliding_window", "layer_types")).window == 4096


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_scaling": {"type": "proportional"}}, "rope_scaling.rope_type='proportional'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.short_factor is"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1] * 3}}, "must be a list of 4 numbers"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "more than 2"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters.rope_type=['yarn']"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention={}"),
        ({"rope_parameters": {"rope_type": "yarn", **YARN, "truncate": False}}, "truncate=false"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor=4 must be below"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"is_causal": False}, "is_causal=false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"text_config": {}}, "text_config={}"),
        ({"per_layer_config": {}}, "per_layer_config={}"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers=2, but layer_types has 1"),
        ({"model_type": ["qwen2"]}, "model_type=['qwen2'] must be one of"),
        ({"head_dim": 7}, "size of a head is 7"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields, named):
    assert named in refusal(**fields)


NUMBERS = ("rms_norm_eps", "rope_theta")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
NOT_A_NUMBER = ("32", True, [32], {}, float("nan"), float("inf"), -1)


@pytest.mark.parametrize("field", [*NUMBERS, *SIZES])
def test_a_number_of_the_wrong_type_or_size_is_named(field):
    for value in (*NOT_A_NUMBER, None, 10**400):
        message = refusal(dropped=("rope_parameters",), **{field: value})
        assert f"config.json: {field}=" in message, value
        assert len(message) < 250


@pytest.mark.parametrize("field", SIZES)
def test_a_size_is_a_whole_number_above_0(field):
    for value in (0, 32.0, 10**12):
        assert f"{field}={value} must be a whole number from 1 to" in refusal(**{field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("tie_word_embeddings", (None, "yes", 1)),
        ("use_sliding_window", (None, "no", 0)),
        ("hidden_act", (None, 5, ["silu"])),
        ("rope_scaling", ("yarn", [1], 2, False)),
        ("rope_parameters", ("yarn", [1], 2)),
        ("layer_types", ("full_attention", 2, [None])),
        ("architectures", ("Qwen2ForCausalLM", 1)),
        ("id2label", ([], "LABEL_0")),
        ("eos_token_id", ("</s>", True)),
        ("pad_token_id", ([0], "<pad>", 1.5)),
        ("num_key_value_heads", (0, "2", 3)),
    ],
)
def test_a_field_of_another_type_is_named(field, values):
    for value in values:
        assert f"{field}" in refusal(**{field: value})


def test_llama_needs_heads_that_divide_its_size():
    assert "num_attention_heads=3 must divide hidden_size=32" in refusal(
        "llama", num_attention_heads=3, num_key_value_heads=3
    )
    assert "head_dim=null" in refusal("qwen3", head_dim=None)


def test_qwens_own_fields_are_checked_too():
    assert "kv_channels='8' must be" in refusal("qwen", kv_channels="8")
    assert "intermediate_size=81 must be an even number" in refusal("qwen", intermediate_size=81)
    assert "seq_length is missing" in refusal("qwen", dropped=("seq_length",))
