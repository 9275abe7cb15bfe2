"""The devices that the mesh which is set stands for."""

from typing import NamedTuple

import jax


class Shards(NamedTuple):
    """The number of devices that rows are spread over, and heads."""

    rows: int
    heads: int


ONE_DEVICE = Shards(rows=1, heads=1)


def platform() -> str:
    """Return the platform of the mesh that is set, or of this machine if none is.

    The mesh's devices need not be on this machine: the TPU compiler runs anywhere.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def shards() -> Shards:
    """Return how the mesh that is set spreads rows and heads; one device if none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.axis_names:
        return ONE_DEVICE
    return Shards(rows=mesh.shape["data"] * mesh.shape["fsdp"], heads=mesh.shape["tensor"])
