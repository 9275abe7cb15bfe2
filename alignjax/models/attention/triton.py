"""Flash attention of NVIDIA GPUs over packed rows, by kernels of JAX that Triton compiles.

They compute scores block by block from the segments themselves, so neither a mask nor its gradient
of [batch tokens tokens] exists, as it does for cuDNN, and blocks behind a query are passed over.
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels
from jaxtyping import Array, Float, Int

from alignjax.models.attention.devices import platform
from alignjax.models.attention.plain import padded
from alignjax.models.attention.sharded import over_devices

# The names that JAX gives the kernels -> their products of [tokens tokens]. The backward pass has
# two loops, one for keys and values and one for queries, which compute the scores again.
PRODUCTS = {"mha_forward": 2, "mha_backward": 7}
# Rows are padded to a multiple of this. With these blocks, and 128 queries at a time in the forward
# pass where they divide a row, the kernels keep in an H100's registers all that they need (but for
# 64 bytes, backward with heads of 128; on an A100 that spills 1 KB).
BLOCK = 64
FORWARD_QUERIES = 128


def triton_attention(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Call the kernels, on each device for its rows and heads.

    Other backends interpret them, slowly; the tests run them on a CPU.
    """
    return over_devices(triton_padded, queries, keys, values, segments)


def triton_padded(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Run the kernels on one device, for any number of tokens."""
    return padded(triton_blocks, BLOCK, queries, keys, values, segments)


def triton_blocks(
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Run the kernels on one device; the number of tokens is a multiple of BLOCK.

    They know no groups of queries, so each head gets its own copy of its keys and values.
    """
    tokens, heads, head_size = queries.shape[1:]
    group = heads // keys.shape[2]
    sizes = kernels.BlockSizes(
        block_q=FORWARD_QUERIES if tokens % FORWARD_QUERIES == 0 else BLOCK,
        block_k=BLOCK,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
        block_q_dq=BLOCK,
        block_kv_dq=BLOCK,
    )
    return kernels.mha(
        queries,
        jnp.repeat(keys, group, axis=2),
        jnp.repeat(values, group, axis=2),
        segments,
        sm_scale=head_size**-0.5,
        causal=True,
        block_sizes=sizes,
        interpret=platform() != "gpu",
    )
