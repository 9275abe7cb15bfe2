"""The safetensors format, a tensor at a time: its own numpy reader and writer hold whole files in memory.

A file is eight bytes with the header's length, a JSON header, then the bytes of the tensors.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from alignjax.config import UserError

# The format's names of the types that weights come in.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"


def open_tensors(directory: Path) -> dict:
    """Name -> array, mapped from the file and not yet read, of all safetensors of a checkpoint."""
    index = directory / INDEX
    files = ["model.safetensors"]
    if index.is_file():
        try:
            files = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{index}: no weight_map of names to files there ({error!r})"
            ) from error
    tensors = {}
    for file in files:
        # An index is a stranger's text: no name of its may lead out of the directory.
        if Path(file).name != file or not (directory / file).is_file():
            raise UserError(
                f"{directory}: there is no file {file} (pickled .bin files are not read)"
            )
        tensors |= read_tensors(directory / file)
    return tensors


def read_tensors(path: Path) -> dict:
    """Name -> array, mapped from one file; UserError if the file isn't whole."""
    try:
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: tensor {name} is of type {entry['dtype']}, one of {sorted(DTYPES)} wanted"
                )
            tensors[name] = (
                data[start + low : start + high]
                .view(DTYPES[entry["dtype"]])
                .reshape(entry["shape"])
            )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    return tensors


def write_tensors(path: Path, header: dict, tensors) -> int:
    """Write `tensors`, an iterator in the order of header {name: (type, shape)}, one at a time; the bytes of data.

    A tensor is let go before the next is asked for.
    """
    offset, entries = (
        0,
        {"__metadata__": {"format": "pt"}},
    )  # transformers refuses files without a format
    for name, (kind, shape) in header.items():
        end = offset + int(np.prod(shape)) * DTYPES[kind].itemsize
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for kind, _ in header.values():
            file.write(np.ascontiguousarray(next(tensors), DTYPES[kind]).view(np.uint8).data)
    return offset
