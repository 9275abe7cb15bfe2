"""Families whose layers differ from Llama's: against torch, padded, packed and classified.

test_models.py decodes them through the caches, test_convert.py reads and writes their files.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import (
    BY_LENGTH,
    GOLDEN,
    SMALL,
    apply,
    count_positions,
    error,
    golden,
    golden_case,
    largest_error,
    run,
    sum_of_sines,
    tiny,
    words,
)

from alignjax import config as configs
from alignjax.config import Config, Model, UserError, check
from alignjax.models import attention, families, layer_kinds, scoring, transformer
from alignjax.models.attention import flash, plain
from alignjax.weights import hf


@pytest.mark.parametrize("name", SMALL + BY_LENGTH)
def test_logits_are_those_of_torch_padded_and_packed(name):
    """Both rows of the golden file, padded on the left; then one behind the other."""
    model, params, data = golden(name)
    tokens, mask, theirs = golden_case(data, "left")
    model = dataclasses.replace(model, max_length=tokens.shape[1])
    assert model.rope_varies == (name in BY_LENGTH)
    real = mask > 0
    assert error(run(model, params, tokens, mask)[real], theirs[real]) < 2e-5
    segments = np.repeat([[1], [2]], tokens.shape[1], axis=1)[real][None]
    positions = count_positions(mask)[real][None]
    packed = run(model, params, tokens[real][None], segments, positions)
    assert error(packed[0], theirs[real]) < 2e-5


@pytest.mark.parametrize("name", BY_LENGTH)
def test_tokens_are_not_added_to_a_sequence_whose_length_changes_its_rope(name):
    """Up to the original length they are; frequencies are then those of short sequences."""
    model, params, data = golden(name)
    longer = dataclasses.replace(model, max_length=17)
    tokens, mask, theirs = golden_case(data, "left")
    for keep, extra_axis in ((True, ()), (False, (2,))):
        segments = np.ones((*tokens.shape, *extra_axis), np.int32)
        with pytest.raises(UserError, match="max_length=17: .* at most 16$"):
            transformer.apply(longer, params, tokens, count_positions(mask), segments, keep)
    layers = transformer.for_decoding(longer, params)
    with pytest.raises(UserError, match="tokens cannot be added to it"):
        transformer.decode(longer, params, layers, tokens[:, 0], tokens[:, 0], [], run)
    short = dataclasses.replace(model, max_length=16)
    row = mask[1] > 0
    alone = run(short, params, tokens[1:, row], mask[1:, row])
    assert error(alone[0], theirs[1, row]) < 2e-5


def test_a_run_that_samples_needs_lengths_that_do_not_change_its_rope():
    config = configs.load("ppo.py:tiny", {"model.rope_scaling": "dynamic"})
    config.model.rope_original_length = config.model.max_length
    check(config)
    config.model.rope_original_length -= 1
    with pytest.raises(UserError, match="set max_length to at most"):
        check(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_share": 0.3}, "model.rope_share=0.3 of model.head_size=32 must be an even number"),
        ({"rope_scaling": "longrope"}, "model.rope_short_factors='' must be 16 numbers above 0"),
        ({"rope_long_factors": "1,2"}, "model.rope_long_factors='1,2' must be 0 numbers"),
        ({"rope_scaling": "dynamic", "head_size": 2}, "needs more than 2 rotated numbers"),
    ],
)
def test_settings_of_rope_that_do_not_fit_are_named(fields, message):
    config = Config()
    for field, value in fields.items():
        setattr(config.model, field, value)
    with pytest.raises(UserError, match=message):
        check(config)


@pytest.mark.parametrize("fields", [{"logits_divisor": 2.5, "logits_cap": 0.8}])
def test_logprobs_and_entropies_are_those_of_the_logits(fields):
    """What follows the output kernel is in the chunked log-probabilities, and in their gradient."""
    model, params = tiny(layers=1, **fields)
    tokens = words(1, 2, 9)
    places = count_positions(tokens)
    packed = scoring.PackedTokens(tokens=tokens, positions=places, segments=np.ones_like(tokens))
    targets = places[:, 1:]

    def chunked(params):
        logprobs, entropy = scoring.token_logprobs(model, params, packed, targets, 0.7)
        return (logprobs * np.sin(targets) + entropy).sum()

    def dense(params):
        hidden = scoring.hidden_states(model, params, packed)[:, :-1]
        all_logprobs = jax.nn.log_softmax(transformer.logits(model, params, hidden) / 0.7)
        entropy = -(jnp.exp(all_logprobs) * all_logprobs).sum(-1)
        logprobs = jnp.take_along_axis(all_logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        return (logprobs * np.sin(targets) + entropy).sum()

    ours, our_gradient = jax.jit(jax.value_and_grad(chunked))(params)
    theirs, their_gradient = jax.jit(jax.value_and_grad(dense))(params)
    assert abs(ours - theirs) < 2e-5 * abs(theirs)
    assert largest_error(our_gradient, their_gradient) < 2e-5


def test_the_score_of_another_family_is_that_of_torch():
    model, params, data = golden("olmo2_score")
    tokens, mask, theirs = golden_case(data, "left")
    hidden = apply(model, params, tokens, count_positions(mask), mask).hidden
    assert error(np.asarray(transformer.scalar(params, hidden))[:, -1:], theirs) < 2e-5


def test_a_field_that_a_format_cannot_express_is_named():
    model = Model(family="qwen2", residual_multiplier=0.5)
    with pytest.raises(UserError, match="model.residual_multiplier=0.5 has no place"):
        families.hf_from_model(model, "lm")


def test_a_family_without_a_classifier_in_transformers_exports_none():
    model = golden("granite").model
    with pytest.raises(UserError, match="transformers has no sequence classifier"):
        families.hf_from_model(model, "scalar")


def test_biases_of_a_model_are_wanted_in_its_files(tmp_path):
    shutil.copytree(GOLDEN / "llama_bias", tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"mlp_bias": False}))
    with pytest.raises(UserError, match="mlp.*bias.* has no place in 'llama'"):
        hf.load_hf(tmp_path / "copy", "lm")


def test_layer_types_repeat_until_all_layers_have_one():
    model = Model(layers=5, layer_types="full,full_nope")
    assert layer_kinds.names(model) == ["full", "full_nope"] * 2 + ["full"]
    assert layer_kinds.pattern_of(layer_kinds.names(model)) == model.layer_types
    assert layer_kinds.pattern_of(["full"] * 3) == "full"


def test_scanned_layers_are_those_that_are_written_out(monkeypatch):
    """A scan selects what sets a layer apart by arrays, with a gradient through it."""
    model, params = tiny(layers=3, layer_types="full,full_nope", remat="everything")
    tokens = words(0, 2, 9)
    written_out = jax.jit(jax.grad(sum_of_sines, 1), static_argnums=0)(model, params, tokens)
    monkeypatch.setattr(transformer, "UNROLLED", 0)
    scanned = jax.jit(jax.grad(sum_of_sines, 1), static_argnums=0)(model, params, tokens)
    assert largest_error(scanned, written_out) < 1e-5


def test_a_scan_selects_the_layers_that_see_a_window(monkeypatch):
    model, params = tiny(layers=3, layer_types="full,window,window_nope", window=3)
    tokens = words(0, 2, 9)
    ones = np.ones_like(tokens)
    written_out = run(model, params, tokens, ones)
    monkeypatch.setattr(transformer, "UNROLLED", 0)
    jax.clear_caches()
    assert error(run(model, params, tokens, ones), written_out) < 2e-6
    everything = dataclasses.replace(model, window=9)
    assert error(run(everything, params, tokens, ones), written_out) > 1e-3


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def attended(queries, keys, values, mask):
    """Return attention by its definition; `mask` is [batch queries keys]."""
    keys, values = (jnp.repeat(x, queries.shape[2] // x.shape[2], axis=2) for x in (keys, values))
    scores = jnp.einsum("bqnh,bknh->bnqk", queries, keys) * queries.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnqk,bknh->bqnh", weights, values)


@pytest.mark.parametrize("tokens", [40, 100, 600])
def test_a_window_is_that_of_its_definition_in_rows_of_any_length(tokens):
    queries = draw(0, 1, tokens, 4, 8)
    keys = draw(1, 1, tokens, 2, 8)
    values = draw(2, 1, tokens, 2, 8)
    first = tokens // 3
    segments = np.repeat([[1, 2]], [first, tokens - first], axis=1)
    positions = np.concatenate([np.arange(first), np.arange(tokens - first)])[None]
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    mask = (segments[:, :, None] == segments[:, None]) & (distance >= 0) & (distance < 7)
    ours = attention.self_attention(
        queries, keys, values, segments, window=attention.Window(7, positions, True)
    )
    assert error(ours, attended(queries, keys, values, mask)) < 2e-5


def test_a_window_reaches_into_a_prefix_that_has_pads():
    queries = draw(0, 1, 6, 2, 8)
    keys = draw(1, 1, 10, 2, 8)
    values = draw(2, 1, 10, 2, 8)
    padded = [jnp.pad(x[0, :4], ((3, 0), (0, 0), (0, 0))) for x in (keys, values)]
    prefix = attention.SharedKeys(*padded, real=jnp.arange(7) >= 3)
    window = attention.Window(5, np.arange(4, 10)[None], True)
    ones = jnp.ones((1, 6), jnp.int32)
    ours = attention.self_attention(
        queries, keys[:, 4:], values[:, 4:], ones, prefix=prefix, window=window
    )
    distance = np.arange(4, 10)[:, None] - np.arange(10)
    mask = (distance >= 0) & (distance < 5)
    assert error(ours, attended(queries, keys, values, mask[None])) < 2e-5


@pytest.mark.parametrize("applies", [True, False])
def test_splash_attention_has_windows_in_layers_that_are_scanned(applies):
    queries = draw(0, 1, 128, 2, 8)
    segments = jnp.repeat(jnp.array([[1, 2]]), 64, axis=1)
    positions = jnp.tile(jnp.arange(64), 2)[None]
    window = attention.Window(9, positions, jnp.asarray(applies))
    ours = flash.splash_with(window, 0.7, queries, queries, queries, segments)
    theirs = plain.plain_attention(queries, queries, queries, segments, window=window, cap=0.7)
    assert error(ours, theirs) < 2e-5


def test_the_kernels_for_gpus_that_know_no_windows_are_not_chosen():
    shape = (8, 256, 4, 64)
    dtype = jnp.dtype(jnp.bfloat16)
    assert attention.choose("auto", "gpu", dtype, shape, 4) == "triton"
    assert attention.choose("auto", "gpu", dtype, shape, 4, has_window=True) == "cudnn"
    with pytest.raises(UserError, match="model.window of at least the 256 tokens"):
        attention.choose("triton", "gpu", dtype, shape, 4, has_window=True)


def test_layers_with_a_window_need_one():
    for changes in ({"window": 4}, {"layer_types": "full,window"}):
        config = Config()
        for field, value in changes.items():
            setattr(config.model, field, value)
        with pytest.raises(UserError, match="does not go with model.layer_types"):
            check(config)
