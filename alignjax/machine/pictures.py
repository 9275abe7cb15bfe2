"""Pictures of matplotlib as files, with a mark by which they are known to be ours."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from alignjax.machine import outputs

SOFTWARE = "alignjax"  # in a picture's metadata


def write_picture(path: Path, picture: Figure, dpi: int) -> None:
    """Write a picture as PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.savefig(buffer, dpi=dpi, format="png", metadata={"Software": SOFTWARE})
    outputs.write_bytes(path, buffer.getvalue())


def is_picture(path: Path, record: Path, keys: frozenset[str]) -> bool:
    """Return whether a file is a picture that `write_picture` has written.

    Older versions left no mark; theirs is one of matplotlib beside a `record` with these keys.
    """
    if outputs.begins_with(path, SOFTWARE.encode()):
        return True
    return outputs.begins_with(path, b"Matplotlib") and outputs.has_keys(record, keys)
