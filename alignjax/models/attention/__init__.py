"""Causal attention within segments, attention against a cache, and the choice of the kernel.

Scores and softmax are float32. Grouped queries share their keys without repeating them.
`plain` has the products that XLA compiles anywhere, `flash` the kernels of GPUs and TPUs.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignjax.config import Model, UserError
from alignjax.models.attention.devices import ONE_DEVICE, Shards, platform, shards
from alignjax.models.attention.flash import (
    LANES,
    cudnn_attention,
    cudnn_windowed,
    splash_attention,
    splash_with,
)
from alignjax.models.attention.plain import masked_softmax, plain_attention, soft_cap
from alignjax.models.attention.triton import triton_attention
from alignjax.models.attention.types import KeyValues, SharedKeys, Window

__all__ = [
    "KeyValues",
    "SharedKeys",
    "Shards",
    "Window",
    "cached_attention",
    "check",
    "choose",
    "platform",
    "self_attention",
    "shards",
    "soft_cap",
]

IMPLEMENTATIONS = {
    "xla": plain_attention,
    "triton": triton_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}

TRITON_HEADS = (16, 32, 64, 128)  # powers of two, of which a block fits into registers


def self_attention(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens *named"],
    implementation: str = "auto",
    prefix: SharedKeys | None = None,
    window: Window | None = None,
    cap: float = 0.0,
) -> Float[Array, "batch tokens heads head_size"]:
    """Attend within segments; all arrays have the queries' type, and so does the result.

    A token sees the tokens of its segment up to itself, so a row may pack several sequences. A pad
    (segment 0) sees the pads up to itself: its result and gradients are finite, and never read.

    With segments [batch tokens 2], a token also sees the second segment that it names. All tokens
    see the real tokens of `prefix`. Both always run as "xla", whatever the implementation.

    A window limits how far back all of this reaches. A cap above 0 bounds the scores softly.

    Raises UserError as `choose` does.
    """
    if prefix is not None or segments.ndim == 3:
        return plain_attention(queries, keys, values, segments, prefix, window, cap)
    if window is not None and queries.shape[1] <= window.size:
        window = None  # no token of such a row is too far away
    kv_heads = keys.shape[2]
    name = choose(
        implementation,
        platform(),
        queries.dtype,
        queries.shape,
        kv_heads,
        shards(),
        has_window=window is not None,
        has_cap=cap > 0,
    )
    if name == "xla":
        return plain_attention(queries, keys, values, segments, window=window, cap=cap)
    if name == "splash" and (window is not None or cap):
        return splash_with(window, cap, queries, keys, values, segments)
    if window is None:
        return IMPLEMENTATIONS[name](queries, keys, values, segments)
    return cudnn_windowed(window, queries, keys, values, segments)


def choose(
    implementation: str,
    backend: str,
    dtype: jnp.dtype,
    shape: tuple[int, int, int, int],
    kv_heads: int,
    shards: Shards = ONE_DEVICE,
    has_window: bool = False,
    has_cap: bool = False,
) -> str:
    """Return a name of IMPLEMENTATIONS, for queries of shape [batch tokens heads head_size].

    "auto" is splash on a TPU if a row fills a tile, and on a GPU in 16 bits triton, or cudnn for
    sizes of heads that triton does not take; all of them only if rows and heads divide over their
    devices. triton knows no windows, and only splash and xla know caps of scores. "auto" is xla
    otherwise.

    Raises UserError if the implementation that the config names can't run.
    """
    batch, tokens, _, head_size = shape
    row_shards, head_shards = shards
    on_gpu = gpu_problem(backend, dtype)
    divided = heads_problem(kv_heads, head_shards)
    problems = {
        "xla": None,
        "triton": on_gpu or triton_problem(head_size) or divided,
        "cudnn": on_gpu or cudnn_problem(head_size) or divided,
        "splash": splash_problem(backend) or divided,
    }
    if has_window:
        problems["triton"] = f"model.window of at least the {tokens} tokens of a row"
    if has_cap:
        problems |= dict.fromkeys(("triton", "cudnn"), "model.attention_cap=0")
    if implementation != "auto":
        problem = problems[implementation]
        if problem:
            raise UserError(f"model.attention={implementation!r} needs {problem}")
        return implementation
    # Rows that do not divide would be on every device. A row shorter than a tile would be mostly
    # pads.
    rows_divide = batch % row_shards == 0
    if rows_divide and tokens >= LANES and not problems["splash"]:
        return "splash"
    for name in ("triton", "cudnn"):
        if rows_divide and not problems[name]:
            return name
    return "xla"


def gpu_problem(backend: str, dtype: jnp.dtype) -> str | None:
    """Return what all kernels of GPUs need and lack, or None."""
    if backend != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return f"a GPU and model.dtype='bfloat16', not {backend} and {dtype}"
    return None


def triton_problem(head_size: int) -> str | None:
    """Return which sizes of heads JAX's kernels for GPUs take, or None if this is one."""
    if head_size not in TRITON_HEADS:
        return f"model.head_size={head_size} to be one of {', '.join(map(str, TRITON_HEADS))}"
    return None


def cudnn_problem(head_size: int) -> str | None:
    """Return which sizes of heads cuDNN's kernel takes, or None if this is one."""
    if head_size % 8 or head_size > 128:
        return f"model.head_size={head_size} to be a multiple of 8 and at most 128"
    return None


def splash_problem(backend: str) -> str | None:
    """Return what splash attention needs and lacks, or None if it can run."""
    return None if backend == "tpu" else f"a TPU, not {backend}"


def heads_problem(kv_heads: int, head_shards: int) -> str | None:
    """Return what is wrong if the heads do not divide over their devices."""
    if kv_heads % head_shards:
        return f"mesh.tensor={head_shards} to divide model.kv_heads={kv_heads}"
    return None


def check(model: Model) -> None:
    """Raise UserError if the kernel that the config names can't run on the mesh that is set."""
    shape = (shards().rows, model.max_length, model.heads, model.head_size)
    dtype = jnp.dtype(model.dtype)
    choose(model.attention, platform(), dtype, shape, model.kv_heads, shards())


def cached_attention(
    queries: Float[Array, "batch heads head_size"],
    blocks: Sequence[KeyValues],
    masks: Sequence[Bool[Array, "batch _"]],
    cap: float = 0.0,
) -> Float[Array, "batch heads head_size"]:
    """Attend with one query a row to blocks of a cache, where their masks hold.

    A block has keys and values [batch kv_heads block_tokens head_size], of any type. Only scores
    are joined, because they are small; joining the blocks would copy the cache. A row whose masks
    never hold gets the mean of all values: finite, and never read.
    """
    batch, heads, head_size = queries.shape
    first_keys, _ = blocks[0]
    kv_heads = first_keys.shape[1]
    grouped = queries.reshape(batch, kv_heads, -1, head_size)
    scores = []
    for keys, _ in blocks:
        keys = keys.astype(queries.dtype)
        scores.append(
            jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=jnp.float32)
        )
    mask = jnp.concatenate(masks, axis=1)[:, None, None]
    scaled = jnp.concatenate(scores, axis=-1) * head_size**-0.5
    weights = masked_softmax(soft_cap(scaled, cap), mask).astype(queries.dtype)
    y = jnp.zeros(grouped.shape, queries.dtype)
    first = 0
    for _, values in blocks:
        end = first + values.shape[2]
        block_weights = weights[..., first:end]
        y += jnp.einsum("bkgs,bksh->bkgh", block_weights, values.astype(queries.dtype))
        first = end
    return y.reshape(batch, heads, head_size)
