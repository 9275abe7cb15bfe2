"""Attention of one query to a row of keys, from its first real place to its last."""

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import decode_attention as kernels
from jaxtyping import Array, Float, Int

from alignjax.models.attention.devices import platform
from alignjax.models.attention.plain import masked_softmax, soft_cap

KERNEL = "mha_forward"  # the name that JAX gives the kernel
BLOCK = 128  # keys that the kernel reads at a time
# Programs that the kernel should have at least, so that all multiprocessors of a GPU read.
LEAST_PROGRAMS = 512
MOST_SPLITS = 16


def round_up(places: int) -> int:
    """Return how many places a row needs for the kernel to take so many.

    They are whole blocks; beyond `MOST_SPLITS` blocks, a multiple of so many.
    """
    blocks = -(-places // BLOCK)
    if blocks <= MOST_SPLITS:
        return BLOCK * blocks
    return BLOCK * MOST_SPLITS * -(-blocks // MOST_SPLITS)


def attend_rows(
    queries: Float[Array, "rows heads head_size"],
    keys: Float[Array, "rows places kv_heads head_size"],
    values: Float[Array, "rows places kv_heads head_size"],
    first: Int[Array, " rows"],
    end: Int[Array, " rows"],
    cap: float = 0.0,
) -> Float[Array, "rows heads head_size"]:
    """Attend to the places from `first` up to `end`, which is not one of them.

    On a GPU, 16 bits are read by a kernel of JAX that splits a row among several programs and
    passes over what lies behind `end`. Everywhere else, for other sizes of heads and with a cap
    of scores, all places are read and masked.
    """
    if cap or not kernel_can_read(queries, keys):
        return attend_masked(queries, keys, values, first, end, cap)
    seen = kernels.gqa(
        queries,
        keys,
        values,
        first,
        end,
        block_k=BLOCK,
        k_splits=splits_of(keys.shape),
        interpret=platform() != "gpu",  # only the tests get here elsewhere
    )
    return seen.astype(queries.dtype)  # it divides by a float32


def kernel_can_read(queries: Array, keys: Array) -> bool:
    """Return whether the kernel computes as exactly as the products would, and compiles."""
    head_size = queries.shape[-1]
    is_power_of_two = head_size & (head_size - 1) == 0
    return (
        platform() == "gpu"
        and queries.dtype == keys.dtype
        and queries.dtype in (jnp.bfloat16, jnp.float16)
        and is_power_of_two
        and 16 <= head_size <= 256
    )


def splits_of(shape: tuple[int, ...]) -> int:
    """Return into how many parts the kernel splits rows [rows places kv_heads head_size]."""
    rows, places, kv_heads, _ = shape
    splits = 1
    while splits < MOST_SPLITS and rows * kv_heads * splits < LEAST_PROGRAMS:
        if places % (2 * splits * BLOCK):
            break
        splits *= 2
    return splits


def attend_masked(
    queries: Float[Array, "rows heads head_size"],
    keys: Float[Array, "rows places kv_heads head_size"],
    values: Float[Array, "rows places kv_heads head_size"],
    first: Int[Array, " rows"],
    end: Int[Array, " rows"],
    cap: float = 0.0,
) -> Float[Array, "rows heads head_size"]:
    """Attend by products that XLA compiles anywhere; scores and softmax are float32."""
    rows, _, head_size = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(rows, kv_heads, -1, head_size)
    keys = keys.astype(queries.dtype)
    values = values.astype(queries.dtype)
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    places = jnp.arange(keys.shape[1])
    mask = (places >= first[:, None]) & (places < end[:, None])
    weights = masked_softmax(soft_cap(scores * head_size**-0.5, cap), mask[:, None, None])
    seen = jnp.einsum("bkgs,bskh->bkgh", weights.astype(queries.dtype), values)
    return seen.reshape(queries.shape)
