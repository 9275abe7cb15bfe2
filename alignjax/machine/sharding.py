"""The mesh, one table of path -> PartitionSpec for parameters and optimiser state, and host batches onto devices."""

import re

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax import config as configs

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# The first row whose pattern is found in a path decides. Layer-stacked arrays lead with [l], which is never cut.
TABLE = (
    (r"embed/embedding$", P("tensor", "fsdp")),  # [v d]
    (r"attention/[qkv]/kernel$", P(None, "fsdp", "tensor", None)),  # [l d n h]
    (r"attention/[qkv]/bias$", P(None, "tensor", None)),  # [l n h]
    (r"attention/out/kernel$", P(None, "tensor", None, "fsdp")),  # [l n h d]
    (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),  # [l d f]
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),  # [l f d]
    (r"(norm|norm1|norm2|q_norm|k_norm)/scale$", P()),
    (r"(^|/)head/kernel$", P("fsdp", "tensor")),  # [d v], or [d 1] of a scalar head
    (r"(^|/)head/bias$", P()),
)


def make_mesh(mesh: configs.Mesh, these=None) -> jax.sharding.Mesh:
    """A mesh over all devices, or over `these`; an axis of -1 takes what the others leave."""
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    devices = jax.device_count() if these is None else len(these)
    fixed = int(np.prod([s for s in sizes if s != -1]))
    if (
        sizes.count(-1) > 1
        or min(sizes) < -1
        or 0 in sizes
        or devices % fixed
        or (-1 not in sizes and fixed != devices)
    ):
        raise configs.UserError(
            f"mesh.data={sizes[0]} x mesh.fsdp={sizes[1]} x mesh.tensor={sizes[2]} must make {devices} devices"
        )
    sizes = [devices // fixed if s == -1 else s for s in sizes]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=these)


def with_tensor(mesh, tensor: int) -> jax.sharding.Mesh:
    """A mesh of the same devices in the same order, `tensor` of them along tensor and the others along data; 0: `mesh`."""
    if not tensor:
        return mesh
    if mesh.size % tensor:
        raise configs.UserError(f"ppo.rollout_tensor={tensor} must divide the {mesh.size} devices")
    return jax.sharding.Mesh(
        mesh.devices.reshape(-1, 1, tensor), AXES, axis_types=(AxisType.Auto,) * 3
    )


def path_name(path) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def constrain(tree, axis: int = 0, tensor: int | None = None):
    """Inside jit: the rows of each array (its `axis`) over data and fsdp, where a mesh is set and they divide; and the axis
    `tensor`, of heads or words, over tensor, where that divides too.

    GSPMD would else replicate what comes out of an embedding or a gather.
    """

    def one(x):
        spec = spec_of(x.shape, axis, tensor)
        return x if spec is None else jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(one, tree)


def spec_of(shape, axis: int = 0, tensor: int | None = None) -> P | None:
    """How `constrain` lays out an array of the mesh that is set; None if it leaves that open."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "fsdp" not in mesh.axis_names or shape[axis] % row_shards(mesh):
        return None
    spec = [None] * len(shape)
    spec[axis] = BATCH[0]
    if tensor is not None and shape[tensor] % mesh.shape["tensor"] == 0:
        spec[tensor] = "tensor"
    return P(*spec)


def on_host(x) -> np.ndarray:
    """The whole of a global array, in every process."""
    return np.asarray(
        multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else x
    )


def abstract(tree, mesh):
    """Shapes and types of parameters or optimiser state, with their shardings: what a restore takes."""
    shardings = param_shardings(tree, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def param_shardings(params, mesh):
    """The sharding of each parameter or optimiser state (arrays or shapes); a path without a row in TABLE is an error.

    An axis that does not divide its dimension is dropped for that array (three key-value heads over two devices).
    """

    def of(path, x):
        name = path_name(path)
        if x.ndim == 0:
            return replicated(mesh)
        row = next((spec for pattern, spec in TABLE if re.search(pattern, name)), None)
        if row is None:
            raise ValueError(
                f"no row of alignjax.sharding.TABLE matches parameter {name} {x.shape}"
            )
        spec = [
            a if a is None or x.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(row)
        ]
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(of, params)


def replicated(mesh):
    return NamedSharding(mesh, P())


def row_shards(mesh) -> int:
    """The number of devices that rows lie over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_layout(shape, mesh) -> NamedSharding:
    """Rows over data and fsdp; where the axes don't divide them they are replicated: right, and no slower for the small
    arrays where this happens."""
    return (
        NamedSharding(mesh, BATCH)
        if shape and shape[0] % row_shards(mesh) == 0
        else replicated(mesh)
    )


def abstract_batch(batch, mesh):
    """The shapes, types and shardings of what `shard_batch` makes."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_layout(x.shape, mesh)), batch
    )


def shard_batch(batch, mesh):
    """Host arrays, the same in every process -> global arrays, laid out by `row_layout`; each device takes its part."""

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(
            x.shape, row_layout(x.shape, mesh), lambda index: x[index]
        )

    return jax.tree.map(put, batch)
