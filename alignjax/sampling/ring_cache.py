"""The cache of TPUs and CPUs: a block with the prompts, and a ring with the responses.

The cache is a list of blocks, each a pair of keys and values. The first block holds the prompts,
one in each slot. The others are the parts of a ring, with one place for each response token.

In each step, the next token of every slot goes to the same place of the ring, the clock modulo
the response length. So a step writes one slice, however old the responses in the slots are; and
since no response is longer than the ring, none of its tokens is overwritten while it lasts.

Where layers are unrolled (see `transformer.unrolled`), the cache is a list with such blocks for
each layer, without the axis `layers`.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from alignjax.config import Model
from alignjax.machine.sharding import constrain, spec_of
from alignjax.models import transformer
from alignjax.models.attention import KeyValues, cached_attention, platform, shards
from alignjax.models.layer_kinds import FULL, LayerKind, select

RING_PARTS = 4  # of the ring: a step reads only the parts that hold something

Stored = Float[Array, "*layers slots kv_heads width head_size"]  # keys, or values
Cache = list[KeyValues] | list[list[KeyValues]]


@dataclass(frozen=True, kw_only=True)
class RingCache:
    """A cache of this kind, see `cache.CacheKind`."""

    model: Model
    slots: int
    prompt_width: int
    response_length: int
    dtype: str  # of keys and values

    def empty(self) -> Cache:
        """Return a cache of zeros."""
        part_width = -(-self.response_length // RING_PARTS)
        num_parts = -(-self.response_length // part_width)
        widths = [self.prompt_width] + [part_width] * num_parts
        if transformer.unrolled(self.model):
            return [self.empty_blocks((), widths) for _ in range(self.model.layers)]
        return self.empty_blocks((self.model.layers,), widths)

    def empty_blocks(self, layers: tuple[int, ...], widths: list[int]) -> list[KeyValues]:
        """Return blocks of zeros of these widths, with the axes `layers` in front."""
        blocks = []
        for width in widths:
            shape = (*layers, self.slots, self.model.kv_heads, width, self.model.head_size)
            keys = empty_block(shape, self.dtype)
            values = empty_block(shape, self.dtype)
            blocks.append(KeyValues(keys=keys, values=values))
        return blocks

    def fill(
        self,
        cache: Cache,
        where: Int[Array, " filled"] | None,
        key_values: KeyValues,
        real: Bool[Array, "prompts prompt_width"],
    ) -> Cache:
        """Return the cache with prompts in the slots `where`, or in all of them."""
        num_filled = self.slots if where is None else len(where)
        samples = num_filled // len(real)
        if not is_by_layer(cache):
            return fill_blocks(cache, where, key_values, samples)
        return [
            fill_blocks(blocks, where, transformer.layer_of(key_values, layer), samples)
            for layer, blocks in enumerate(cache)
        ]

    def reader(
        self,
        real: Bool[Array, "slots prompt_width"],
        clock: Int[Array, ""],
        lengths: Int[Array, " slots"],
    ) -> "RingReader":
        """Return what each slot sees in the step at `clock`.

        A slot sees as many of the last places of the ring as its response has tokens there: all
        of them but the one in hand.
        """
        age = (clock - 1 - jnp.arange(self.response_length)) % self.response_length
        everything = Masks(prompt=real, ring=age < lengths[:, None] - 1)
        windowed = everything
        if self.model.window:
            # The token in hand comes behind the prompt's tokens and the others of its response.
            distance = jnp.sum(real, axis=1, keepdims=True) + lengths[:, None]
            distance -= jnp.cumsum(real, axis=1)
            windowed = Masks(
                prompt=real & (distance < self.model.window),
                ring=everything.ring & (age + 1 < self.model.window),
            )
        return RingReader(
            everything=everything,
            windowed=windowed,
            clock=clock,
            cap=self.model.attention_cap,
        )

    def write(
        self,
        cache: Cache,
        clock: Int[Array, ""],
        kept: KeyValues | list[KeyValues],
        tokens: Int[Array, " slots"],
    ) -> Cache:
        """Return the cache with the keys and values of one step, in their place of the ring."""
        place = clock % self.response_length
        kept = after_drawing(kept, tokens)
        if not is_by_layer(cache):
            return write_blocks(cache, place, kept)
        return [
            write_blocks(blocks, place, of_layer)
            for blocks, of_layer in zip(cache, kept, strict=True)
        ]


def empty_block(shape: tuple[int, ...], dtype: str) -> Stored:
    """Return zeros whose slots and heads are laid out over the mesh."""
    slot_axis = len(shape) - 4
    return constrain(jnp.zeros(shape, dtype), slot_axis, tensor=slot_axis + 1)


def is_by_layer(cache: Cache) -> bool:
    """Return whether the cache is a list of layers, each with its own blocks."""
    return isinstance(cache[0], list)


def keep_axis_order(stored: Stored) -> Stored:
    """Keep the axes of a part of the cache in memory in the order of their names.

    The TPU compiler would choose one order where a step writes and another where it reads, and
    copy the cache from one into the other at every step.
    """
    if platform() != "tpu":
        return stored
    in_named_order = functools.partial(
        with_layout_constraint, layouts=Layout(tuple(range(stored.ndim)))
    )
    spec = spec_of(stored.shape, stored.ndim - 4, stored.ndim - 3)
    if spec is None:
        return in_named_order(stored)
    # Each device does this by itself: GSPMD would gather an array that is cut along two axes.
    on_each_device = jax.shard_map(in_named_order, in_specs=spec, out_specs=spec, check_vma=False)
    return on_each_device(stored)


def fill_blocks(
    blocks: list[KeyValues],
    where: Int[Array, " filled"] | None,
    key_values: KeyValues,
    samples_per_prompt: int,
) -> list[KeyValues]:
    """Return the blocks with prompts in the first of them, see `RingCache.fill`."""
    stored_keys, stored_values = blocks[0]
    new_keys, new_values = key_values
    prompts = KeyValues(
        keys=fill_stored(stored_keys, where, new_keys, samples_per_prompt),
        values=fill_stored(stored_values, where, new_values, samples_per_prompt),
    )
    return [prompts, *blocks[1:]]


def fill_stored(
    stored: Stored, where: Int[Array, " filled"] | None, new: Array, samples_per_prompt: int
) -> Stored:
    """Return the stored keys, or values, with those of new prompts in the slots `where`."""
    new = new.astype(stored.dtype)
    if where is None:
        return jnp.repeat(new, samples_per_prompt, axis=-4)
    if shards().rows == 1:
        repeated = jnp.repeat(new, samples_per_prompt, axis=-4)
        return stored.at[..., where, :, :, :].set(repeated)
    # Chosen slot by slot rather than scattered: GSPMD would gather the whole cache to scatter
    # into its slots.
    num_slots = stored.shape[-4]
    source = jnp.full(num_slots, -1).at[where].set(jnp.arange(len(where)))  # -1: not filled
    by_slot = jnp.take(new, jnp.maximum(source, 0) // samples_per_prompt, axis=-4)
    by_slot = constrain(by_slot, stored.ndim - 4, stored.ndim - 3)
    is_filled = (source >= 0)[:, None, None, None]
    return keep_axis_order(jnp.where(is_filled, by_slot, stored))


def write_blocks(
    blocks: list[KeyValues], place: Int[Array, ""], key_values: KeyValues
) -> list[KeyValues]:
    """Return the blocks with one step's keys and values at `place` of the ring."""
    new_keys, new_values = key_values
    written = [blocks[0]]
    for part, (keys, values) in enumerate(blocks[1:]):
        written.append(
            KeyValues(
                keys=write_stored(keys, part, place, new_keys),
                values=write_stored(values, part, place, new_values),
            )
        )
    return written


def write_stored(stored: Stored, part: int, place: Int[Array, ""], new: Array) -> Stored:
    """Return a part of the ring with `new` at `place`, if that lies in this part.

    A part that does not contain the place is given the value that it already holds. So every
    part is written where it lies, and none is copied.
    """
    width = stored.shape[-2]
    start = (0,) * (stored.ndim - 2) + (place % width, 0)
    held = jax.lax.dynamic_slice(stored, start, (*stored.shape[:-2], 1, stored.shape[-1]))
    value = jnp.where(place // width == part, new[..., None, :].astype(stored.dtype), held)
    return keep_axis_order(jax.lax.dynamic_update_slice(stored, value, start))


class Masks(NamedTuple):
    """Which places of the cache a slot sees."""

    prompt: Bool[Array, "slots prompt_width"]
    ring: Bool[Array, "slots response_tokens"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RingReader:
    """What each slot sees of the cache in one step of decoding."""

    everything: Masks
    windowed: Masks
    clock: Int[Array, ""]
    cap: float = 0.0  # of scores

    def attend(
        self,
        blocks: list[KeyValues],
        layer: int | Int[Array, ""] | None,
        query: Float[Array, "slots heads head_size"],
        key: Float[Array, "slots kv_heads head_size"],
        value: Float[Array, "slots kv_heads head_size"],
        kind: LayerKind = FULL,
    ) -> tuple[Float[Array, "slots heads head_size"], KeyValues]:
        """Attend to the cache and to the token in hand, whose key and value are kept.

        Nothing is written to the cache here: XLA would then copy it in every layer. This reads only
        the filled part of the cache: the prompts' block and as many parts of the ring as the clock
        has reached. `layer` is None if the blocks are a layer's own.
        """
        num_parts = len(blocks) - 1
        part_width = blocks[-1].keys.shape[-2]
        seen = select(kind.windowed, self.windowed, self.everything)
        num_slots, response_length = seen.ring.shape
        padding = num_parts * part_width - response_length
        padded = jnp.pad(seen.ring, ((0, 0), (0, padding)))
        masks = [seen.prompt, *jnp.split(padded, num_parts, axis=1)]
        in_hand = KeyValues(keys=key[:, :, None], values=value[:, :, None])
        sees_itself = jnp.ones((num_slots, 1), bool)
        branches = []
        for num_read in range(1, num_parts + 2):
            branches.append(
                functools.partial(
                    read_blocks,
                    query,
                    blocks[:num_read],
                    layer,
                    in_hand,
                    [*masks[:num_read], sees_itself],
                    self.cap,
                )
            )
        # Before the first write no part is filled: the last filled one is number -1.
        last_filled = jnp.minimum(self.clock - 1, response_length - 1) // part_width
        attended = jax.lax.switch(last_filled + 1, branches)
        return attended, KeyValues(keys=key, values=value)


def read_blocks(
    query: Float[Array, "slots heads head_size"],
    blocks: list[KeyValues],
    layer: int | Int[Array, ""] | None,
    in_hand: KeyValues,
    masks: list[Bool[Array, "slots _"]],
    cap: float,
) -> Float[Array, "slots heads head_size"]:
    """Attend to blocks of a layer and to the token in hand."""
    of_layer = blocks if layer is None else transformer.layer_of(blocks, layer)
    return cached_attention(query, [*of_layer, in_hand], masks, cap)


def after_drawing(
    key_values: KeyValues | list[KeyValues], tokens: Int[Array, " slots"]
) -> KeyValues | list[KeyValues]:
    """Return the same keys and values, as values that depend on the drawn tokens.

    A token is never negative, so the choice below changes nothing. But it lets XLA see that the
    cache is written only after all of it has been read, so XLA does not copy the cache.
    """
    is_drawn = (tokens >= 0)[:, None, None]
    return jax.tree.map(lambda values: jnp.where(is_drawn, values, 0), key_values)
