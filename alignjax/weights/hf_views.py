"""Parameters as they lie in mapped checkpoint files: any part of one reads no other part."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np

from alignjax.weights.hf_layout import FileTensor, Layout, Shape, axis_groups, file_shape_of

READERS = 4  # threads that read the parts of a parameter
Index = tuple[slice, ...]


class Readable(Protocol):
    """A tensor from which a part can be read: `safetensors.StoredTensor`, or `Zeros`."""

    def read(self, index: Index) -> np.ndarray:
        """Return a part of the tensor."""
        ...


class Zeros:
    """Stands for a tensor of zeros that a checkpoint leaves out."""

    def __init__(self, shape: Shape):
        self.array = np.zeros(shape, np.float32)

    def read(self, index: Index) -> np.ndarray:
        """Return zeros in the shape of the part."""
        return self.array[index]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A parameter, or its part in one layer or expert, as rows of a tensor in a file."""

    path: str
    shape: Shape
    tensor: Readable
    first_row: int

    def read(self, index: Index) -> np.ndarray:
        """Return part[index], in the file's type.

        Of the axes that the file joins into one, such as heads and head size, only a cut along the
        first one narrows what is read. Meshes cut no other axis.
        """
        groups = axis_groups(self.path, len(self.shape))
        file_index = [self.file_slice(group, index) for group in groups]
        rows = file_index[0]
        file_index[0] = slice(self.first_row + rows.start, self.first_row + rows.stop)
        array = self.tensor.read(tuple(file_index))
        order = [axis for group in groups for axis in group]
        leading = {group[0] for group in groups}
        sizes = [length(index[i], self.shape[i]) if i in leading else self.shape[i] for i in order]
        array = array.reshape(sizes).transpose(np.argsort(order))
        rest = [slice(None) if i in leading else index[i] for i in range(len(index))]
        return array[tuple(rest)]

    def file_slice(self, group: tuple[int, ...], index: Index) -> slice:
        """Return the slice of a file's axis that covers a slice of the first axis it joins."""
        first = index[group[0]].indices(self.shape[group[0]])
        inner = math.prod(self.shape[axis] for axis in group[1:])
        return slice(first[0] * inner, first[1] * inner)


@dataclass(frozen=True, kw_only=True)
class ParameterView:
    """A whole parameter: one part, or if it is stacked one for each place of its first axes."""

    shape: Shape
    parts: tuple[Part, ...]
    stacked: int  # axes that are stacked

    def read(self, index: Index = ()) -> np.ndarray:
        """Return parameter[index] in float32, where `index` has slices of step 1.

        Parts are read on several threads, and no more than so many of them are in memory beside
        the result.
        """
        index = index + (slice(None),) * (len(self.shape) - len(index))
        sizes = [length(cut, size) for cut, size in zip(index, self.shape, strict=True)]
        result = np.empty(sizes, np.float32)
        rows = result.reshape(-1, *sizes[self.stacked :])
        numbers = np.arange(len(self.parts)).reshape(self.shape[: self.stacked])
        wanted = numbers[index[: self.stacked]].reshape(-1)
        with ThreadPoolExecutor(READERS) as pool:
            read = [
                pool.submit(read_part, row, self.parts[number], index[self.stacked :])
                for row, number in zip(rows, wanted, strict=True)
            ]
        for future in read:
            future.result()  # raises what the reader raised
        return result


def read_part(result: np.ndarray, part: Part, index: Index) -> None:
    """Read part[index] into its row of a parameter."""
    put(result, part.read(index))


def put(result: np.ndarray, array: np.ndarray) -> None:
    """Copy an array into one of float32.

    NumPy holds Python's lock while it converts bfloat16, whose numbers are the upper halves of
    float32's: moved as words, several threads can convert at once.
    """
    if array.dtype == ml_dtypes.bfloat16:
        words = result.view(np.uint32)
        words[...] = array.view(np.uint16)
        words <<= 16
    else:
        result[...] = array


def length(cut: slice, size: int) -> int:
    """Return how many places a slice takes of an axis."""
    return len(range(*cut.indices(size)))


def views_of(layout: Layout, tensors: dict[FileTensor, Readable]) -> dict[str, ParameterView]:
    """Return parameter path -> view, for the parameters that these tensors hold."""
    parts: dict[str, list[Part]] = {}
    stacked = {}
    for tensor, stored in tensors.items():
        row = 0
        for path in tensor.paths:
            shape = layout.part_shape(path, tensor)
            part = Part(path=path, shape=shape, tensor=stored, first_row=row)
            parts.setdefault(path, []).append(part)
            stacked[path] = len(tensor.place)
            row += file_shape_of(path, shape)[0]
    return {
        path: ParameterView(
            shape=layout.shapes[path], parts=tuple(parts[path]), stacked=stacked[path]
        )
        for path in parts
    }
