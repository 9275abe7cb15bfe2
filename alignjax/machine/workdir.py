"""Run directories, local or at gs://BUCKET/... through Orbax's file layer, etils.epath.

A local directory is a `Path`, and files are written in place. An object in a bucket can be
neither appended to nor renamed, so files that grow are kept in a temporary local directory, and
copied to the bucket whenever a resume would need them.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from alignjax.config import UserError
from alignjax.machine.outputs import is_local
from alignjax.machine.outputs import write_text as write_atomically

__all__ = [
    "check_files",
    "is_local",
    "local_copy",
    "publish",
    "resolve",
    "staging",
    "write_atomically",
]

# Endings of the files that a run or a model directory has.
FILE_TYPES = (".json", ".jsonl", ".jinja", ".safetensors", ".model", ".txt")


def resolve(spec: str | Path) -> Path:
    """Return the directory that `spec` names, or raise UserError if it cannot be reached.

    The result is a `Path`, or an `epath.Path`, which behaves like one, for gs://BUCKET/...
    """
    if "://" not in str(spec):
        return Path(spec)
    if not str(spec).startswith("gs://"):
        raise UserError(f"{spec}: expected a directory or gs://BUCKET/...")
    try:
        epath.Path(spec).exists()
    except Exception as error:  # gcsfs, its absence and the network raise many types.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{spec}: can't be reached ({type(error).__name__}: {reason}); a bucket needs gcsfs "
            "(the extra [gcs]) and the rights of gcloud auth application-default login"
        ) from error
    return epath.Path(spec)


def check_files(directory: Path) -> None:
    """Raise UserError if something that is no file has the name of a run's or a model's file.

    Opening a FIFO would wait for ever, and a device has no end.
    """
    if not is_local(directory) or not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.suffix in FILE_TYPES and path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "a pipe or a device"
            raise UserError(f"{path}: expected a file, found {kind}")


@contextlib.contextmanager
def local_copy(directory: Path, pattern: str = "*") -> Iterator[Path]:
    """Yield a local directory with the files of `directory` that match `pattern`.

    That is `directory` itself if it is local, else a copy that is deleted at the end.
    """
    if is_local(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="alignjax-") as temporary:
        copy = Path(temporary)
        if directory.exists():
            for file in directory.glob(pattern):
                if file.is_file():
                    file.copy(copy / file.name)
        yield copy


@dataclasses.dataclass(frozen=True)
class Staging:
    """A local directory in which the files of another directory are written."""

    local: Path
    target: Path

    def publish(self) -> None:
        """Copy all files to the target, in the first process; do nothing if it is local."""
        publish(self.local, self.target)


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Staging]:
    """Yield a `Staging` for a directory, and publish it at the end.

    If the directory is in a bucket, the local one starts with a copy of its JSON lines.
    """
    with local_copy(directory, "*.jsonl") as local:
        staged = Staging(local, directory)
        try:
            yield staged
        finally:
            staged.publish()


def publish(local: Path, target: Path) -> None:
    """Copy all files below `local` to `target` if they differ, in the first process."""
    if local == target or jax.process_index() != 0:
        return
    for file in sorted(local.rglob("*")):
        if file.is_file():
            destination = target / file.relative_to(local).as_posix()
            epath.Path(file).copy(destination, overwrite=True)
