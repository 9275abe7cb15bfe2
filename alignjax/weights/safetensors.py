"""The safetensors files of a checkpoint: read lazily by the library, written as a stream.

The library reads: it maps a file, checks its header, and copies out the slices that are asked for.
It can't stream when it writes: it takes all tensors of a file at once, and would hold a whole file
in memory beside the parameters. So `write_tensors` writes the format itself, one tensor at a time:
eight bytes with the header's length, a JSON header, then the bytes of the tensors.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from alignjax.config import UserError

# The format's names for the types of weights. The library finds bfloat16 by its name, which
# `ml_dtypes` has registered with numpy.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a mapped file. Nothing is read from the file until `read`."""

    shape: tuple[int, ...]
    lazy_slice: Any  # the library's handle, which keeps the file mapped

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Copy a part of the tensor, in the file's type; no other part is read.

        The slices must have step 1 and end within the tensor.
        """
        return self.lazy_slice[index]


class TensorSpec(NamedTuple):
    """The header's entry for a tensor to write; `dtype` is a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Map all safetensors files of a checkpoint; return tensor name -> tensor.

    Raises UserError for a file that is missing or damaged.
    """
    tensors = {}
    for file in file_names(directory):
        # An index comes from a stranger: no name in it may lead out of the directory.
        if Path(file).name != file or not (directory / file).is_file():
            raise UserError(
                f"{directory}: there is no file {file} (pickled .bin files are not read)"
            )
        tensors |= open_file(directory / file)
    return tensors


def file_names(directory: Path) -> list[str]:
    """Return the names of a checkpoint's files: those of its index, or of a single file."""
    index = directory / INDEX
    if not index.is_file():
        return [SINGLE_FILE]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: no weight_map of names to files there ({error!r})") from error


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Map one file; UserError if it is not whole or has a type that weights do not come in."""
    tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                lazy_slice = file.get_slice(name)
                dtype = lazy_slice.get_dtype()
                if dtype not in DTYPES:
                    raise UserError(
                        f"{path}: tensor {name} is of type {dtype}, one of {sorted(DTYPES)} wanted"
                    )
                shape = tuple(lazy_slice.get_shape())
                tensors[name] = StoredTensor(shape=shape, lazy_slice=lazy_slice)
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    return tensors


def write_tensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterator[np.ndarray]) -> int:
    """Write one file and return the bytes of its tensors, which come in the order of `specs`.

    Each tensor is let go before the next is taken from the iterator.
    """
    # transformers refuses files without a format.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            file.write(tensor_bytes(next(tensors), spec))
    return offset


def tensor_bytes(tensor: np.ndarray, spec: TensorSpec) -> memoryview:
    """Return a tensor's bytes in the file's type."""
    return np.ascontiguousarray(tensor, DTYPES[spec.dtype]).view(np.uint8).data
