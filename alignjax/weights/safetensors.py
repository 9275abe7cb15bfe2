"""The safetensors files of a checkpoint: read lazily by the library, written as a stream.

The library reads: it maps a file, checks its header, and copies out the slices that are asked for.
It can't stream when it writes: it takes all tensors of a file at once, and would hold a whole file
in memory beside the parameters. So `write_tensors` writes the format itself, one tensor at a time:
eight bytes with the header's length, a JSON header, then the bytes of the tensors.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from alignjax.config import Refuse, UserError, refuse

# The format's names for the types of weights. The library finds bfloat16 by its name, which
# `ml_dtypes` has registered with numpy.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FINITE_BLOCK = 2**17  # numbers that are checked at a time, so that they stay in the cache


@dataclass(frozen=True, kw_only=True)
class FloatBits:
    """A type of floats as whole numbers: those that are not finite have all exponent bits set."""

    words: type[np.unsignedinteger]
    exponent: int


FLOAT_BITS = {
    "F32": FloatBits(words=np.uint32, exponent=0x7F800000),
    "F16": FloatBits(words=np.uint16, exponent=0x7C00),
    "BF16": FloatBits(words=np.uint16, exponent=0x7F80),
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a mapped file. Nothing is read from the file until `read`."""

    name: str
    path: Path  # of the file
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    lazy_slice: Any  # the library's handle, which keeps the file mapped

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Copy a part of the tensor, in the file's type; no other part is read.

        The slices must have step 1 and end within the tensor. Raises UserError if a number of the
        part is not finite.
        """
        part = self.lazy_slice[index]
        if not is_finite(part, FLOAT_BITS[self.dtype]):
            count = np.count_nonzero(~np.isfinite(part.astype(np.float32)))
            raise UserError(
                f"{self.path}: {count:,} of {part.size:,} numbers read of tensor {self.name} are "
                "NaN or infinite"
            )
        return part


def is_finite(part: np.ndarray, bits: FloatBits) -> bool:
    """Return whether all numbers are finite; several times faster than converting them."""
    words = np.ascontiguousarray(part).reshape(-1).view(bits.words)
    exponent = bits.words(bits.exponent)
    block = np.empty(min(FINITE_BLOCK, words.size), bits.words)
    for start in range(0, words.size, FINITE_BLOCK):
        numbers = words[start : start + FINITE_BLOCK]
        exponents = np.bitwise_and(numbers, exponent, out=block[: numbers.size])
        if exponents.max() == exponent:
            return False
    return True


class TensorSpec(NamedTuple):
    """The header's entry for a tensor to write; `dtype` is a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def open_tensors(directory: Path, refuse: Refuse = refuse) -> dict[str, StoredTensor]:
    """Map the safetensors files of a checkpoint; return tensor name -> tensor.

    As in transformers, `model.safetensors` comes before an index, which may be an older one.
    Raises UserError for a file that is missing or damaged, and for a tensor that is in two files,
    because only one of them can be meant. If `refuse` does not raise, whatever can be mapped is.
    """
    if (directory / SINGLE_FILE).is_file():
        return open_file(directory / SINGLE_FILE, refuse)
    if not (directory / INDEX).is_file():
        raise UserError(missing_file(directory, SINGLE_FILE))
    file_of = read_index(directory / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        # An index comes from a stranger: no name in it may lead out of the directory.
        if Path(file).name != file or not (directory / file).is_file():
            refuse(missing_file(directory, file))
            continue
        for name, tensor in open_file(directory / file, refuse).items():
            if name in tensors:
                refuse(
                    f"{directory}: tensor {name} is both in {tensors[name].path.name} and in {file}"
                )
            tensors[name] = tensor
    for name, file in file_of.items():
        if name not in tensors and (directory / file).is_file():
            refuse(f"{directory / INDEX}: tensor {name} should be in {file}, but is not")
    return tensors


def missing_file(directory: Path, file: str) -> str:
    """Return the error for a file of weights that is not there."""
    text = f"{directory}: there is no file {file} (pickled .bin files are not read"
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        text += (
            f", and there is {pickles[0]}: load it with transformers and save it with "
            "save_pretrained, which writes safetensors"
        )
    return f"{text})"


def read_index(path: Path) -> Mapping[str, str]:
    """Return tensor name -> file of an index; UserError if it has another form."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    file_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(file_of, dict):
        raise UserError(f"{path}: no weight_map of names to files there")
    for name, file in file_of.items():
        if not isinstance(file, str):
            raise UserError(f"{path}: weight_map.{name}={file!r} must be the name of a file")
    return file_of


def open_file(path: Path, refuse: Refuse = refuse) -> dict[str, StoredTensor]:
    """Map one file; UserError if it is not whole or has a type that weights do not come in."""
    tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                lazy_slice = file.get_slice(name)
                dtype = lazy_slice.get_dtype()
                if dtype not in DTYPES:
                    refuse(
                        f"{path}: tensor {name} is of type {dtype}, one of {sorted(DTYPES)} wanted"
                    )
                tensors[name] = StoredTensor(
                    name=name,
                    path=path,
                    dtype=dtype,
                    shape=tuple(lazy_slice.get_shape()),
                    lazy_slice=lazy_slice,
                )
    except (SafetensorError, OSError) as error:
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
