"""Attention kernels over a mesh: XLA cannot partition a kernel."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from alignjax.machine.sharding import BATCH
from alignjax.models.attention.devices import ONE_DEVICE, shards


def over_devices(
    attend: Callable[[Array, Array, Array, Array], Array],
    queries: Float[Array, "batch tokens heads head_size"],
    keys: Float[Array, "batch tokens kv_heads head_size"],
    values: Float[Array, "batch tokens kv_heads head_size"],
    segments: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_size"]:
    """Attend on each device of the mesh that is set, to its own rows and heads.

    Heads must divide over the devices; rows that do not divide are on every device, as in
    `sharding.constrain`.
    """
    devices = shards()
    if devices == ONE_DEVICE:
        return attend(queries, keys, values, segments)
    rows = BATCH[0] if queries.shape[0] % devices.rows == 0 else None
    heads = P(rows, None, "tensor", None)
    # check_vma: a Pallas call does not say over which axes its results vary.
    attend_on_each = jax.shard_map(
        attend, in_specs=(heads, heads, heads, P(rows)), out_specs=heads, check_vma=False
    )
    return attend_on_each(queries, keys, values, segments)
