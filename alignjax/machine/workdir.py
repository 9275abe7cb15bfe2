"""Where a run's files are: a local directory, or gs://BUCKET/... through Orbax's own file layer (etils.epath).

A local directory is a `Path`, and everything is done in place. An object can be neither appended to nor renamed: files that
grow are kept in a temporary directory, and copied to the bucket at the points up to which a resume needs them.
"""

import contextlib
import tempfile
from pathlib import Path

import jax
from etils import epath

from alignjax.config import UserError


def place(spec) -> Path:
    """A directory by its name: a `Path`, or what behaves as one if the name begins with gs://."""
    if "://" not in str(spec):
        return Path(spec)
    if not str(spec).startswith("gs://"):
        raise UserError(f"{spec}: a directory or gs://BUCKET/... wanted")
    try:
        epath.Path(spec).exists()
    except Exception as error:  # whatever gcsfs, its absence, or the network below it raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{spec}: can't be reached ({type(error).__name__}: {reason}); it takes gcsfs "
            "(the extra [gcs]) and the rights of gcloud auth application-default login"
        ) from error
    return epath.Path(spec)


def is_local(directory) -> bool:
    return isinstance(directory, Path)


@contextlib.contextmanager
def fetched(directory, pattern: str = "*"):
    """A local directory with the files of this one: itself, or a copy that lasts as long as the context."""
    if is_local(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="alignjax-") as local:
        for file in directory.glob(pattern) if directory.exists() else ():
            if file.is_file():
                file.copy(Path(local) / file.name)
        yield Path(local)


@contextlib.contextmanager
def staged(directory):
    """(local directory, send) to write a directory's files in: itself, or one that begins with its JSON lines.

    send() copies all files to where they belong, as does the end of the context; of the first process only.
    """
    with fetched(directory, "*.jsonl") as local:

        def send():
            copy(local, directory)

        try:
            yield local, send
        finally:
            send()


def copy(local: Path, directory) -> None:
    """Copy the files at and below a local directory, unless it is the other one; by the first process only."""
    if local != directory and jax.process_index() == 0:
        for file in sorted(local.rglob("*")):
            if file.is_file():
                epath.Path(file).copy(
                    directory / file.relative_to(local).as_posix(), overwrite=True
                )


def write(path: Path, text: str) -> None:
    """Write a small file at once or not at all, as an object of a bucket always is."""
    if not is_local(path):
        path.write_text(text + "\n")
        return
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
