"""A model on the hub without its weights: small files, and the headers of large ones.

The headers go into files that are as large as those of the hub and have no data, which takes no
space on disk. So whatever reads headers reads them here as it does in a directory.
"""

import contextlib
import fnmatch
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub

from alignjax.config import UserError, reason_of
from alignjax.weights import locations
from alignjax.weights.safetensors import INDEX, SINGLE_FILE, read_index

WEIGHTS = "*.safetensors"


@contextlib.contextmanager
def model_directory(spec: str) -> Iterator[Path]:
    """Give the directory of a model; of one on the hub, without its weights.

    A model whose weights are in the hub's cache, or that has an adapter, is taken as it is.
    """
    match = locations.HUB_NAME.fullmatch(spec)
    if match is None:
        yield locations.local_directory(spec)
        return
    snapshot = locations.local_directory(spec, weights=False)
    if locations.adapted_model(snapshot) is not None:
        yield locations.local_directory(spec)
        return
    if has_weights(snapshot):
        yield snapshot
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for path in snapshot.iterdir():
            (directory / path.name).symlink_to(path.absolute())
        write_headers(spec, match["name"], match["revision"], directory)
        yield directory


def has_weights(snapshot: Path) -> bool:
    """Return whether a directory has all files of the weights."""
    if (snapshot / SINGLE_FILE).is_file():
        return True
    if not (snapshot / INDEX).is_file():
        return False
    return all((snapshot / file).is_file() for file in read_index(snapshot / INDEX).values())


def write_headers(spec: str, name: str, revision: str | None, directory: Path) -> None:
    """Write the index and the headers of a model's weights into a directory.

    Raises UserError if the hub cannot be asked.
    """
    try:
        api = huggingface_hub.HfApi()
        files = api.list_repo_files(name, revision=revision)
        if INDEX in files and not (directory / INDEX).exists():
            index = huggingface_hub.hf_hub_download(name, INDEX, revision=revision)
            (directory / INDEX).symlink_to(index)
        for file in files:
            if is_weights(file):
                write_header(directory / file, api, name, revision)
    except UserError:
        raise
    except Exception as error:  # The hub, its client and the network raise many types.
        raise UserError(
            f"{spec}: the headers of its weights cannot be read "
            f"({type(error).__name__}: {reason_of(error, 200)})"
        ) from error


def is_weights(file: str) -> bool:
    """Return whether loading would download a file of weights."""
    patterns = [pattern for pattern in locations.HUB_FILES if fnmatch.fnmatch(pattern, WEIGHTS)]
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def write_header(path: Path, api: huggingface_hub.HfApi, name: str, revision: str | None) -> None:
    """Write the header of a file on the hub, and a hole in the place of its data."""
    metadata = api.parse_safetensors_file_metadata(name, path.name, revision=revision)
    header = {
        tensor: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": list(entry.data_offsets),
        }
        for tensor, entry in metadata.tensors.items()
    }
    text = json.dumps(header).encode()
    end = max((entry.data_offsets[1] for entry in metadata.tensors.values()), default=0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
