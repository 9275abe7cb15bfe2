"""Sampling: slots and cache against the full forward, top-p by enumeration, keys of nothing but the sample."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import TINY, tiny

from alignjax.config import Mesh
from alignjax.machine import sharding
from alignjax.models import scoring, transformer
from alignjax.models.attention import KeyValues
from alignjax.sampling import rollout
from alignjax.sampling.cache import (
    RING_PARTS,
    empty_cache,
    fill_cache,
    make_reader,
    write_token,
)
from alignjax.sampling.slots import SlotPlan, plan_slots
from alignjax.sampling.top_p import pick, sample_tokens
from alignjax.sampling.types import Prompts, SamplingSettings

MODEL, PARAMS = tiny(vocab_size=13)  # few words, so that responses end
END, R = 10, 6
LENGTHS = np.array([5, 4, 1, 2, 3, 5], np.int32)
REAL = np.random.default_rng(0).integers(1, 13, (6, 5)).astype(np.int32)
REAL[1, 2] = END
KEY = jax.random.key(1)
ALL = range(6)
fold = jax.vmap(jax.random.fold_in)


def prompts(order=ALL, p=5, pad=0):
    """The prompts in this order, of 1 to 5 tokens, left-padded; one holds the end token."""
    out = np.full((6, p), pad, np.int32)
    for row, ids, n in zip(out, REAL, LENGTHS, strict=True):
        row[p - n :] = ids[:n]
    order = np.array(order, np.int32)
    return Prompts(tokens=out[order], lengths=LENGTHS[order], index=order)


def settings_of(model=MODEL, **changes):
    """Settings of the sampler: two samples of each prompt, unless `changes` say otherwise."""
    values = dict(
        samples_per_prompt=2, response_length=R, temperature=1.0, top_p=0.9, end_token=END
    )
    return SamplingSettings(model=model, **(values | changes))


def compiled(**changes):
    """generate(params, prompts, key) with these settings."""
    return jax.jit(functools.partial(rollout.generate, settings=settings_of(**changes)))


sampler = functools.cache(compiled)


def on_host(rollouts):
    return jax.tree.map(np.asarray, rollouts)


@functools.partial(jax.jit, static_argnums=(4, 5))
def next_token(tokens, lengths, keys, place, temperature, top_p):
    """Of rows tokens[b t] of this length, whose responses have reached `place`."""
    segments = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = transformer.apply(MODEL, PARAMS, tokens, places, segments)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    keys = fold(keys, jnp.full(len(tokens), place))
    return sample_tokens(keys, transformer.logits(MODEL, PARAMS, last), temperature, top_p)


@functools.cache
def twin(temperature=1.0, top_p=0.9):
    """tokens, logprobs [6 2 R], lengths, truncated [6 2] of the samples, with neither cache nor slots nor pads in front."""
    index, number = (x.reshape(-1) for x in np.indices((6, 2)))
    rows, lengths = np.zeros((12, 5 + R), np.int32), LENGTHS[index]
    rows[:, :5] = REAL[index]
    keys = fold(fold(jnp.broadcast_to(KEY, 12), index), number)
    tokens, found = np.zeros((12, R), np.int32), np.zeros((12, R), np.float32)
    live, count = np.ones(12, bool), np.zeros(12, np.int32)
    for place in range(R):
        token, logprob = on_host(next_token(rows, lengths + count, keys, place, temperature, top_p))
        rows[live, (lengths + count)[live]] = tokens[live, place] = token[live]
        found[live, place] = logprob[live]
        count += live
        live &= token != END
    return tuple(x.reshape(6, 2, *x.shape[1:]) for x in (tokens, found, count, live))


def assert_is_twin(out, order, r=R, samples=2, **settings):
    """Every sample of this order of prompts, of r tokens at most; log-probabilities to rounding."""
    shape = len(order), samples
    tokens, found, lengths, truncated = (x[np.array(order)][:, :samples] for x in twin(**settings))
    assert np.array_equal(out.tokens[:, -r:].reshape(*shape, r), tokens[..., :r])
    assert np.array_equal(out.lengths.reshape(shape), np.minimum(lengths, r))
    assert np.array_equal(out.truncated.reshape(shape), truncated | (lengths > r))
    np.testing.assert_allclose(out.logprobs.reshape(*shape, r), found[..., :r], atol=1e-5)


def run(order=ALL, p=5, pad=0, params=PARAMS, key=KEY, **settings):
    return on_host(sampler(**settings)(params, prompts(order, p, pad), key))


@pytest.fixture(scope="module")
def sampled():
    return run()


def test_the_twin_has_ended_and_truncated_responses_of_many_lengths():
    *_, lengths, truncated = twin()
    assert (
        len(np.unique(lengths)) >= 4
        and 3 <= truncated.sum() <= 9
        and (lengths[~truncated] < R).any()
    )


LAYOUTS = {
    "all at once": dict(),
    "reversed": dict(order=ALL[::-1]),
    "another pad": dict(pad=END),
    "one alone": dict(order=[4]),
    "more pads": dict(p=8, slots=4),
    "one prompt at a time": dict(slots=2),
    "refilled": dict(slots=6),
    "refilled in reverse": dict(slots=6, order=ALL[::-1]),
    "refilled behind another pad": dict(slots=6, pad=END),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_depends_on_seed_step_prompt_and_number_alone(layout):
    settings = LAYOUTS[layout]
    assert_is_twin(run(**settings), settings.get("order", ALL))


@pytest.mark.parametrize("response_length, slots", [(3, 4), (1, 4)])
def test_a_ring_that_wraps_many_times_loses_nothing(response_length, slots):
    """Thirty prompts, two of them at once: the clock passes the ring's end again and again."""
    order = np.arange(30) % 6
    out = run(order, slots=slots, response_length=response_length)
    assert_is_twin(out, order, response_length)
    assert (
        response_length == 1 or (out.lengths - 1).sum() / slots > 4 * response_length
    )  # steps of the clock, at least


def test_each_prompt_is_prefilled_once(monkeypatch):
    """All at once; or, of nineteen, two in each of ten fills, of which the last lacks one. Samples ask for no more."""
    shapes, calls, plain = [], [], transformer.apply

    def counted(model, params, tokens, *rest, **options):
        shapes.append(tokens.shape)
        jax.debug.callback(lambda: calls.append(len(tokens)))
        return plain(model, params, tokens, *rest, **options)

    monkeypatch.setattr(transformer, "apply", counted)
    jax.eval_shape(compiled(), PARAMS, prompts(), KEY)
    assert shapes == [(6, 5)]
    order = np.arange(19) % 6
    assert plan_slots(19, 2, 32) == SlotPlan(prompts_per_fill=2, slots=32)
    out = on_host(compiled(slots=32)(PARAMS, prompts(order), KEY))
    jax.effects_barrier()
    assert set(shapes[1:]) == {(2, 5)} and calls == [2] * 10
    monkeypatch.undo()
    assert_is_twin(out, order)


@pytest.mark.parametrize(
    "prompts, samples, slots, found",
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
def test_slots_come_in_prompts_an_eighth_of_them_at_a_time(prompts, samples, slots, found):
    assert plan_slots(prompts, samples, slots) == found


def test_layers_that_are_scanned_sample_as_those_written_out(monkeypatch):
    monkeypatch.setattr(transformer, "UNROLLED", 0)
    assert_is_twin(on_host(compiled(slots=6)(PARAMS, prompts(), KEY)), ALL)


@pytest.mark.parametrize("count, samples, slots", [(8, 2, 0), (66, 1, 64)])
def test_eight_devices_sample_as_one(count, samples, slots):
    """All at once, and refilled by eight prompts, of which the last fill has two."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh, order = sharding.make_mesh(Mesh(data=4, fsdp=2)), np.arange(count) % 6
    with jax.set_mesh(mesh):
        batch = sharding.shard_batch(prompts(order), mesh)
        params = jax.device_put(PARAMS, sharding.replicated(mesh))
        out = compiled(samples_per_prompt=samples, slots=slots)(params, batch, KEY)
    assert len(out.tokens.sharding.device_set) == 8
    assert_is_twin(on_host(out), order, samples=samples)


def scored(out, temperature=1.0):
    """The scorer's log-probabilities of a Rollout's responses, 0 behind their ends."""
    r = out.logprobs.shape[1]
    p = out.tokens.shape[1] - r
    batch = {
        "tokens": out.tokens,
        "segments": out.segments,
        "at": np.tile(p + np.arange(r), (len(out.tokens), 1)),
        "positions": np.maximum(np.cumsum(out.segments, axis=1) - 1, 0),
    }
    return np.where(
        out.mask,
        jax.jit(functools.partial(scoring.token_logprobs, MODEL))(PARAMS, batch, temperature)[0],
        0,
    )


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.7, top_p=0.5, slots=6)])
def test_the_samplers_logprobs_are_those_of_the_full_forward(settings):
    """At the sampling temperature, and of all words, whatever top-p keeps."""
    out = run(**settings)
    twins = {name: settings[name] for name in ("temperature", "top_p") if name in settings}
    assert_is_twin(out, ALL, **twins)
    np.testing.assert_allclose(
        out.logprobs, scored(out, settings.get("temperature", 1.0)), atol=1e-5
    )


def test_a_rounded_cache_gives_near_logprobs():
    out = run(slots=6, cache_dtype="bfloat16")
    change = np.abs(out.logprobs - scored(out))
    assert (
        1e-4 < change.max() < 0.1 and not change[:, 0].max() > 1e-5
    )  # the first token is read off no cache
    for name, dtype in (("", jnp.float32), ("bfloat16", jnp.bfloat16)):
        assert {x.dtype for x in jax.tree.leaves(empty_cache(MODEL, 2, 3, 4, name))} == {
            jnp.dtype(dtype)
        }


def test_a_response_ends_with_its_end_token_and_nothing_follows(sampled):
    response = sampled.tokens[:, -R:]
    assert sampled.truncated.any() and not sampled.truncated.all()
    for tokens, mask, found, n, truncated in zip(
        response, sampled.mask, sampled.logprobs, sampled.lengths, sampled.truncated, strict=True
    ):
        assert (
            mask[:n].all() and not mask[n:].any() and not tokens[n:].any() and not found[n:].any()
        )
        assert (tokens[:n] == END).tolist() == [False] * (n - 1) + [not truncated]
        assert not truncated or n == R
    assert np.array_equal(sampled.segments[:, -R:], sampled.mask)
    assert sampled.segments[:, :5].sum(axis=1).tolist() == np.repeat(LENGTHS, 2).tolist()
    assert np.array_equal(sampled.prompt_lengths, np.repeat(LENGTHS, 2))


def test_an_end_token_in_the_prompt_ends_nothing(sampled):
    assert (
        END in sampled.tokens[2, :5] and sampled.mask[2:4, 0].all() and sampled.mask[2:4].sum() > 2
    )


def test_samples_of_a_prompt_differ_and_its_tokens_stay(sampled):
    pairs = sampled.tokens[:, -R:].reshape(6, 2, R)
    assert (pairs[:, 0] != pairs[:, 1]).any(axis=1).sum() >= 5
    for pad, p in ((0, 5), (END, 5), (0, 8)):
        out = run(pad=pad) if p == 5 else run(p=8, slots=4)
        assert np.array_equal(out.tokens[:, :p], np.repeat(prompts(p=p, pad=pad).tokens, 2, axis=0))


def test_another_key_gives_other_samples(sampled):
    assert not np.array_equal(run(key=jax.random.key(2)).tokens, sampled.tokens)


def test_another_index_gives_other_samples(sampled):
    renumbered = dataclasses.replace(prompts(), index=prompts().index[::-1])
    other = on_host(sampler()(PARAMS, renumbered, KEY))
    assert (other.tokens != sampled.tokens).any(axis=1).sum() >= 10


def test_other_values_of_the_same_shapes_compile_nothing():
    generate = compiled(slots=6)
    again = jax.tree.map(lambda x: 0.9 * x, PARAMS)
    for params, order, pad, key in (
        (PARAMS, ALL, 0, KEY),
        (again, ALL[::-1], 5, jax.random.key(9)),
    ):
        generate(params, prompts(order, pad=pad), key)
    assert generate._cache_size() == 1


def test_temperature_0_takes_the_most_probable_token():
    out = run(temperature=0.0, samples_per_prompt=1, slots=3)
    places = np.maximum(np.cumsum(out.segments, axis=1) - 1, 0)
    forward = jax.jit(
        lambda *x: transformer.logits(MODEL, PARAMS, transformer.apply(MODEL, PARAMS, *x)[0])
    )
    best = np.asarray(forward(out.tokens, places, out.segments)).argmax(axis=-1)[:, -R - 1 : -1]
    assert np.array_equal(out.tokens[:, -R:][out.mask], best[out.mask])
    np.testing.assert_allclose(out.logprobs, scored(out), atol=1e-5)


def sorts(text):
    """What comes out of the sorts of a compiled program, and of its choices of the largest."""
    return re.findall(r"= (\(.*?\)|\S+) (?:sort\(|topk\(|custom-call\(.*TopK)", text)


def test_sorts_are_seen():
    for of in (jnp.sort, lambda x: jax.lax.top_k(x, 3)):
        (found,) = sorts(jax.jit(of).lower(np.zeros((64, 97), np.float32)).compile().as_text())
        assert "[64,97]" in found or "[64,3]" in found


@pytest.mark.parametrize("layers, written_out, limit", [(2, True, 1.3), (4, False, 1.2 + 1 / 4)])
def test_the_cache_is_written_in_place_and_no_vocabulary_is_sorted(
    layers, written_out, limit, monkeypatch
):
    """64 slots of 8 + 512 places, for 256 prompts: what the program holds beside its results is little but the cache.

    And a copy of one layer of it where layers are scanned.
    """
    monkeypatch.setattr(transformer, "UNROLLED", layers * written_out)
    model, p, r = dataclasses.replace(TINY, layers=layers), 8, 512
    cache = jax.eval_shape(lambda: empty_cache(model, 64, p, r))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert size == layers * 2 * 64 * 2 * (p + r) * 8 * 4  # keys and values of 2 heads of 8 float32
    params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), "lm"))
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    settings = settings_of(model, samples_per_prompt=1, response_length=r, slots=64)
    generate = jax.jit(functools.partial(rollout.generate, settings=settings))
    shapes = Prompts(tokens=integers(256, p), lengths=integers(256), index=integers(256))
    program = generate.lower(params, shapes, jax.eval_shape(lambda: KEY)).compile()
    assert size < program.memory_analysis().temp_size_in_bytes < limit * size
    assert all(
        re.fullmatch(r"\(?(\w+\[64\]\S*,? ?)+\)?", shape) for shape in sorts(program.as_text())
    )


# The ring of a cache, by itself.


def test_a_cache_is_the_prompts_block_and_a_ring_in_parts(monkeypatch):
    """Ten places in parts of three; two key-value heads of eight."""
    widths = lambda blocks, axis: [
        (keys.shape[axis], values.shape[axis]) for keys, values in blocks
    ]
    cache = empty_cache(MODEL, 4, 5, 10)
    assert len(cache) == 2 and cache[0][0][0].shape == (4, 2, 5, 8)
    assert [widths(blocks, 2) for blocks in cache] == [[(5, 5), *[(3, 3)] * 4]] * 2
    monkeypatch.setattr(transformer, "UNROLLED", 0)
    cache = empty_cache(MODEL, 4, 5, 10)
    assert cache[0][0].shape == (2, 4, 2, 5, 8) and widths(cache, 3) == [(5, 5), *[(3, 3)] * 4]
    assert [len(empty_cache(MODEL, 4, 5, r)) - 1 for r in (1, 2, 3, 4, 5, 9)] == [
        1,
        2,
        3,
        4,
        3,
        3,
    ]


@pytest.mark.parametrize("written_out", [True, False])
def test_filling_slots_leaves_the_others_alone(written_out, monkeypatch):
    monkeypatch.setattr(transformer, "UNROLLED", 2 * written_out)
    rng = np.random.default_rng(0)
    old = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32),
        empty_cache(MODEL, 6, 5, 4),
    )
    kept = KeyValues(
        *(rng.normal(size=(2, 2, 2, 5, 8)).astype(np.float32) for _ in range(2))
    )  # two prompts of two samples
    layers = lambda cache: (
        cache if written_out else [transformer.layer_of(cache, i) for i in range(2)]
    )
    for at in (jnp.array([4, 0, 2, 5]), None):
        slots = np.arange(4) if at is None else np.asarray(at)
        start = jax.tree.map(lambda x: x[..., :4, :, :, :], old) if at is None else old
        new = fill_cache(jax.tree.map(jnp.asarray, start), at, kept, 2)
        for i, (before, after) in enumerate(zip(layers(start), layers(new), strict=True)):
            for j in range(2):  # keys, values
                wanted = before[0][j].copy()
                for number, slot in enumerate(slots):
                    wanted[slot] = kept[j][i, number // 2]
                assert np.array_equal(after[0][j], wanted)
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, after[1:], before[1:])))


def one_query(q, keys, values):
    """q[h] against keys[s h], values[s h], by numpy."""
    weights = np.exp(keys @ q / np.sqrt(len(q)))
    return weights @ values / weights.sum()


@pytest.mark.parametrize("r, layer", [(7, None), (7, 1), (3, None)])
def test_a_step_reads_as_many_parts_of_the_ring_as_are_filled(r, layer):
    """Three slots begin anew at different times; parts that the clock has not reached are NaN, and stay so.

    Against one query a time over the prompt's tokens and those that the slot was given since it began.
    """
    rng, s, p, width = np.random.default_rng(0), 3, 5, -(-r // RING_PARTS)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    prompt = np.arange(p) >= p - np.array([[5], [2], [1]])
    lead = () if layer is None else (2,)
    part = lambda fill: KeyValues(*(jnp.full((*lead, s, 2, width, 8), fill) for _ in range(2)))
    stored = KeyValues(*(draw(*lead, s, 2, p, 8) for _ in range(2)))
    mine = stored if layer is None else [x[layer] for x in stored]
    blocks, seen = (
        [stored, *(part(np.nan) for _ in range(0, r, width))],
        [[] for _ in range(s)],
    )

    @jax.jit
    def step(blocks, clock, count, q, k, v):
        kept = KeyValues(k, v)
        if layer is not None:
            kept = jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x), x]), kept)
        reader = make_reader(prompt, clock, count, r)
        return reader.attend(blocks, layer, q, k, v), write_token(blocks, clock, kept, r)

    for clock in range(3 * r):
        if clock in range(0, r, width):  # what lies around a place is masked, but it must be finite
            blocks[1 + clock // width] = part(0.0)
        q, k, v = draw(s, 4, 8), draw(s, 2, 8), draw(s, 2, 8)
        for slot in range(s):
            begins = len(seen[slot]) == r or (clock, slot) in ((2, 1), (r + 1, 0))
            seen[slot] = [*([] if begins else seen[slot]), (k[slot], v[slot])]
        before = blocks
        ours, blocks = step(blocks, jnp.int32(clock), np.array([len(x) for x in seen]), q, k, v)
        theirs = np.zeros((s, 4, 8))
        for i, n in np.ndindex(s, 4):
            keys, values = (
                np.concatenate([mine[j][i, n // 2, prompt[i]], [kv[j][n // 2] for kv in seen[i]]])
                for j in (0, 1)
            )
            theirs[i, n] = one_query(q[i, n], keys, values)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        filled = 2 + min(clock, r - 1) // width
        assert all(np.isnan(x).all() for x in jax.tree.leaves(blocks[filled:]))
        changed = jax.tree.map(
            lambda a, b: int((np.asarray(a) != np.asarray(b)).sum()),
            before[:filled],
            blocks[:filled],
        )
        assert (
            sum(jax.tree.leaves(changed)) == 2 * s * 2 * 8
        )  # a place of keys and values; the other layer's are 0


# `sample_tokens`, by itself.

draw = jax.jit(sample_tokens, static_argnums=(2, 3))
FIVE = np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32)


def drawn(logits, times, temperature, top_p, seed=0):
    """(tokens, log-probabilities), each [b times], of so many draws from each row of logits[b v]."""
    keys = jax.random.split(jax.random.key(seed), len(logits) * times)
    token, logprob = draw(
        keys, np.repeat(np.asarray(logits, np.float32), times, axis=0), temperature, top_p
    )
    return np.asarray(token).reshape(-1, times), np.asarray(logprob).reshape(-1, times)


def kept(p, top_p):
    """Of one distribution p[v]: the smallest set of the most probable words with mass at least top_p, by a sort."""
    falling = np.sort(p)[::-1]
    mass = np.cumsum(falling)
    return p >= falling[np.searchsorted(mass, top_p * mass[-1])]


@pytest.mark.parametrize(
    "top_p, count", [(0.3, 1), (0.39, 1), (0.41, 2), (0.75, 3), (0.9, 4), (0.96, 5), (1e-6, 1)]
)
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p, count):
    """Every order of a five-word vocabulary: the words that are drawn are those that are kept."""
    orders = np.array(list(itertools.permutations(range(5))))
    tokens, _ = drawn(np.log(FIVE)[orders], 150, 1.0, top_p)
    masks = (tokens[:, :, None] == np.arange(5)).any(axis=1)
    assert np.array_equal(masks, orders < count)


def test_ties_at_the_edge_of_top_p_all_stay():
    tokens, _ = drawn(np.log([[0.25, 0.25, 0.25, 0.25], [0.5, 0.2, 0.2, 0.1]]), 300, 1.0, 0.6)
    assert [np.unique(row).tolist() for row in tokens] == [[0, 1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_draws_stay_in_the_set_that_a_sort_gives(top_p):
    """Forty rows of 300 words (no multiple of 128) in steps of 1/4, so that edges have ties."""
    logits = np.round(np.random.default_rng(0).normal(size=(40, 300)) * 8) / 4
    tokens, _ = drawn(logits, 400, 1.0, top_p)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    masks = np.stack([kept(row, top_p) for row in p])
    assert np.take_along_axis(masks, tokens, axis=1).all()
    ties = [(row == row[mask].min()).sum() for row, mask in zip(p, masks, strict=True)]
    assert max(ties) > 1 and (masks.all() if top_p == 1 else masks.sum(axis=1).max() < 300)


@pytest.mark.parametrize("temperature, top_p", [(2.0, 0.2), (2.0, 0.7), (1.0, 0.9), (1.0, 1.0)])
def test_frequencies_are_those_of_the_kept_set_while_logprobs_are_of_all_words(temperature, top_p):
    """One declared convention: drawn in proportion among the kept, and scored by the full distribution.

    20,000 draws from 140 words, which are no multiple of 128: each word's count lies within five deviations.
    """
    logits = np.random.default_rng(1).normal(size=140) * 3
    p = np.exp(logits / temperature)
    p, n = p / p.sum(), 20000
    tokens, found = drawn(logits[None], n, temperature, top_p)
    np.testing.assert_allclose(found[0], np.log(p)[tokens[0]], atol=1e-5)
    share = np.where(kept(p, top_p), p, 0)
    share /= share.sum()
    counts = np.bincount(tokens[0], minlength=140)
    assert not counts[share == 0].any()
    assert (np.abs(counts - n * share) <= 5 * np.sqrt(n * share * (1 - share)) + 1).all()
    chi_square, words = (
        ((counts - n * share) ** 2 / (n * share + 1e-9))[n * share > 5],
        (n * share > 5).sum(),
    )
    assert chi_square.sum() < words + 4 * np.sqrt(2 * words)


def test_frequencies_of_five_words_by_hand():
    """0.7 of the mass is kept: four sevenths and three; temperature 2 brings the logits back to FIVE."""
    tokens, found = drawn(2 * np.log(FIVE)[None], 10000, 2.0, 0.7)
    np.testing.assert_allclose(
        np.bincount(tokens[0], minlength=5) / 10000, [4 / 7, 3 / 7, 0, 0, 0], atol=0.015
    )
    np.testing.assert_allclose(found[0], np.log(FIVE)[tokens[0]], atol=1e-6)


def test_a_draw_depends_on_its_key_and_logits_alone():
    """Not on how many rounds other rows take, nor on their number."""
    logits = np.random.default_rng(2).normal(size=(50, 300)).astype(np.float32)
    logits[::7] = 0.0
    keys = jax.random.split(jax.random.key(3), 50)
    whole, _ = draw(keys, logits, 1.0, 0.3)
    order = np.random.default_rng(3).permutation(50)
    assert np.array_equal(draw(keys[order], logits[order], 1.0, 0.3)[0], np.asarray(whole)[order])
    for rows in (slice(0, 1), slice(20, 25)):
        assert np.array_equal(draw(keys[rows], logits[rows], 1.0, 0.3)[0], np.asarray(whole)[rows])


def test_a_small_top_p_takes_the_most_probable_word():
    logits = np.random.default_rng(4).normal(size=(50, 300))
    assert (drawn(logits, 20, 1.0, 1e-6)[0] == logits.argmax(axis=1)[:, None]).all()


def test_temperature_0_is_the_most_probable_word_and_its_logprob():
    logits = np.random.default_rng(4).normal(size=(50, 300)).astype(np.float32)
    tokens, found = drawn(logits, 1, 0.0, 0.9)
    assert np.array_equal(tokens[:, 0], logits.argmax(axis=1))
    np.testing.assert_allclose(
        found[:, 0], np.asarray(jax.nn.log_softmax(logits)).max(axis=1), atol=1e-5
    )


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_peaked_and_masked_logits_give_words_that_can_be(top_p):
    """One word far above all, in the first place, the last and between; words and whole lanes that can't be."""
    rng = np.random.default_rng(5)
    peaked = rng.normal(size=(3, 300)) * 1000
    peaked[[0, 1, 2], [0, 299, 140]] = 1e6
    tokens, found = drawn(peaked, 50, 1.0, top_p)
    assert (tokens == np.array([[0], [299], [140]])).all() and not found.any()
    masked = rng.normal(size=(4, 300))
    masked[0, rng.random(300) < 0.9] = -np.inf
    masked[1, :256], masked[2, 128:], masked[3, np.arange(300) != 7] = (
        np.finfo(np.float32).min,
        -np.inf,
        -np.inf,
    )
    tokens, found = drawn(masked, 500, 1.0, top_p)
    assert (np.take_along_axis(masked, tokens, axis=1) > -1e6).all()
    assert (
        np.isfinite(found).all()
        and (found <= 0).all()
        and (tokens[3] == 7).all()
        and not found[3].any()
    )


def test_pick_by_hand():
    """Running sums 0 2 2 5 5 of weights 0 2 0 3 0; a target at the very end, or past it, takes the last that is not 0."""
    weights = jnp.tile(jnp.array([0.0, 2.0, 0.0, 3.0, 0.0]), (6, 1))
    at, rest = pick(weights, jnp.array([0.0, 1.5, 2.0, 4.0, 5.0, 5.5]))
    assert at.tolist() == [1, 1, 3, 3, 3, 3] and rest.tolist() == [0.0, 1.5, 0.0, 2.0, 3.0, 3.5]


@pytest.mark.parametrize("n", [128, 1187])
def test_pick_takes_no_weight_of_0_wherever_the_target_falls(n):
    """As many lanes as 151,936 words have. A sum over many is made in pieces, and rounding lets it rise over zeros."""
    rng = np.random.default_rng(0)
    weights = np.where(rng.random(n) < 0.3, 0, rng.exponential(size=n) ** 4).astype(np.float32)
    targets = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=1))(np.tile(weights, (2, 1))))[0]
    at, _ = jax.jit(pick)(np.tile(weights, (n, 1)), targets)
    assert (weights[np.asarray(at)] > 0).all()
