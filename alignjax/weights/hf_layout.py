"""Where a model's parameters are in the tensors of a Hugging Face checkpoint, and back.

In a file a kernel is [outputs inputs] and a bias has one axis; heads and head size are one axis.
Several parameters may be parts of one tensor, along its first axis. The layers of a parameter that
is stacked here are tensors of their own there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from alignjax.config import Model, UserError
from alignjax.machine.sharding import path_name
from alignjax.models import families, transformer

Shape = tuple[int, ...]


class FileTensor(NamedTuple):
    """A tensor of the files. Its parts are the parameters `paths`, or one layer of them."""

    name: str
    paths: tuple[str, ...]
    layer: int | None  # None if the parameters are not stacked

    @property
    def module(self) -> str:
        """Return the name of the module that has the tensor as its weight or bias."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All parameters of a model, and the tensors that hold them.

    Tensors of the same parameters follow each other, from the first layer to the last.
    """

    shapes: Mapping[str, Shape]  # by path
    tensors: Sequence[FileTensor]

    def part_shape(self, path: str, layer: int | None) -> Shape:
        """Return the shape of a parameter, or of its part in one layer."""
        shape = self.shapes[path]
        return shape if layer is None else shape[1:]

    def file_rows(self, path: str, layer: int | None) -> int:
        """Return how many rows a parameter, or its part in one layer, has in its tensor."""
        return file_shape_of(path, self.part_shape(path, layer))[0]

    def file_shape(self, tensor: FileTensor) -> Shape:
        """Return the shape that a tensor has in the file."""
        parts = [file_shape_of(path, self.part_shape(path, tensor.layer)) for path in tensor.paths]
        rows = sum(part[0] for part in parts)
        return (rows,) + parts[0][1:]


def layout_of(model: Model, head: str) -> Layout:
    """Return the layout of a model with a head, "lm" or "scalar".

    Raises UserError if the model has other parameters than its family.
    """
    tree = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), head))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    names = families.weight_names(model, head)
    if set(names) != set(shapes):
        raise UserError(
            f"model.family={model.family!r} and the config differ on "
            f"{sorted(set(names) ^ set(shapes))}: {flags_text(model)}"
        )
    paths_of: dict[str, list[str]] = {}
    for path, name in names.items():
        paths_of.setdefault(name, []).append(path)
    tensors = []
    for name, paths in paths_of.items():
        layers = range(model.layers) if "{}" in name else [None]
        tensors += [FileTensor(name.format(layer), tuple(paths), layer) for layer in layers]
    return Layout(shapes=shapes, tensors=tensors)


def kernel_tensors(layout: Layout) -> list[FileTensor]:
    """Return the tensors of the products within layers, which may have adapters."""
    return [
        tensor
        for tensor in layout.tensors
        if tensor.layer is not None and tensor.paths[0].endswith("kernel")
    ]


def flags_text(model: Model) -> str:
    """Say which values the family's flags must have."""
    flags = families.FAMILIES[model.family].flags
    fields = ", ".join(f"model.{field}" for field in flags)
    return f"{fields} must be {tuple(flags.values())}"


def axis_groups(path: str, rank: int) -> list[tuple[int, ...]]:
    """Return, for each axis of the file's tensor, the axes of the parameter that it joins."""
    axes = tuple(range(rank))
    if path.endswith("kernel"):
        # Only the attention's output kernel has two input axes: [heads head_size d_model].
        inputs = 2 if "out/" in path else 1
        return [axes[inputs:], axes[:inputs]]
    if path.endswith("bias"):
        return [axes]
    return [(axis,) for axis in axes]


def file_shape_of(path: str, shape: Shape) -> Shape:
    """Return the shape that a parameter, or its part in one layer, has in the file."""
    groups = axis_groups(path, len(shape))
    return tuple(math.prod(shape[axis] for axis in group) for group in groups)


def to_file(path: str, part: np.ndarray) -> np.ndarray:
    """Return a parameter, or its part in one layer, as the file has it."""
    groups = axis_groups(path, part.ndim)
    order = [axis for group in groups for axis in group]
    return part.transpose(order).reshape(file_shape_of(path, part.shape))


def join_parts(paths: Sequence[str], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the file's tensor that is made of these parameters, or of their parts in one layer."""
    matrices = [to_file(path, part) for path, part in zip(paths, parts, strict=True)]
    return np.concatenate(matrices) if len(matrices) > 1 else matrices[0]
