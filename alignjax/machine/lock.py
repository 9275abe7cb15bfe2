"""One process at a time in a work directory, and errors of a disk that is full or read-only."""

import contextlib
import errno
import fcntl
import os
import re
import socket
from pathlib import Path

import jax

from alignjax.config import UserError
from alignjax.machine import workdir as workdirs

UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)


@contextlib.contextmanager
def exclusive_use(workdir: Path):
    """A run works on `workdir`, which is made, and nobody else does; UserError at once if another process is at it.

    The kernel ends the lock with the process, however that ends. Where there are none (object stores, some network file
    systems) it goes without, as it does for a finished run, which is only read. A disk that is full, or not to be
    written, is a UserError too.
    """
    with contextlib.ExitStack() as stack:
        if (
            jax.process_index() == 0
            and workdirs.is_local(workdir)
            and not (workdir / "summary.json").exists()
        ):
            with contextlib.suppress(OSError):
                lock(workdir, stack)
        try:
            yield
        except Exception as error:
            if unwritable(error):
                told = f"{workdir}: {unwritable(error)}; the same command goes on once that is put right"
                raise UserError(told) from error
            raise


def unwritable(error: Exception) -> str:
    """What the system says of a disk that is full or not to be written, if that is the error, in Python or in a library."""
    found = re.search(
        r"\(os error (\d+)\)|os_error_code='(\d+)'", str(error)
    )  # of Rust, and of TensorStore
    code = getattr(error, "errno", None) or (found and int(found[1] or found[2]))
    return os.strerror(code) if code in UNWRITABLE else ""


def lock(workdir: Path, stack: contextlib.ExitStack) -> None:
    """Hold workdir/lock until the stack is left; it goes then, with the directory if that is all there is."""
    path = workdir / "lock"
    workdir.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(path.open("ab+", buffering=0))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError  # it went in between
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{workdir}: in use by {file.read().decode()}; wait for it, or stop it"
        ) from None

    def leave():
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            workdir.rmdir()

    stack.callback(leave)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
