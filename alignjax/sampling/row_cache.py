"""The cache of GPUs: each slot has one row with its prompt and, behind it, its response.

A layer has keys and values [slots places kv_heads head_size]. Prompts end at the place
`prompt_width`, so a row is read from its first real token to the token in hand. Each slot writes at
its own place, in every layer before that layer reads.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from alignjax.config import Model
from alignjax.machine.sharding import constrain, spec_of
from alignjax.models import transformer
from alignjax.models.attention import KeyValues, decode_attention
from alignjax.models.layer_kinds import FULL, LayerKind, select

SLOT_AXIS = 0
HEAD_AXIS = 2


@dataclass(frozen=True, kw_only=True)
class RowCache:
    """A cache of this kind, see `cache.CacheKind`."""

    model: Model
    slots: int
    prompt_width: int
    response_length: int
    dtype: str  # of keys and values
    has_prefix: bool  # in front of the prompts: their pads may stand behind it

    @property
    def places(self) -> int:
        """Return the places of a row, as many as the kernel takes."""
        return decode_attention.round_up(self.prompt_width + self.response_length)

    def empty(self) -> list[KeyValues]:
        """Return a cache of zeros, with one entry for each layer."""
        return [
            KeyValues(keys=self.empty_rows(), values=self.empty_rows())
            for _ in range(self.model.layers)
        ]

    def empty_rows(self) -> Float[Array, "slots places kv_heads head_size"]:
        """Return the rows of zeros of a layer, laid out over the mesh."""
        shape = (self.slots, self.places, self.model.kv_heads, self.model.head_size)
        return constrain(jnp.zeros(shape, self.dtype), SLOT_AXIS, tensor=HEAD_AXIS)

    def fill(
        self,
        cache: list[KeyValues],
        where: Int[Array, " filled"] | None,
        key_values: KeyValues,
        real: Bool[Array, "prompts prompt_width"],
    ) -> list[KeyValues]:
        """Return the cache with prompts in the slots `where`, or in all of them."""
        num_filled = self.slots if where is None else len(where)
        samples = num_filled // len(real)
        order = None
        if self.has_prefix:  # bring all pads to the front
            order = jnp.argsort(real, axis=1, stable=True)[:, :, None, None]
        filled = []
        for layer, rows in enumerate(cache):
            prompts = transformer.layer_of(key_values, layer)
            filled.append(
                KeyValues(
                    keys=fill_rows(rows.keys, where, prompts.keys, order, samples),
                    values=fill_rows(rows.values, where, prompts.values, order, samples),
                )
            )
        return filled

    def reader(
        self,
        real: Bool[Array, "slots prompt_width"],
        clock: Int[Array, ""],
        lengths: Int[Array, " slots"],
    ) -> "RowReader":
        """Return what each slot sees: its row from the first real token on."""
        del clock
        first = self.prompt_width - real.sum(axis=1, dtype=jnp.int32)
        place = self.prompt_width + lengths - 1
        windowed = first
        if self.model.window:
            windowed = jnp.maximum(first, place + 1 - self.model.window)
        return RowReader(
            first=first, first_in_window=windowed, place=place, cap=self.model.attention_cap
        )

    def write(
        self,
        cache: list[KeyValues],
        clock: Int[Array, ""],
        kept: list[KeyValues],
        tokens: Int[Array, " slots"],
    ) -> list[KeyValues]:
        """Return what the layers kept: each has written its own rows."""
        del cache, clock, tokens
        return kept


@dataclass(frozen=True, kw_only=True, eq=False)
class RowReader:
    """What each slot sees in one step: its row from `first` to `place`, the token in hand."""

    first: Int[Array, " slots"]
    first_in_window: Int[Array, " slots"]  # the same in layers with a window
    place: Int[Array, " slots"]
    cap: float = 0.0  # of scores

    def attend(
        self,
        rows: KeyValues,
        layer: None,
        queries: Float[Array, "slots heads head_size"],
        keys: Float[Array, "slots kv_heads head_size"],
        values: Float[Array, "slots kv_heads head_size"],
        kind: LayerKind = FULL,
    ) -> tuple[Float[Array, "slots heads head_size"], KeyValues]:
        """Write the token in hand into its rows, attend to them, and return them as kept."""
        del layer
        first = select(kind.windowed, self.first_in_window, self.first)
        arguments = (queries, keys, values, *rows, first, self.place)
        attend = functools.partial(write_and_attend, cap=self.cap)
        spec = spec_of(rows.keys.shape, SLOT_AXIS, HEAD_AXIS)
        if spec is None:
            seen, written = attend(*arguments)
        else:
            # Each device writes and reads its own slots and heads: GSPMD would gather the cache.
            by_slot = P(spec[SLOT_AXIS])
            heads = P(spec[SLOT_AXIS], spec[HEAD_AXIS])
            call = jax.shard_map(
                attend,
                in_specs=(heads, heads, heads, spec, spec, by_slot, by_slot),
                out_specs=(heads, KeyValues(keys=spec, values=spec)),
                check_vma=False,
            )
            seen, written = call(*arguments)
        return seen, written


def write_and_attend(
    queries: Float[Array, "slots heads head_size"],
    keys: Float[Array, "slots kv_heads head_size"],
    values: Float[Array, "slots kv_heads head_size"],
    key_rows: Float[Array, "slots places kv_heads head_size"],
    value_rows: Float[Array, "slots places kv_heads head_size"],
    first: Int[Array, " slots"],
    place: Int[Array, " slots"],
    cap: float,
) -> tuple[Float[Array, "slots heads head_size"], KeyValues]:
    """Return what the queries see, and the rows with the token in hand at its place."""
    slots = jnp.arange(len(place))
    key_rows = key_rows.at[slots, place].set(keys.astype(key_rows.dtype))
    value_rows = value_rows.at[slots, place].set(values.astype(value_rows.dtype))
    seen = decode_attention.attend_rows(queries, key_rows, value_rows, first, place + 1, cap)
    return seen, KeyValues(keys=key_rows, values=value_rows)


def fill_rows(
    rows: Float[Array, "slots places kv_heads head_size"],
    where: Int[Array, " filled"] | None,
    prompts: Float[Array, "prompts kv_heads prompt_width head_size"],
    order: Int[Array, "prompts prompt_width 1 1"] | None,
    samples: int,
) -> Float[Array, "slots places kv_heads head_size"]:
    """Return the rows with prompts at their beginning, in the slots `where`.

    `order` says which place of a prompt comes where, if they are not in order already.
    """
    new = prompts.swapaxes(1, 2)
    if order is not None:
        new = jnp.take_along_axis(new, order, axis=1)
    new = jnp.repeat(new.astype(rows.dtype), samples, axis=0)
    width = new.shape[1]
    if where is None:
        return rows.at[:, :width].set(new)
    return constrain(rows.at[where, :width].set(new), SLOT_AXIS, tensor=HEAD_AXIS)
