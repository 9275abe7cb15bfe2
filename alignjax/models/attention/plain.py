"""Attention as plain matrix products, which XLA compiles for any backend.

Long rows go part by part, so that the scores of all queries and all keys never exist at once.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignjax.models.attention.types import SharedKeys

WHOLE = 64  # most tokens of a row whose queries all go against all keys at once
# A longer row's queries are cut into so many parts, each with its own keys. More parts would
# compute fewer scores that the mask hides, and make a larger program.
PARTS = 4
# Queries whose scores exist at a time within a part. The backward pass computes them again.
BLOCK = 128


class Queries(NamedTuple):
    """Consecutive queries of each row. A token names one segment, or two of which it sees both."""

    vectors: Float[Array, "batch queries heads head_size"]
    segments: Int[Array, "batch queries named"]
    first: int | Int[Array, ""]  # the place of the first query in its row


class Keys(NamedTuple):
    """The first keys and values of each row, with the segments that their tokens name."""

    keys: Float[Array, "batch keys kv_heads head_size"]
    values: Float[Array, "batch keys kv_heads head_size"]
    segments: Int[Array, "batch keys named"]


AttendPart = Callable[[Queries, Keys, SharedKeys | None], Array]


def plain_attention(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens *named"],
    prefix: SharedKeys | None = None,
) -> Float[Array, "batch tokens heads head_size"]:
    """Attend part by part, each part of the queries against the keys up to its end.

    For a long row that computes little more than half of all scores.
    """
    batch, tokens = queries.shape[:2]
    segments = segments.reshape(batch, tokens, -1)
    if tokens <= WHOLE:
        all_queries = Queries(queries, segments, 0)
        return attend_block(all_queries, Keys(keys, values, segments), prefix)
    size = math.ceil(tokens / PARTS)
    if size <= BLOCK:
        return in_parts(attend_block, size, prefix, queries, keys, values, segments)
    size = math.ceil(size / BLOCK) * BLOCK
    attend = functools.partial(in_parts, attend_in_blocks, size, prefix)
    return padded(attend, BLOCK, queries, keys, values, segments)


def in_parts(
    attend: AttendPart,
    size: int,
    prefix: SharedKeys | None,
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens named"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Attend with `size` queries at a time, each part against the keys that it may see."""
    parts = []
    for first in range(0, queries.shape[1], size):
        end = first + size
        part = Queries(queries[:, first:end], segments[:, first:end], first)
        visible = Keys(keys[:, :end], values[:, :end], segments[:, :end])
        parts.append(attend(part, visible, prefix))
    return jnp.concatenate(parts, axis=1)


def attend_in_blocks(
    queries: Queries, visible: Keys, prefix: SharedKeys | None
) -> Float[Array, "batch queries heads head_size"]:
    """Attend block after block; the number of queries must be a multiple of BLOCK."""
    batch, count = queries.segments.shape[:2]

    def cut(x):
        return x.reshape(batch, -1, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    # The backward pass computes a block's scores again. If it kept them, they would add up to the
    # [batch heads tokens tokens] that this function is to avoid.
    @jax.checkpoint
    def attend(block):
        return attend_block(block, visible, prefix)

    firsts = queries.first + jnp.arange(0, count, BLOCK)
    blocks = Queries(cut(queries.vectors), cut(queries.segments), firsts)
    y = jax.lax.map(attend, blocks)
    return y.swapaxes(0, 1).reshape(queries.vectors.shape)


def attend_block(
    queries: Queries, visible: Keys, prefix: SharedKeys | None
) -> Float[Array, "batch queries heads head_size"]:
    """Attend with all scores at once; grouped queries share their keys without repeating them."""
    batch, count, heads, head_size = queries.vectors.shape
    kv_heads = visible.keys.shape[2]
    group = heads // kv_heads
    # Heads come first, and the queries of a group stand in one axis: XLA's CPU backend takes up
    # to twice as long for other orders.
    grouped = queries.vectors.reshape(batch, count, kv_heads, group, head_size)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_size)
    keys = visible.keys.swapaxes(1, 2)
    values = visible.values.swapaxes(1, 2)
    mask = jnp.tile(visible_mask(queries, visible), (1, group, 1))[:, None]
    scores = scaled_scores("bkqh,bksh->bkqs", grouped, keys)
    if prefix is None:
        weights = masked_softmax(scores, mask).astype(values.dtype)
        y = jnp.einsum("bkqs,bksh->bkqh", weights, values)
    else:
        prefix_scores = scaled_scores("bkqh,skh->bkqs", grouped, prefix.keys)
        prefix_mask = jnp.broadcast_to(prefix.real, (*mask.shape[:3], len(prefix.real)))
        scores = jnp.concatenate([prefix_scores, scores], axis=-1)
        mask = jnp.concatenate([prefix_mask, mask], axis=-1)
        weights = masked_softmax(scores, mask).astype(values.dtype)
        prefix_weights, weights = jnp.split(weights, [len(prefix.values)], axis=-1)
        y = jnp.einsum("bkqs,skh->bkqh", prefix_weights, prefix.values)
        y = y + jnp.einsum("bkqs,bksh->bkqh", weights, values)
    y = y.reshape(batch, kv_heads, group, count, head_size)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, count, heads, head_size)


def visible_mask(queries: Queries, visible: Keys) -> Bool[Array, "batch queries keys"]:
    """Return which keys each query sees: those of its segments, up to its own place."""
    named = queries.segments[:, :, None]
    same_segment = (named == visible.segments[:, None, :, :1]).any(axis=-1)
    key_places = jnp.arange(visible.segments.shape[1])
    query_places = queries.first + jnp.arange(queries.segments.shape[1])
    return same_segment & (key_places <= query_places[:, None])


def scaled_scores(
    equation: str, queries: Float[Array, "..."], keys: Float[Array, "..."]
) -> Float[Array, "batch kv_heads queries keys"]:
    """Return float32 scores over the square root of the head size."""
    scores = jnp.einsum(equation, queries, keys, preferred_element_type=jnp.float32)
    return scores * queries.shape[-1] ** -0.5


def masked_softmax(
    scores: Float[Array, "*rows keys"], mask: Bool[Array, "*#rows keys"]
) -> Float[Array, "*rows keys"]:
    """Return the softmax where the mask holds; a row that sees nothing becomes uniform."""
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)


def padded(
    attend: Callable[[Array, Array, Array, Array], Array],
    multiple: int,
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens *named"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Attend in rows that pads extend to a multiple of tokens, and cut the pads off again."""
    tokens = queries.shape[1]

    def widen(x):
        widths = [(0, 0), (0, -tokens % multiple)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths)

    y = attend(widen(queries), widen(keys), widen(values), widen(segments))
    return y[:, :tokens]
