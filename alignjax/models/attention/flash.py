"""Flash attention kernels: cuDNN's on NVIDIA GPUs, splash attention on TPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jaxtyping import Array, Float, Int

from alignjax.models.attention.devices import platform
from alignjax.models.attention.plain import padded
from alignjax.models.attention.sharded import over_devices
from alignjax.models.attention.types import Window

# Tile sizes of splash attention: it takes the first that divides the tokens of a row. MaxText
# chooses 512; we have not measured it.
TILES = (512, 384, 256, 128)
LANES = 128  # tiles, and so the tokens of a row, must be a multiple of this


def cudnn_attention(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Call cuDNN's flash attention, which takes no odd number of tokens in training."""
    return padded(cudnn_even, 2, queries, keys, values, segments)


def cudnn_windowed(
    window: Window,
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Call cuDNN's flash attention with a window."""
    attend = functools.partial(cudnn_even, window=window)
    return padded(attend, 2, queries, keys, values, segments)


def cudnn_even(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
    window: Window | None = None,
) -> Float[Array, "batch tokens heads head_size"]:
    """Call cuDNN's kernel with the mask of the segments, for an even number of tokens."""
    tokens = queries.shape[1]
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))
    if window is not None:
        # A segment's tokens are side by side, so distances in the row are those in the sequence.
        near = jnp.triu(causal, 1 - window.size)
        causal = near if window.applies is True else jnp.where(window.applies, near, causal)
    mask = causal & (segments[:, :, None] == segments[:, None, :])
    return jax.nn.dot_product_attention(
        queries, keys, values, mask=mask[:, None], implementation="cudnn"
    )


def splash_attention(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Call splash attention, a Pallas kernel for TPUs.

    Other backends interpret it, slowly; the tests run it on a CPU. Each device gets its rows and
    heads.
    """
    return over_devices(splash_padded, queries, keys, values, segments)


def splash_with(
    window: Window | None,
    cap: float,
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Call splash attention with a window, whose outside is passed over, or a cap of scores.

    The kernel is made for a mask, so layers that are scanned choose between two kernels.
    """
    attend = functools.partial(splash_padded, cap=cap)
    everywhere = functools.partial(over_devices, attend)
    if window is None:
        return everywhere(queries, keys, values, segments)
    near = functools.partial(over_devices, functools.partial(attend, window_size=window.size))
    if window.applies is True:
        return near(queries, keys, values, segments)
    return jax.lax.cond(window.applies, near, everywhere, queries, keys, values, segments)


def splash_padded(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
    window_size: int = 0,
    cap: float = 0.0,
) -> Float[Array, "batch tokens heads head_size"]:
    """Run splash attention on one device, for any number of tokens; 0 is no window, or no cap."""
    attend = functools.partial(splash_tiled, window_size=window_size, cap=cap)
    return padded(attend, LANES, queries, keys, values, segments)


def splash_tiled(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
    window_size: int,
    cap: float,
) -> Float[Array, "batch tokens heads head_size"]:
    """Run splash attention on one device; the number of tokens is a multiple of LANES."""
    tokens, heads, head_size = queries.shape[1:]
    tile = next(size for size in TILES if tokens % size == 0)
    mask = splash_attention_mask.CausalMask((tokens, tokens))
    if window_size:
        sides = (window_size - 1, 0)
        mask = splash_attention_mask.LocalMask((tokens, tokens), sides, offset=0)
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_kv_compute=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_kv_dkv_compute=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
        attn_logits_soft_cap=cap or None,
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() != "tpu",
    )

    def attend_row(queries, keys, values, segments):
        segment_ids = splash_attention_kernel.SegmentIds(segments, segments)
        return kernel(queries, keys, values, segment_ids)

    # The kernel leaves the scaling of the scores to its caller.
    queries = (queries.astype(jnp.float32) * head_size**-0.5).astype(queries.dtype)
    queries = queries.swapaxes(1, 2)
    keys = keys.swapaxes(1, 2)
    values = values.swapaxes(1, 2)
    return jax.vmap(attend_row)(queries, keys, values, segments).swapaxes(1, 2)
