"""Where a model's parameters are in the tensors of a Hugging Face checkpoint, and back.

In a file a kernel is [outputs inputs] and a bias has one axis; heads and head size are one axis.
Several parameters may be parts of one tensor, along its first axis. The layers of a parameter that
is stacked here are tensors of their own there, and so are the experts of a layer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from alignjax.config import LORA_TARGETS, Model, UserError
from alignjax.machine.sharding import path_name
from alignjax.models import families, transformer

Shape = tuple[int, ...]


class FileTensor(NamedTuple):
    """A tensor of the files. Its parts are the parameters `paths`, or what they have at `place`."""

    name: str
    paths: tuple[str, ...]
    place: tuple[int, ...]  # of a layer, or of an expert of a layer; () without layers

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

    def part_shape(self, path: str, tensor: FileTensor) -> Shape:
        """Return the shape of what a parameter has in a tensor."""
        return self.shapes[path][len(tensor.place) :]

    def file_rows(self, path: str, tensor: FileTensor) -> int:
        """Return how many rows of a tensor are a parameter's."""
        return file_shape_of(path, self.part_shape(path, tensor))[0]

    def file_shape(self, tensor: FileTensor) -> Shape:
        """Return the shape that a tensor has in the file."""
        parts = [file_shape_of(path, self.part_shape(path, tensor)) for path in tensor.paths]
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
    if bool(model.experts) != any("/experts/" in path for path in names):
        raise UserError(
            f"model.experts={model.experts} does not go with model.family={model.family!r}"
        )
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
        stacked = shapes[paths[0]][: name.count("{}")]
        places = np.ndindex(stacked)
        tensors += [FileTensor(name.format(*place), tuple(paths), place) for place in places]
    return Layout(shapes=shapes, tensors=tensors)


def kernel_tensors(layout: Layout) -> list[FileTensor]:
    """Return the tensors of the products within layers that may have adapters."""
    parts = "|".join(set(LORA_TARGETS.values()))
    kernel = re.compile(rf"layers/({parts})/\w+/kernel")
    return [tensor for tensor in layout.tensors if kernel.fullmatch(tensor.paths[0])]


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
    """Return the shape that a part of a parameter has in the file."""
    groups = axis_groups(path, len(shape))
    return tuple(math.prod(shape[axis] for axis in group) for group in groups)


def to_file(path: str, part: np.ndarray) -> np.ndarray:
    """Return a part of a parameter as the file has it."""
    groups = axis_groups(path, part.ndim)
    order = [axis for group in groups for axis in group]
    return part.transpose(order).reshape(file_shape_of(path, part.shape))


def join_parts(paths: Sequence[str], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the file's tensor that is made of these parts of parameters."""
    matrices = [to_file(path, part) for path, part in zip(paths, parts, strict=True)]
    return np.concatenate(matrices) if len(matrices) > 1 else matrices[0]
