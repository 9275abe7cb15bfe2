"""Sampling: the cache against the full forward, top-p by enumeration, keys that depend on nothing but the sample."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny, words

from alignjax import logprobs, rollout, sharding
from alignjax.config import Mesh

MODEL, PARAMS = tiny()
END, R = 3, 6


def prompts(slots=5, pad=0):
    """Six prompts of 1 to 5 tokens, left-padded; the second one holds the end token."""
    lengths = np.array([5, 4, 1, 2, 3, 5], np.int32)
    real = words(0, 6, 5)
    real[1, 2] = END
    out = np.full((6, slots), pad, np.int32)
    for row, ids, n in zip(out, real, lengths, strict=True):
        row[slots - n :] = ids[:n]
    return out, lengths


@functools.partial(jax.jit, static_argnames=("samples", "temperature", "top_p"))
def generate(params, tokens, lengths, index, key, samples=2, temperature=1.0, top_p=0.9):
    return rollout.generate(MODEL, params, tokens, lengths, index, key, samples=samples, response_length=R,
                            temperature=temperature, top_p=top_p, end=END)  # fmt: skip


def run(order=range(6), slots=5, pad=0, **settings):
    order = np.array(order)
    tokens, lengths = prompts(slots, pad)
    return jax.tree.map(
        np.asarray, generate(PARAMS, tokens[order], lengths[order], order, jax.random.key(1), **settings)
    )


@pytest.fixture(scope="module")
def sampled():
    return run()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_those_of_the_full_forward(temperature):
    out = run(temperature=temperature)
    scored, _ = logprobs.response_logprobs(MODEL, PARAMS, out.tokens, out.segments, R, temperature)
    np.testing.assert_allclose(np.where(out.mask, out.logprobs, 0), np.where(out.mask, scored, 0), atol=1e-5)


def test_a_response_ends_with_its_end_token_and_nothing_follows(sampled):
    response = sampled.tokens[:, -R:]
    assert sampled.truncated.any() and not sampled.truncated.all()
    for tokens, mask, truncated in zip(response, sampled.mask, sampled.truncated, strict=True):
        n = mask.sum()
        assert mask[:n].all() and not mask[n:].any() and not tokens[n:].any()
        assert (tokens[:n] == END).tolist() == [False] * (n - 1) + [not truncated]
        assert not truncated or n == R
    assert np.array_equal(sampled.segments[:, -R:], sampled.mask)


def test_an_end_token_in_the_prompt_ends_nothing(sampled):
    assert END in sampled.tokens[2, :5] and sampled.mask[2:4, 0].all() and sampled.mask[2:4].sum() > 2


def test_samples_of_a_prompt_differ(sampled):
    pairs = sampled.tokens[:, -R:].reshape(6, 2, R)
    assert (pairs[:, 0] != pairs[:, 1]).any(axis=1).sum() >= 5
    assert np.array_equal(sampled.tokens[0::2, :5], sampled.tokens[1::2, :5])


@pytest.mark.parametrize("layout", ["reversed", "one alone", "more pads", "another pad", "eight devices"])
def test_a_sample_depends_on_seed_step_prompt_and_number_alone(sampled, layout):
    tokens, lengths = prompts()
    whole = sampled.tokens[:, -R:].reshape(6, 2, R)
    if layout == "reversed":
        assert np.array_equal(run(range(5, -1, -1)).tokens[:, -R:].reshape(6, 2, R)[::-1], whole)
    elif layout == "one alone":
        assert np.array_equal(run([4]).tokens[:, -R:], whole[4])
    elif layout in ("more pads", "another pad"):
        out = run(slots=8) if layout == "more pads" else run(pad=END)
        assert np.array_equal(out.tokens[:, -R:].reshape(6, 2, R), whole)
    else:
        if jax.device_count() < 8:
            pytest.skip("needs 8 devices")
        mesh = sharding.make_mesh(Mesh(data=4, fsdp=2))
        again = np.array([*range(6), 0, 1])  # eight rows, one a device
        with jax.set_mesh(mesh):
            batch = sharding.shard_batch((tokens[again], lengths[again], again), mesh)
            out = generate(jax.device_put(PARAMS, sharding.replicated(mesh)), *batch, jax.random.key(1))
        assert len(out.tokens.sharding.device_set) == 8
        assert np.array_equal(np.asarray(out.tokens)[:12, -R:].reshape(6, 2, R), whole)


def test_another_key_gives_other_samples(sampled):
    tokens, lengths = prompts()
    other = generate(PARAMS, tokens, lengths, np.arange(6), jax.random.key(2))
    assert not np.array_equal(np.asarray(other.tokens), sampled.tokens)


def test_temperature_0_takes_the_most_probable_token():
    out = run(temperature=0.0, samples=1)
    tokens, segments = out.tokens, out.segments
    hidden = logprobs.transformer.apply(MODEL, PARAMS, tokens, logprobs.positions(segments), segments)[0]
    best = np.asarray(jnp.argmax(logprobs.transformer.logits(MODEL, PARAMS, hidden), -1))[:, -R - 1 : -1]
    assert np.array_equal(tokens[:, -R:][out.mask], best[out.mask])


FIVE = np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32)


@pytest.mark.parametrize("top_p, kept", [(0.3, 1), (0.4, 1), (0.41, 2), (0.75, 3), (0.9, 4), (0.96, 5), (1e-6, 1)])
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p, kept):
    """Every order of a five-word vocabulary."""
    orders = np.array(list(itertools.permutations(range(5))))
    masks = np.asarray(rollout.top_p_mask(jnp.asarray(FIVE[orders]), top_p))
    assert np.array_equal(masks, orders < kept)


def test_ties_at_the_edge_of_top_p_all_stay():
    mask = rollout.top_p_mask(jnp.asarray([[0.25, 0.25, 0.25, 0.25], [0.5, 0.2, 0.2, 0.1]]), 0.6)
    assert mask.tolist() == [[True] * 4, [True, True, True, False]]


def test_sampling_stays_in_the_kept_set_while_logprobs_are_of_all_words():
    """One declared convention: 0.7 of the mass is kept, drawn in proportion, and scored by the full distribution."""
    keys = jax.random.split(jax.random.key(0), 20000)
    logits = jnp.tile(jnp.log(FIVE) * 2, (20000, 1))  # temperature 2 brings them back to FIVE
    token, logprob = jax.jit(lambda k, z: rollout.sample(k, z, 2.0, 0.7))(keys, logits)
    counts = np.bincount(np.asarray(token), minlength=5) / 20000
    np.testing.assert_allclose(counts, [4 / 7, 3 / 7, 0, 0, 0], atol=0.015)
    np.testing.assert_allclose(logprob, np.log(FIVE)[np.asarray(token)], atol=1e-6)
