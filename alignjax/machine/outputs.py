"""Files that commands write: whole or not at all, and never over a file that is not ours.

A file is written beside its place under a temporary name, which is unique, and then renamed. A
process that is killed leaves such a file behind; it held a lock on it, so that `remove_leftovers`
can tell it from the files of processes that are still alive.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from alignjax.config import UserError
from alignjax.machine import marker

# Errors of a disk that is full, over its quota, failing, read-only or not ours to write.
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)
# How errors of Rust libraries and of TensorStore name the system's error code.
OS_ERROR = re.compile(r"\(os error (\d+)\)|os_error_code='(\d+)'")
TEMPORARY = re.compile(r"\..*\.alignjax-[0-9a-f]{16}\.partial", re.DOTALL)
KEPT_OF_NAME = 100  # characters of a file's name in its temporary name: a name has at most 255
KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
BEGINNING = 4096  # bytes of a file that are enough to recognise it


def is_local(path: Path) -> bool:
    """Return whether a path is on this machine and not in a bucket."""
    return isinstance(path, Path)


class Unwritable(UserError):
    """A file that cannot be written; the message names it and the system's reason."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the body, which only writes `path`, into an `Unwritable` that names it."""
    try:
        yield
    except Unwritable:
        raise
    except Exception as error:  # Libraries have types of their own for an error of the disk.
        reason = disk_problem(error)
        if not reason and isinstance(error, OSError):
            reason = error.strerror or str(error)
        if not reason:
            raise
        raise Unwritable(f"{path}: {reason}") from error


def disk_problem(error: Exception) -> str:
    """Return the system's text for an error of an unwritable disk, "" for other errors.

    The error may come from Python or from a library.
    """
    code = getattr(error, "errno", None)
    if not code:
        match = OS_ERROR.search(str(error))
        code = int(match[1] or match[2]) if match else None
    return os.strerror(code) if code in UNWRITABLE else ""


# ------------------------------------------------------------------------------------- temporary


def temporary_beside(path: Path) -> Path:
    """Return a path in the directory of `path` that no file has, and that only we use."""
    name = path.name.encode()[:KEPT_OF_NAME].decode(errors="ignore")
    return path.with_name(f".{name}.alignjax-{secrets.token_hex(8)}.partial")


def hold(descriptor: int) -> None:
    """Lock an open file or directory, which says that its process is alive."""
    with contextlib.suppress(OSError):  # Some file systems have no locks.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces the local file `path` at the end of the body.

    After an error in the body nothing has changed. Raises `Unwritable` if the disk refuses.
    """
    temporary = temporary_beside(path)
    with writing(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                hold(descriptor)
                yield file
                file.flush()
                os.fsync(descriptor)
                temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all; an object in a bucket is always written that way."""
    if is_local(path):
        with new_file(path) as file:
            file.write(data)
    else:
        path.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a small text in UTF-8, with a newline at its end, whole or not at all."""
    write_bytes(path, f"{text}\n".encode())


def free_path(path: Path) -> Path:
    """Return `path`, or with a number at the end of its stem the first path that does not exist."""
    candidate = path
    number = 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def is_temporary(path: Path) -> bool:
    """Return whether a path is a temporary file of ours, in use, left over, or just gone."""
    return bool(TEMPORARY.fullmatch(path.name)) and not path.is_symlink()


def is_leftover(path: Path) -> bool:
    """Return whether a path is a temporary file of ours whose process has ended."""
    if not is_temporary(path):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:  # In use, gone, or on a file system without locks, where nothing is known.
        return False
    return True


def remove_leftovers(directory: Path, name: str = "") -> None:
    """Remove temporary files in a directory that killed processes of ours have left.

    With a `name`, only those that were to become this file or directory of it.
    """
    beginning = f".{name[:KEPT_OF_NAME]}." if name else "."
    with contextlib.suppress(OSError):
        for path in list(directory.iterdir()):
            if path.name.startswith(beginning) and is_leftover(path):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------- one file


def check_file(
    path: Path,
    option: str,
    *,
    is_own: Callable[[Path], bool],
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    make_parents: bool = False,
) -> None:
    """Check that a command may write its result to `path`, before it begins to work.

    Args:
      path: of the file.
      option: how the command line names it, such as "--out".
      is_own: whether an existing file is an earlier result of the same command.
      overwrite: replace a file that is not.
      inputs: what the command reads.
      make_parents: whether the command makes the directory of the file, too.

    Raises:
      UserError: if the file may not be replaced, or cannot be written there.
    """
    where = f"{option} {path}"
    if not is_local(path):
        if path.exists() and not overwrite and not is_own(path):
            raise not_ours(where)
        return
    kind = kind_of(path, where)
    if kind not in ("", "a file"):
        raise UserError(f"{where}: this is {kind}; name a file")
    directory = path.parent
    if make_parents:
        directory = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not directory.is_dir():
        raise UserError(f"{where}: there is no directory {directory}")
    check_outside_runs(path, where)
    for source in inputs:
        if kind and source.exists() and source.samefile(path):
            raise UserError(f"{where}: the command reads this file; name another one")
    if kind and not overwrite and not is_own(path):
        raise not_ours(where)
    if not os.access(directory, os.W_OK):
        raise UserError(f"{where}: {os.strerror(errno.EACCES)}")


def kind_of(path: Path, where: str) -> str:
    """Return what a path is: "a file", "a directory", ...; "" if there is nothing."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    return KINDS.get(stat.S_IFMT(mode), "a file")


def not_ours(where: str) -> UserError:
    """Return the error for a file that the command has not written."""
    return UserError(
        f"{where}: this file exists, and the command has not written it; --overwrite replaces it"
    )


def check_outside_runs(path: Path, where: str) -> None:
    """Raise UserError if `path` is a file, or in a directory, that a run writes or will write."""
    resolved = path.parent.resolve() / path.name
    for directory in resolved.parents:
        if marker.is_run(directory):
            if resolved.relative_to(directory).parts[0] in marker.RUN_NAMES:
                raise UserError(f"{where}: this belongs to the run in {directory}; name another")
            return


def begins_with(path: Path, mark: bytes) -> bool:
    """Return whether a file has `mark` in its first bytes."""
    try:
        with path.open("rb") as file:
            return mark in file.read(BEGINNING)
    except OSError:
        return False


def has_keys(path: Path, keys: frozenset[str]) -> bool:
    """Return whether a file holds a JSON object that has all these keys."""
    return keys <= marker.read_object(path).keys()
