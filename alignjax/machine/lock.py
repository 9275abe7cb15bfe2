"""One process at a time in a work directory, and errors of a disk that is full or read-only."""

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from alignjax.config import UserError
from alignjax.machine import workdir as workdirs

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


@contextlib.contextmanager
def exclusive_use(workdir: Path) -> Iterator[None]:
    """Create a run's work directory and keep other processes out of it during the body.

    Raises UserError at once if another process uses it, and if the body fails because the disk
    is full or cannot be written. The kernel releases the lock when the process ends, however it
    ends. There is no lock where there are none (object stores, some network file systems), nor
    for a finished run, which is only read.
    """
    with contextlib.ExitStack() as stack:
        if (
            jax.process_index() == 0
            and workdirs.is_local(workdir)
            and not (workdir / "summary.json").exists()
        ):
            with contextlib.suppress(OSError):
                stack.enter_context(locked(workdir))
        try:
            yield
        except Exception as error:
            problem = disk_problem(error)
            if problem:
                raise UserError(
                    f"{workdir}: {problem}; fix that, and the same command resumes the run"
                ) from error
            raise


def disk_problem(error: Exception) -> str:
    """Return the system's text for an error of an unwritable disk, "" for other errors.

    The error may come from Python or from a library.
    """
    code = getattr(error, "errno", None)
    if not code:
        match = OS_ERROR.search(str(error))
        code = int(match[1] or match[2]) if match else None
    return os.strerror(code) if code in UNWRITABLE else ""


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold workdir/lock; delete it at the end, and the directory if nothing else is in it."""
    path = workdir / "lock"
    workdir.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        if not acquire(file.fileno(), path):
            file.seek(0)
            holder = file.read().decode()
            raise UserError(f"{workdir}: in use by {holder}; wait for it to finish, or stop it")
        try:
            with contextlib.suppress(OSError):  # On a full disk, hold the lock without a name.
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                workdir.rmdir()


def acquire(descriptor: int, path: Path) -> bool:
    """Lock an open file; return False if another process holds it, or has just deleted it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
