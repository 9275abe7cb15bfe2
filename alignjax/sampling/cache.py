"""The kinds of caches of keys and values, and which one a rollout uses."""

from typing import Any, Protocol

from jaxtyping import Array, Bool, Int

from alignjax.models.attention import KeyValues, platform
from alignjax.models.transformer import AttendCache
from alignjax.sampling.ring_cache import RingCache
from alignjax.sampling.row_cache import RowCache
from alignjax.sampling.types import SamplingSettings

Cache = Any  # a tree of arrays, whose form its kind knows


class CacheReader(Protocol):
    """What each slot sees of the cache in one step of decoding."""

    attend: AttendCache


class CacheKind(Protocol):
    """How a cache is laid out, filled, read and written.

    In all of them a slot holds a prompt, with what all prompts begin with, and its response.
    """

    def empty(self) -> Cache:
        """Return a cache of zeros."""

    def fill(
        self,
        cache: Cache,
        where: Int[Array, " filled"] | None,
        key_values: KeyValues,
        real: Bool[Array, "prompts prompt_width"],
    ) -> Cache:
        """Return the cache with prompts in the slots `where`, or in all slots if that is None.

        `key_values` are the prompts' keys and values in all layers, [layers prompts kv_heads
        prompt_width head_size]; `real` says which places of them are not pads. A prompt fills
        len(where) / len(real) slots, which are adjacent in `where`.
        """

    def reader(
        self,
        real: Bool[Array, "slots prompt_width"],
        clock: Int[Array, ""],
        lengths: Int[Array, " slots"],
    ) -> CacheReader:
        """Return what each slot sees in the step at `clock`.

        `real` says which places of a slot's prompt are not pads; `lengths` are those of the
        responses, the token in hand included.
        """

    def write(
        self,
        cache: Cache,
        clock: Int[Array, ""],
        kept: Any,
        tokens: Int[Array, " slots"],
    ) -> Cache:
        """Return the cache after a step.

        `kept` is what the reader's `attend` returned in all layers, and `tokens` are those that
        the step drew.
        """


def choose_cache(
    settings: SamplingSettings, slots: int, prompt_width: int, has_prefix: bool, by_layer: bool
) -> CacheKind:
    """Return the kind of cache that suits the devices, and how layers are decoded.

    A step on a TPU must write one place of all slots, and there a conditional costs nothing. On a
    GPU a conditional waits for the host, and its operands are copied; writing a place of each slot
    is one launch. `prompt_width` counts the places of a prompt and of the prefix in front of it.
    `by_layer` says that layers are written out one by one, rather than scanned.
    """
    shape = {
        "model": settings.model,
        "slots": slots,
        "prompt_width": prompt_width,
        "response_length": settings.response_length,
        "dtype": settings.cache_dtype or settings.model.dtype,
    }
    if platform() == "gpu" and by_layer:
        return RowCache(has_prefix=has_prefix, **shape)
    return RingCache(**shape)
