"""Rollouts: slots and cache against the full forward pass, and what a sample depends on."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import TINY, tiny

from alignjax.config import Mesh
from alignjax.machine import sharding
from alignjax.models import scoring, transformer
from alignjax.sampling import rollout
from alignjax.sampling.cache import choose_cache
from alignjax.sampling.slots import SlotPlan, plan_slots
from alignjax.sampling.top_p import sample_tokens
from alignjax.sampling.types import Prompts, Rollout, SamplingSettings

MODEL, PARAMS = tiny(vocab_size=13)  # few words, so that responses end
END = 10
RESPONSE_LENGTH = 6
SAMPLES = 2
# Six prompts of 1 to 5 tokens; the second one contains the end token.
PROMPT_WIDTH = 5
LENGTHS = np.array([5, 4, 1, 2, 3, 5], np.int32)
TOKENS = np.random.default_rng(0).integers(1, 13, (6, PROMPT_WIDTH)).astype(np.int32)
TOKENS[1, 2] = END
KEY = jax.random.key(1)
IN_ORDER = range(6)
fold_in = jax.vmap(jax.random.fold_in)


def make_prompts(order=IN_ORDER, width=PROMPT_WIDTH, pad=0):
    """Return the prompts in this order, left-padded."""
    tokens = np.full((6, width), pad, np.int32)
    for row, prompt, length in zip(tokens, TOKENS, LENGTHS, strict=True):
        row[width - length :] = prompt[:length]
    order = np.array(order, np.int32)
    return Prompts(tokens=tokens[order], lengths=LENGTHS[order], index=order)


def make_settings(model=MODEL, **changes):
    """Return settings of the sampler, changed where a test needs it."""
    values = dict(
        samples_per_prompt=SAMPLES,
        response_length=RESPONSE_LENGTH,
        temperature=1.0,
        top_p=0.9,
        end_tokens=(END,),
    )
    return SamplingSettings(model=model, **(values | changes))


def compile_sampler(**changes):
    """Return generate(params, prompts, key), compiled with these settings."""
    return jax.jit(functools.partial(rollout.generate, settings=make_settings(**changes)))


shared_sampler = functools.cache(compile_sampler)


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def run(order=IN_ORDER, width=PROMPT_WIDTH, pad=0, params=PARAMS, key=KEY, **settings):
    """Return the rollout of these prompts on the host."""
    prompts = make_prompts(order, width, pad)
    return on_host(shared_sampler(**settings)(params, prompts, key))


@functools.partial(jax.jit, static_argnums=(4, 5))
def next_token(tokens, lengths, keys, place, temperature, top_p):
    """Sample the token at `place` of each response, by a forward pass over right-padded rows."""
    segments = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = transformer.apply(MODEL, PARAMS, tokens, positions, segments).hidden
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    keys = fold_in(keys, jnp.full(len(tokens), place))
    return sample_tokens(keys, transformer.logits(MODEL, PARAMS, last), temperature, top_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twin:
    """The same samples made without cache, slots or pads in front: arrays [6 SAMPLES ...]."""

    tokens: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray


@functools.cache
def make_twin(temperature=1.0, top_p=0.9):
    index, number = (numbers.reshape(-1) for numbers in np.indices((6, SAMPLES)))
    num_rows = 6 * SAMPLES
    prompt_lengths = LENGTHS[index]
    rows = np.zeros((num_rows, PROMPT_WIDTH + RESPONSE_LENGTH), np.int32)
    rows[:, :PROMPT_WIDTH] = TOKENS[index]
    keys = fold_in(fold_in(jnp.broadcast_to(KEY, num_rows), index), number)
    tokens = np.zeros((num_rows, RESPONSE_LENGTH), np.int32)
    logprobs = np.zeros((num_rows, RESPONSE_LENGTH), np.float32)
    live = np.ones(num_rows, bool)
    lengths = np.zeros(num_rows, np.int32)
    for place in range(RESPONSE_LENGTH):
        ends = prompt_lengths + lengths
        token, logprob = on_host(next_token(rows, ends, keys, place, temperature, top_p))
        rows[live, ends[live]] = token[live]
        tokens[live, place] = token[live]
        logprobs[live, place] = logprob[live]
        lengths += live
        live &= token != END
    return Twin(
        tokens=tokens.reshape(6, SAMPLES, -1),
        logprobs=logprobs.reshape(6, SAMPLES, -1),
        lengths=lengths.reshape(6, SAMPLES),
        truncated=live.reshape(6, SAMPLES),
    )


def assert_is_twin(
    sampled: Rollout, order, response_length=RESPONSE_LENGTH, samples=SAMPLES, **settings
):
    """Check every sample of prompts in this order; log-probabilities are equal to rounding."""
    twin = make_twin(**settings)
    prompts = np.array(order)
    shape = (len(order), samples)
    responses = sampled.tokens[:, -response_length:].reshape(*shape, response_length)
    logprobs = sampled.logprobs.reshape(*shape, response_length)
    lengths = twin.lengths[prompts, :samples]
    truncated = twin.truncated[prompts, :samples] | (lengths > response_length)
    assert np.array_equal(responses, twin.tokens[prompts, :samples, :response_length])
    assert np.array_equal(sampled.lengths.reshape(shape), np.minimum(lengths, response_length))
    assert np.array_equal(sampled.truncated.reshape(shape), truncated)
    expected = twin.logprobs[prompts, :samples, :response_length]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


@pytest.fixture(scope="module")
def sampled():
    return run()


def test_the_twin_has_ended_and_truncated_responses_of_many_lengths():
    twin = make_twin()
    assert len(np.unique(twin.lengths)) >= 4
    assert 3 <= twin.truncated.sum() <= 9
    assert (twin.lengths[~twin.truncated] < RESPONSE_LENGTH).any()


LAYOUTS = {
    "all at once": dict(),
    "reversed": dict(order=IN_ORDER[::-1]),
    "another pad": dict(pad=END),
    "one alone": dict(order=[4]),
    "more pads": dict(width=8, slots=4),
    "one prompt at a time": dict(slots=2),
    "refilled": dict(slots=6),
    "refilled in reverse": dict(slots=6, order=IN_ORDER[::-1]),
    "refilled after another pad": dict(slots=6, pad=END),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_depends_on_seed_step_prompt_and_number_alone(layout):
    settings = LAYOUTS[layout]
    assert_is_twin(run(**settings), settings.get("order", IN_ORDER))


@pytest.mark.parametrize("response_length, slots", [(3, 4), (1, 4)])
def test_a_ring_that_wraps_many_times_loses_nothing(response_length, slots):
    """With thirty prompts, two of them at once, the clock passes the ring's end again and again."""
    order = np.arange(30) % 6
    sampled = run(order, slots=slots, response_length=response_length)
    assert_is_twin(sampled, order, response_length)
    steps = (sampled.lengths - 1).sum() / slots  # of the clock, at least
    assert response_length == 1 or steps > 4 * response_length


def test_each_prompt_is_prefilled_once(monkeypatch):
    """Further samples of a prompt need no further prefill.

    Six prompts are prefilled at once. Nineteen are, two at a time, in ten fills of which the last
    has one prompt only.
    """
    shapes = []
    calls = []
    apply = transformer.apply

    def counted(model, params, tokens, *rest, **options):
        shapes.append(tokens.shape)
        jax.debug.callback(lambda: calls.append(len(tokens)))
        return apply(model, params, tokens, *rest, **options)

    monkeypatch.setattr(transformer, "apply", counted)
    jax.eval_shape(compile_sampler(), PARAMS, make_prompts(), KEY)
    assert shapes == [(6, 5)]
    order = np.arange(19) % 6
    assert plan_slots(19, 2, 32) == SlotPlan(prompts_per_fill=2, slots=32)
    sampled = on_host(compile_sampler(slots=32)(PARAMS, make_prompts(order), KEY))
    jax.effects_barrier()
    assert set(shapes[1:]) == {(2, 5)} and calls == [2] * 10
    monkeypatch.undo()
    assert_is_twin(sampled, order)


@pytest.mark.parametrize(
    "prompts, samples, slots, plan",
    [
        (6, 2, 0, (6, 12)),
        (6, 2, 12, (6, 12)),
        (6, 2, 11, (6, 12)),
        (6, 2, 10, (1, 10)),
        (6, 2, 9, (1, 10)),
        (64, 4, 100, (3, 96)),
        (64, 1, 64, (64, 64)),
        (64, 1, 32, (4, 32)),
        (1, 3, 1, (1, 3)),
        (4, 3, 1, (1, 3)),
    ],
)
def test_an_eighth_of_the_slots_is_filled_at_a_time(prompts, samples, slots, plan):
    assert plan_slots(prompts, samples, slots) == plan


def test_scanned_layers_sample_like_unrolled_ones(monkeypatch):
    monkeypatch.setattr(transformer, "UNROLLED", 0)
    sampled = compile_sampler(slots=6)(PARAMS, make_prompts(), KEY)
    assert_is_twin(on_host(sampled), IN_ORDER)


@pytest.mark.parametrize("count, samples, slots", [(8, 2, 0), (66, 1, 64)])
def test_eight_devices_sample_as_one(count, samples, slots):
    """All at once, and refilled eight prompts at a time, where the last fill has two."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = sharding.make_mesh(Mesh(data=4, fsdp=2))
    order = np.arange(count) % 6
    with jax.set_mesh(mesh):
        prompts = sharding.shard_batch(make_prompts(order), mesh)
        params = jax.device_put(PARAMS, sharding.replicated(mesh))
        sampler = compile_sampler(samples_per_prompt=samples, slots=slots)
        sampled = sampler(params, prompts, KEY)
    assert len(sampled.tokens.sharding.device_set) == 8
    assert_is_twin(on_host(sampled), order, samples=samples)


def scorer_logprobs(sampled: Rollout, temperature=1.0):
    """Return the scorer's log-probabilities of the responses, 0 after their ends."""
    num_rows, response_length = sampled.logprobs.shape
    prompt_width = sampled.tokens.shape[1] - response_length
    packed = scoring.PackedTokens(
        tokens=sampled.tokens,
        positions=np.maximum(np.cumsum(sampled.segments, axis=1) - 1, 0),
        segments=sampled.segments,
    )
    targets = np.tile(prompt_width + np.arange(response_length), (num_rows, 1))
    score = jax.jit(functools.partial(scoring.token_logprobs, MODEL))
    logprobs, _ = score(PARAMS, packed, targets, temperature)
    return np.where(sampled.mask, logprobs, 0)


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.7, top_p=0.5, slots=6)])
def test_the_samplers_logprobs_are_those_of_the_full_forward(settings):
    """They are at the sampling temperature, and of all words whatever top-p keeps."""
    sampled = run(**settings)
    of_twin = {name: settings[name] for name in ("temperature", "top_p") if name in settings}
    assert_is_twin(sampled, IN_ORDER, **of_twin)
    expected = scorer_logprobs(sampled, settings.get("temperature", 1.0))
    np.testing.assert_allclose(sampled.logprobs, expected, atol=1e-5)


def test_a_rounded_cache_gives_similar_logprobs():
    sampled = run(slots=6, cache_dtype="bfloat16")
    change = np.abs(sampled.logprobs - scorer_logprobs(sampled))
    assert 1e-4 < change.max() < 0.1
    assert not change[:, 0].max() > 1e-5  # the first token is not read from the cache


def test_a_response_ends_with_its_end_token_and_nothing_follows(sampled):
    responses = sampled.tokens[:, -RESPONSE_LENGTH:]
    assert sampled.truncated.any() and not sampled.truncated.all()
    for row, length in enumerate(sampled.lengths):
        truncated = sampled.truncated[row]
        assert sampled.mask[row, :length].all() and not sampled.mask[row, length:].any()
        assert not responses[row, length:].any() and not sampled.logprobs[row, length:].any()
        is_end = (responses[row, :length] == END).tolist()
        assert is_end == [False] * (length - 1) + [not truncated]
        assert not truncated or length == RESPONSE_LENGTH
    prompt_lengths = np.repeat(LENGTHS, SAMPLES)
    assert np.array_equal(sampled.segments[:, -RESPONSE_LENGTH:], sampled.mask)
    assert np.array_equal(sampled.segments[:, :PROMPT_WIDTH].sum(axis=1), prompt_lengths)
    assert np.array_equal(sampled.prompt_lengths, prompt_lengths)


def test_an_end_token_in_the_prompt_ends_nothing(sampled):
    assert END in sampled.tokens[2, :PROMPT_WIDTH]
    assert sampled.mask[2:4, 0].all() and sampled.mask[2:4].sum() > 2


def test_samples_of_a_prompt_differ_and_its_tokens_stay(sampled):
    pairs = sampled.tokens[:, -RESPONSE_LENGTH:].reshape(6, SAMPLES, RESPONSE_LENGTH)
    assert (pairs[:, 0] != pairs[:, 1]).any(axis=1).sum() >= 5
    for pad, settings in ((0, {}), (END, {}), (0, dict(width=8, slots=4))):
        width = settings.get("width", PROMPT_WIDTH)
        tokens = make_prompts(width=width, pad=pad).tokens
        sampled = run(pad=pad, **settings)
        assert np.array_equal(sampled.tokens[:, :width], np.repeat(tokens, SAMPLES, axis=0))


def test_another_key_gives_other_samples(sampled):
    assert not np.array_equal(run(key=jax.random.key(2)).tokens, sampled.tokens)


def test_another_index_gives_other_samples(sampled):
    prompts = make_prompts()
    renumbered = dataclasses.replace(prompts, index=prompts.index[::-1])
    other = on_host(shared_sampler()(PARAMS, renumbered, KEY))
    assert (other.tokens != sampled.tokens).any(axis=1).sum() >= 10


def test_other_values_of_the_same_shapes_compile_nothing():
    generate = compile_sampler(slots=6)
    other_params = jax.tree.map(lambda param: 0.9 * param, PARAMS)
    generate(PARAMS, make_prompts(), KEY)
    generate(other_params, make_prompts(IN_ORDER[::-1], pad=5), jax.random.key(9))
    assert generate._cache_size() == 1


def test_temperature_0_takes_the_most_probable_token():
    @jax.jit
    def forward(tokens, positions, segments):
        hidden = transformer.apply(MODEL, PARAMS, tokens, positions, segments).hidden
        return transformer.logits(MODEL, PARAMS, hidden)

    sampled = run(temperature=0.0, samples_per_prompt=1, slots=3)
    positions = np.maximum(np.cumsum(sampled.segments, axis=1) - 1, 0)
    logits = np.asarray(forward(sampled.tokens, positions, sampled.segments))
    best = logits.argmax(axis=-1)[:, -RESPONSE_LENGTH - 1 : -1]
    responses = sampled.tokens[:, -RESPONSE_LENGTH:]
    assert np.array_equal(responses[sampled.mask], best[sampled.mask])
    np.testing.assert_allclose(sampled.logprobs, scorer_logprobs(sampled), atol=1e-5)


def sorted_shapes(text):
    """Return the result shapes of a compiled program's sorts and selections of the largest."""
    return re.findall(r"= (\(.*?\)|\S+) (?:sort\(|topk\(|custom-call\(.*TopK)", text)


@pytest.mark.parametrize("function", [jnp.sort, lambda rows: jax.lax.top_k(rows, 3)])
def test_sorts_in_a_compiled_program_are_detected(function):
    program = jax.jit(function).lower(np.zeros((64, 97), np.float32)).compile()
    (shape,) = sorted_shapes(program.as_text())
    assert "[64,97]" in shape or "[64,3]" in shape


@pytest.mark.parametrize("layers, unrolled, limit", [(2, True, 1.3), (4, False, 1.2 + 1 / 4)])
def test_the_cache_is_written_in_place_and_no_vocabulary_is_sorted(
    layers, unrolled, limit, monkeypatch
):
    """The program's temporary memory is little more than the cache.

    256 prompts share 64 slots of 8 + 512 places. Where layers are scanned, a copy of one layer of
    the cache is added.
    """
    monkeypatch.setattr(transformer, "UNROLLED", layers * unrolled)
    model = dataclasses.replace(TINY, layers=layers)
    width = 8
    response_length = 512
    settings = make_settings(model, response_length=response_length)
    kind = choose_cache(settings, 64, width, has_prefix=False, by_layer=unrolled)
    cache = jax.eval_shape(kind.empty)
    size = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(cache))
    # Keys and values of 2 heads of 8 float32.
    assert size == layers * 2 * 64 * 2 * (width + response_length) * 8 * 4
    params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), "lm"))
    numbers = jax.ShapeDtypeStruct((256,), jnp.int32)
    prompts = Prompts(
        tokens=jax.ShapeDtypeStruct((256, width), jnp.int32), lengths=numbers, index=numbers
    )
    generate = compile_sampler(
        model=model, samples_per_prompt=1, response_length=response_length, slots=64
    )
    program = generate.lower(params, prompts, jax.eval_shape(lambda: KEY)).compile()
    assert size < program.memory_analysis().temp_size_in_bytes < limit * size
    for shape in sorted_shapes(program.as_text()):
        assert re.fullmatch(r"\(?(\w+\[64\]\S*,? ?)+\)?", shape)
