"""The mesh, one table of shardings by parameter path, and host batches onto devices."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax import config as configs

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# The first row whose pattern occurs in a path decides. Arrays that stack the layers have a
# leading axis l, which is never split.
TABLE = (
    (r"embed/embedding$", P("tensor", "fsdp")),  # [v d]
    (r"attention/[qkv]/kernel$", P(None, "fsdp", "tensor", None)),  # [l d n h]
    (r"attention/[qkv]/bias$", P(None, "tensor", None)),  # [l n h]
    (r"attention/qkv/kernel$", P(None, "fsdp", "tensor", None, None)),  # [l d k g h], joined
    (r"attention/qkv/bias$", P(None, "tensor", None, None)),  # [l k g h]
    (r"attention/out/kernel$", P(None, "tensor", None, "fsdp")),  # [l n h d]
    (r"(out|down)/bias$", P()),  # [l d]
    (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),  # [l d f]
    (r"mlp/(gate|up)/bias$", P(None, "tensor")),  # [l f]
    (r"mlp/gate_up/kernel$", P(None, "fsdp", "tensor", None)),  # [l d f 2], joined
    (r"mlp/gate_up/bias$", P(None, "tensor", None)),  # [l f 2], joined
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),  # [l f d]
    (r"experts/router/kernel$", P(None, "fsdp", None)),  # [l d e]
    (r"experts/(gate|up)/kernel$", P(None, "fsdp", None, "tensor")),  # [l e d f]
    (r"experts/down/kernel$", P(None, "fsdp", "tensor", None)),  # [l e f d]
    (r"attention/[qkv]/lora_a$", P(None, "fsdp", None)),  # [l d r]
    (r"attention/[qkv]/lora_b$", P(None, None, "tensor", None)),  # [l r n h]
    (r"attention/out/lora_a$", P(None, "tensor", None, None)),  # [l n h r]
    (r"mlp/(gate|up)/lora_a$", P(None, "fsdp", None)),  # [l d r]
    (r"mlp/(gate|up)/lora_b$", P(None, None, "tensor")),  # [l r f]
    (r"mlp/down/lora_a$", P(None, "tensor", None)),  # [l f r]
    (r"(attention/out|mlp/down)/lora_b$", P(None, None, "fsdp")),  # [l r d]
    (r"lora_scale$", P()),  # [l]
    (r"(norm|norm1|norm2|q_norm|k_norm)/scale$", P()),
    (r"(^|/)head/kernel$", P("fsdp", "tensor")),  # [d v], or [d 1] of a scalar head
    (r"(^|/)head/bias$", P()),
)

Tree = Any  # a tree of arrays or of their shapes


def make_mesh(mesh: configs.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh over all devices, or over `devices`.

    An axis of size -1 takes the devices that the other axes leave.
    """
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    count = jax.device_count() if devices is None else len(devices)
    fixed = int(np.prod([size for size in sizes if size != -1]))
    valid = (
        sizes.count(-1) <= 1
        and min(sizes) >= -1
        and 0 not in sizes
        and count % fixed == 0
        and (-1 in sizes or fixed == count)
    )
    if not valid:
        raise configs.UserError(
            f"mesh.data={sizes[0]} x mesh.fsdp={sizes[1]} x mesh.tensor={sizes[2]} "
            f"must make {count} devices"
        )
    sizes = [count // fixed if size == -1 else size for size in sizes]
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices)


def with_tensor(mesh: Mesh, tensor: int) -> Mesh:
    """Lay out the devices of `mesh` anew, in the same order, without fsdp.

    `tensor` of them go along the axis tensor and the others along data; 0 returns `mesh`.
    """
    if not tensor:
        return mesh
    if mesh.size % tensor:
        raise configs.UserError(f"ppo.rollout_tensor={tensor} must divide the {mesh.size} devices")
    devices = mesh.devices.reshape(-1, 1, tensor)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def path_name(path: tuple) -> str:
    """Return a path of `jax.tree_util` as text, such as "layers/norm1/scale"."""
    return "/".join(key_name(key) for key in path)


def key_name(key: Any) -> str:
    """Return one step of a path: a dictionary's key, an attribute's name or an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def constrain(tree: Tree, axis: int = 0, tensor: int | None = None) -> Tree:
    """Shard the rows of each array over data and fsdp; for use inside jit.

    `axis` holds the rows. `tensor` is the axis of heads or words, which is sharded over the
    mesh axis tensor. Arrays stay as they are where no mesh is set or the rows don't divide, and
    the axis `tensor` where it doesn't divide. Without this, GSPMD would replicate the results
    of an embedding or a gather.
    """

    def constrain_one(x: jax.Array) -> jax.Array:
        spec = spec_of(x.shape, axis, tensor)
        return x if spec is None else jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(constrain_one, tree)


def spec_of(shape: Sequence[int], axis: int = 0, tensor: int | None = None) -> P | None:
    """Return how `constrain` shards an array of the mesh that is set, None if it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "fsdp" not in mesh.axis_names or shape[axis] % row_shards(mesh):
        return None
    spec: list[Any] = [None] * len(shape)
    spec[axis] = BATCH[0]
    if tensor is not None and shape[tensor] % mesh.shape["tensor"] == 0:
        spec[tensor] = "tensor"
    return P(*spec)


def on_host(x: jax.Array) -> np.ndarray:
    """Return the whole of a global array as a host array, in every process."""
    if jax.process_count() > 1:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def abstract(tree: Tree, mesh: Mesh) -> Tree:
    """Return the shapes, types and shardings of parameters or optimiser state.

    This is what restoring a checkpoint needs.
    """
    return jax.tree.map(abstract_array, tree, param_shardings(tree, mesh))


def abstract_array(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return the shape and type of one array, with its sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def param_shardings(params: Tree, mesh: Mesh) -> Tree:
    """Return the sharding of each array of parameters or optimiser state.

    Raises ValueError for a path that no row of TABLE matches. A mesh axis that does not divide
    a dimension is dropped for that array: three key-value heads over two devices, for example.
    """

    def sharding_of(path: tuple, x: Any) -> NamedSharding:
        if x.ndim == 0:
            return replicated(mesh)
        row = table_row(path_name(path), x.shape)
        axes = [
            axis if axis is None or x.shape[dimension] % mesh.shape[axis] == 0 else None
            for dimension, axis in enumerate(row)
        ]
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(sharding_of, params)


def table_row(name: str, shape: Sequence[int]) -> P:
    """Return the row of TABLE for a parameter; in a list of layers it has no axis of layers."""
    for pattern, spec in TABLE:
        if re.search(pattern, name):
            return P(*spec[1:]) if re.search(r"layers/\d+/", name) else spec
    raise ValueError(f"no row of alignjax.machine.sharding.TABLE matches parameter {name} {shape}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts the whole of an array on every device."""
    return NamedSharding(mesh, P())


def row_shards(mesh: Mesh) -> int:
    """Return the number of parts into which a mesh splits the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_layout(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return the sharding of rows over data and fsdp.

    Rows that the axes don't divide are replicated, which is correct, and no slower for the
    small arrays where this happens.
    """
    if shape and shape[0] % row_shards(mesh) == 0:
        return NamedSharding(mesh, BATCH)
    return replicated(mesh)


def abstract_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Return the shapes, types and shardings of the result of `shard_batch`."""
    return jax.tree.map(lambda x: abstract_array(x, row_layout(x.shape, mesh)), batch)


def distinct_leaves(tree: Tree) -> list[Any]:
    """Return the leaves of a tree, those that are one object once."""
    return list({id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Turn host arrays into global arrays, laid out by `row_layout`.

    The host arrays are whole and equal in every process; each device takes its own part.
    """

    def shard_one(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(
            x.shape, row_layout(x.shape, mesh), lambda index: x[index]
        )

    return jax.tree.map(shard_one, batch)
