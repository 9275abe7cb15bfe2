"""Attention as plain matrix products, which XLA compiles for any backend.

Long rows go part by part, so that the scores of all queries and all keys never exist at once.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from alignjax.models.attention.types import SharedKeys, Window

WHOLE = 64  # most tokens of a row whose queries all go against all keys at once
# A longer row's queries are cut into so many parts, each with its own keys. More parts would
# compute fewer scores that the mask hides, and make a larger program.
PARTS = 4
# Queries whose scores exist at a time within a part. The backward pass computes them again.
BLOCK = 128


class Tokens(NamedTuple):
    """Where tokens are. A token names one segment, or two of which it sees both."""

    segments: Int[Array, "batch tokens named"]
    positions: Int[Array, "batch tokens"] | None  # in their sequences; None without a window

    def cut(self, places: slice) -> "Tokens":
        """Return those at some places of each row."""
        positions = None if self.positions is None else self.positions[:, places]
        return Tokens(self.segments[:, places], positions)


class Queries(NamedTuple):
    """Consecutive queries of each row."""

    vectors: Float[Array, "batch queries heads head_size"]
    tokens: Tokens
    first: int | Int[Array, ""]  # the place of the first query in its row


class Keys(NamedTuple):
    """The first keys and values of each row."""

    keys: Float[Array, "batch keys kv_heads head_size"]
    values: Float[Array, "batch keys kv_heads head_size"]
    tokens: Tokens


AttendPart = Callable[[Queries, Keys], Array]


def plain_attention(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens *named"],
    prefix: SharedKeys | None = None,
    window: Window | None = None,
    cap: float = 0.0,
) -> Float[Array, "batch tokens heads head_size"]:
    """Attend part by part, each part of the queries against the keys up to its end.

    For a long row that computes little more than half of all scores.
    """
    batch, tokens = queries.shape[:2]
    segments = segments.reshape(batch, tokens, -1)
    positions = None if window is None else window.positions
    around = Surroundings(prefix, window, cap)
    attend = functools.partial(attend_block, around)
    if tokens <= WHOLE:
        row = Tokens(segments, positions)
        return attend(Queries(queries, row, 0), Keys(keys, values, row))
    size = math.ceil(tokens / PARTS)
    if size <= BLOCK:
        return in_parts(attend, size, queries, keys, values, segments, positions)
    size = math.ceil(size / BLOCK) * BLOCK
    attend = functools.partial(in_parts, functools.partial(attend_in_blocks, around), size)
    return padded(attend, BLOCK, queries, keys, values, segments, positions)


class Surroundings(NamedTuple):
    """What all queries see beside their rows, how far they see, and the cap of their scores."""

    prefix: SharedKeys | None
    window: Window | None
    cap: float  # of scores


def in_parts(
    attend: AttendPart,
    size: int,
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens named"],
    positions: Int[Array, "batch tokens"] | None,
) -> Float[Array, "batch tokens heads head_size"]:
    """Attend with `size` queries at a time, each part against the keys that it may see."""
    row = Tokens(segments, positions)
    parts = []
    for first in range(0, queries.shape[1], size):
        end = first + size
        part = Queries(queries[:, first:end], row.cut(slice(first, end)), first)
        visible = Keys(keys[:, :end], values[:, :end], row.cut(slice(end)))
        parts.append(attend(part, visible))
    return jnp.concatenate(parts, axis=1)


def attend_in_blocks(
    around: Surroundings, queries: Queries, visible: Keys
) -> Float[Array, "batch queries heads head_size"]:
    """Attend block after block; the number of queries must be a multiple of BLOCK."""
    batch, count = queries.vectors.shape[:2]

    def cut(x):
        return x.reshape(batch, -1, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    # The backward pass computes a block's scores again. If it kept them, they would add up to the
    # [batch heads tokens tokens] that this function is to avoid.
    @jax.checkpoint
    def attend(block):
        return attend_block(around, block, visible)

    firsts = queries.first + jnp.arange(0, count, BLOCK)
    blocks = Queries(cut(queries.vectors), jax.tree.map(cut, queries.tokens), firsts)
    y = jax.lax.map(attend, blocks)
    return y.swapaxes(0, 1).reshape(queries.vectors.shape)


def attend_block(
    around: Surroundings, queries: Queries, visible: Keys
) -> Float[Array, "batch queries heads head_size"]:
    """Attend with all scores at once; grouped queries share their keys without repeating them."""
    prefix = around.prefix
    window = around.window
    batch, count, heads, head_size = queries.vectors.shape
    kv_heads = visible.keys.shape[2]
    group = heads // kv_heads
    # Heads come first, and the queries of a group stand in one axis: XLA's CPU backend takes up
    # to twice as long for other orders.
    grouped = queries.vectors.reshape(batch, count, kv_heads, group, head_size)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_size)
    keys = visible.keys.swapaxes(1, 2)
    values = visible.values.swapaxes(1, 2)
    mask = jnp.tile(visible_mask(queries, visible, window), (1, group, 1))[:, None]
    scores = scaled_scores("bkqh,bksh->bkqs", grouped, keys)
    if prefix is None:
        weights = masked_softmax(soft_cap(scores, around.cap), mask).astype(values.dtype)
        y = jnp.einsum("bkqs,bksh->bkqh", weights, values)
    else:
        prefix_scores = scaled_scores("bkqh,skh->bkqs", grouped, prefix.keys)
        prefix_mask = jnp.broadcast_to(prefix.real, (*mask.shape[:3], len(prefix.real)))
        if window is not None:
            near = jnp.tile(prefix_in_window(queries, prefix, window), (1, group, 1))
            prefix_mask &= near[:, None]
        scores = jnp.concatenate([prefix_scores, scores], axis=-1)
        mask = jnp.concatenate([prefix_mask, mask], axis=-1)
        weights = masked_softmax(soft_cap(scores, around.cap), mask).astype(values.dtype)
        prefix_weights, weights = jnp.split(weights, [len(prefix.values)], axis=-1)
        y = jnp.einsum("bkqs,skh->bkqh", prefix_weights, prefix.values)
        y = y + jnp.einsum("bkqs,bksh->bkqh", weights, values)
    y = y.reshape(batch, kv_heads, group, count, head_size)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, count, heads, head_size)


def visible_mask(
    queries: Queries, visible: Keys, window: Window | None
) -> Bool[Array, "batch queries keys"]:
    """Return which keys each query sees: those of its segments, up to its own place."""
    named = queries.tokens.segments[:, :, None]
    same_segment = (named == visible.tokens.segments[:, None, :, :1]).any(axis=-1)
    key_places = jnp.arange(visible.tokens.segments.shape[1])
    query_places = queries.first + jnp.arange(queries.tokens.segments.shape[1])
    seen = same_segment & (key_places <= query_places[:, None])
    if window is None:
        return seen
    distance = queries.tokens.positions[:, :, None] - visible.tokens.positions[:, None]
    return seen & in_window(distance, window)


def prefix_in_window(
    queries: Queries, prefix: SharedKeys, window: Window
) -> Bool[Array, "batch queries prefix_tokens"]:
    """Return which tokens of the prefix are near enough to each query."""
    prefix_positions = jnp.cumsum(prefix.real) - 1
    return in_window(queries.tokens.positions[:, :, None] - prefix_positions, window)


def in_window(distance: Int[Array, "*rows"], window: Window) -> Bool[Array, "*rows"]:
    """Return whether tokens at a distance are seen; all are where the window does not apply."""
    near = distance < window.size
    return near if window.applies is True else near | jnp.logical_not(window.applies)


def scaled_scores(
    equation: str, queries: Float[Array, "..."], keys: Float[Array, "..."]
) -> Float[Array, "batch kv_heads queries keys"]:
    """Return float32 scores over the square root of the head size."""
    scores = jnp.einsum(equation, queries, keys, preferred_element_type=jnp.float32)
    return scores * queries.shape[-1] ** -0.5


def soft_cap(scores: Float[Array, "*rows"], cap: float) -> Float[Array, "*rows"]:
    """Bound numbers softly to between -cap and cap; 0 is no cap."""
    return cap * jnp.tanh(scores / cap) if cap else scores


def masked_softmax(
    scores: Float[Array, "*rows keys"], mask: Bool[Array, "*#rows keys"]
) -> Float[Array, "*rows keys"]:
    """Return the softmax where the mask holds; a row that sees nothing becomes uniform."""
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)


def padded(
    attend: Callable[..., Array],
    multiple: int,
    queries: Float[Array, "batch tokens heads head_size"],
    *others: Shaped[Array, "batch tokens *_"] | None,
) -> Float[Array, "batch tokens heads head_size"]:
    """Attend in rows that pads extend to a multiple of tokens, and cut the pads off again."""
    tokens = queries.shape[1]

    def widen(x):
        widths = [(0, 0), (0, -tokens % multiple)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths)

    return attend(*jax.tree.map(widen, (queries, *others)))[:, :tokens]
