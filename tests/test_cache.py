"""The cache of keys and values: its layout, filling slots, and reading and writing its ring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny

from alignjax.models import transformer
from alignjax.models.attention import KeyValues
from alignjax.sampling.ring_cache import RING_PARTS, RingCache

MODEL, _ = tiny(vocab_size=13)  # two layers, four heads, two key-value heads of size 8
SLOTS = 3
PROMPT_WIDTH = 5


def ring_cache(slots, prompt_width, response_length, dtype="float32"):
    return RingCache(
        model=MODEL,
        slots=slots,
        prompt_width=prompt_width,
        response_length=response_length,
        dtype=dtype,
    )


def widths_of(blocks, axis):
    return [(block.keys.shape[axis], block.values.shape[axis]) for block in blocks]


def test_a_cache_is_the_prompts_block_and_a_ring_in_parts(monkeypatch):
    """Ten places are four parts of three."""
    widths = [(5, 5), *[(3, 3)] * 4]
    by_layer = ring_cache(4, 5, 10).empty()
    assert len(by_layer) == 2 and by_layer[0][0].keys.shape == (4, 2, 5, 8)
    assert [widths_of(blocks, 2) for blocks in by_layer] == [widths] * 2
    monkeypatch.setattr(transformer, "UNROLLED", 0)
    stacked = ring_cache(4, 5, 10).empty()
    assert stacked[0].keys.shape == (2, 4, 2, 5, 8)
    assert widths_of(stacked, 3) == widths
    num_parts = {}
    for response_length in (1, 2, 3, 4, 5, 9):
        num_parts[response_length] = len(ring_cache(4, 5, response_length).empty()) - 1
    assert num_parts == {1: 1, 2: 2, 3: 3, 4: 4, 5: 3, 9: 3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_may_have_another_type_than_the_model(dtype):
    cache = ring_cache(2, 3, 4, dtype).empty()
    assert {array.dtype for array in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("unrolled", [True, False])
def test_filling_slots_leaves_the_others_alone(unrolled, monkeypatch):
    """Two prompts with two samples each fill four of six slots, or all of four."""
    monkeypatch.setattr(transformer, "UNROLLED", 2 * unrolled)
    rng = np.random.default_rng(0)

    def draw(shape):
        return rng.normal(size=shape).astype(np.float32)

    def layers_of(cache):
        if unrolled:
            return cache
        return [transformer.layer_of(cache, layer) for layer in range(2)]

    old = jax.tree.map(lambda array: draw(array.shape), ring_cache(6, 5, 4).empty())
    prompts = KeyValues(keys=draw((2, 2, 2, 5, 8)), values=draw((2, 2, 2, 5, 8)))
    for where in (jnp.array([4, 0, 2, 5]), None):
        slots = np.arange(4) if where is None else np.asarray(where)
        before = old
        if where is None:
            before = jax.tree.map(lambda array: array[..., :4, :, :, :], old)
        num_slots = 4 if where is None else 6
        cache = jax.tree.map(jnp.asarray, before)
        after = ring_cache(num_slots, 5, 4).fill(cache, where, prompts, np.ones((2, 5), bool))
        both = zip(layers_of(before), layers_of(after), strict=True)
        for layer, (old_blocks, new_blocks) in enumerate(both):
            for name in ("keys", "values"):
                expected = getattr(old_blocks[0], name).copy()
                for sample, slot in enumerate(slots):
                    expected[slot] = getattr(prompts, name)[layer, sample // 2]
                assert np.array_equal(getattr(new_blocks[0], name), expected)
            same = jax.tree.map(np.array_equal, new_blocks[1:], old_blocks[1:])
            assert all(jax.tree.leaves(same))


def attend_with_one_query(query, keys, values):
    """Return the attention of query[head_size] to keys[places head_size], by numpy."""
    weights = np.exp(keys @ query / np.sqrt(len(query)))
    return weights @ values / weights.sum()


@pytest.mark.parametrize("response_length, layer", [(7, None), (7, 1), (3, None)])
def test_a_step_reads_only_the_filled_parts_of_the_ring(response_length, layer):
    """Compare with one query at a time over the prompt and the tokens since the slot's start.

    Three slots start again at different times. The parts that the clock has not reached are NaN,
    and stay so.
    """
    rng = np.random.default_rng(0)
    part_width = -(-response_length // RING_PARTS)
    part_starts = range(0, response_length, part_width)
    prompt_mask = np.arange(PROMPT_WIDTH) >= PROMPT_WIDTH - np.array([[5], [2], [1]])
    layers = () if layer is None else (2,)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def ring_part(value):
        shape = (*layers, SLOTS, 2, part_width, 8)
        return KeyValues(keys=jnp.full(shape, value), values=jnp.full(shape, value))

    prompts = KeyValues(
        keys=draw(*layers, SLOTS, 2, PROMPT_WIDTH, 8),
        values=draw(*layers, SLOTS, 2, PROMPT_WIDTH, 8),
    )
    layer_prompts = prompts if layer is None else transformer.layer_of(prompts, layer)
    blocks = [prompts, *(ring_part(np.nan) for _ in part_starts)]
    histories = [[] for _ in range(SLOTS)]  # of each slot: KeyValues of its tokens

    @jax.jit
    def step(blocks, clock, lengths, query, token):
        kind = ring_cache(SLOTS, PROMPT_WIDTH, response_length)
        reader = kind.reader(prompt_mask, clock, lengths)
        attended, kept = reader.attend(blocks, layer, query, token.keys, token.values)
        if layer is not None:  # the other layer's are 0
            kept = jax.tree.map(lambda array: jnp.stack([jnp.zeros_like(array), array]), kept)
        return attended, kind.write(blocks, clock, kept, jnp.zeros(SLOTS, jnp.int32))

    for clock in range(3 * response_length):
        if clock in part_starts:
            # The places around the written one are masked, but they must be finite.
            blocks[1 + clock // part_width] = ring_part(0.0)
        query = draw(SLOTS, 4, 8)
        token = KeyValues(keys=draw(SLOTS, 2, 8), values=draw(SLOTS, 2, 8))
        for slot in range(SLOTS):
            is_full = len(histories[slot]) == response_length
            if is_full or (clock, slot) in ((2, 1), (response_length + 1, 0)):
                histories[slot] = []
            histories[slot].append(transformer.layer_of(token, slot))
        lengths = np.array([len(history) for history in histories])
        before = blocks
        attended, blocks = step(blocks, jnp.int32(clock), lengths, query, token)
        expected = np.zeros((SLOTS, 4, 8))
        for slot, head in np.ndindex(SLOTS, 4):
            kv_head = head // 2
            seen = []
            for name in ("keys", "values"):
                in_prompt = getattr(layer_prompts, name)[slot, kv_head, prompt_mask[slot]]
                in_ring = [getattr(token, name)[kv_head] for token in histories[slot]]
                seen.append(np.concatenate([in_prompt, in_ring]))
            expected[slot, head] = attend_with_one_query(query[slot, head], *seen)
        np.testing.assert_allclose(attended, expected, atol=1e-5)
        filled = 2 + min(clock, response_length - 1) // part_width
        assert all(np.isnan(array).all() for array in jax.tree.leaves(blocks[filled:]))
        changed = jax.tree.map(count_changes, before[:filled], blocks[:filled])
        one_place = 2 * SLOTS * 2 * 8  # keys and values of one token in each slot
        assert sum(jax.tree.leaves(changed)) == one_place


def count_changes(before, after):
    return int((np.asarray(before) != np.asarray(after)).sum())
