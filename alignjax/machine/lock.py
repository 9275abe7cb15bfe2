"""One process at a time in a work directory.

The directory is marked as ours before anything else is written into it.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import jax

from alignjax.config import UserError
from alignjax.machine import marker, outputs
from alignjax.machine import workdir as workdirs
from alignjax.machine.outputs import Unwritable, disk_problem

NAME = "lock"
HOLDER = re.compile(rb"process \d+ on \S+")  # what a lock says, if its disk was not full


@contextlib.contextmanager
def exclusive_use(workdir: Path, read_only: bool = False) -> Iterator[None]:
    """Create a run's work directory and keep other processes out of it during the body.

    With `read_only`, for a finished run, nothing is locked or written. The kernel releases the
    lock when the process ends, however it ends. There is no lock where there are none (object
    stores, some network file systems).

    Raises:
      UserError: if the directory holds what is not ours, if another process uses it, or if the
        body fails because a file in the directory cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0 and workdirs.is_local(workdir) and not read_only:
            stack.enter_context(locked(workdir))
        try:
            yield
        except Unwritable as error:
            raise UserError(f"{error}; fix that, and the same command resumes the run") from error
        except OSError as error:
            if not disk_problem(error) or not is_below(error.filename, workdir):
                raise  # The body also reads other files, and calls the user's functions.
            raise UserError(
                f"{error.filename}: {disk_problem(error)}; fix that, and the same command resumes "
                "the run"
            ) from error


def is_below(name: object, directory: Path) -> bool:
    """Return whether `name` is the path of something below a directory."""
    if not isinstance(name, str):
        return False
    return Path(name).absolute().is_relative_to(directory.absolute())


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Mark a local work directory as a run's, and hold its lock.

    At the end the lock is deleted, and a new directory in which the body has left nothing.
    """
    with outputs.writing(workdir):
        check_ours(workdir)
        is_new = not workdir.exists()
        workdir.mkdir(parents=True, exist_ok=True)
        is_marked = mark_run(workdir)
    path = workdir / NAME
    with contextlib.ExitStack() as stack:
        if is_marked:
            stack.callback(remove_marker, workdir, is_new)
        with contextlib.suppress(OSError):  # A disk that is read-only, or has no locks.
            file = stack.enter_context(path.open("ab+", buffering=0))
            acquire(file, path)
            stack.callback(remove_lock, path)
        outputs.remove_leftovers(workdir)
        yield


def acquire(file: BinaryIO, path: Path) -> None:
    """Lock an open file, and write into it who holds it; UserError if another process does."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        is_free = False
    if not is_free:  # Another process holds it, or has just deleted it.
        file.seek(0)
        holder = file.read().decode(errors="replace") or "another process"
        raise UserError(f"{path.parent}: in use by {holder}; wait for it to finish, or stop it")
    with contextlib.suppress(OSError):  # On a full disk, hold the lock without a name.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


def remove_lock(path: Path) -> None:
    """Delete a lock that this process holds, unless its disk has become read-only."""
    with contextlib.suppress(OSError):
        path.unlink()


def remove_marker(workdir: Path, is_new: bool) -> None:
    """Delete a marker, and the directory if it is new, unless something was added to it."""
    with contextlib.suppress(OSError):
        if {path.name for path in workdir.iterdir()} == {marker.NAME}:
            (workdir / marker.NAME).unlink()
            if is_new:
                workdir.rmdir()


def holder(workdir: Path) -> str:
    """Return who uses a local work directory, "" if nobody does or it cannot be known."""
    try:
        with (workdir / NAME).open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(OSError):
            return (workdir / NAME).read_text(errors="replace") or "another process"
        return "another process"
    except OSError:
        return ""
    return ""


def check_ours(workdir: Path) -> None:
    """Raise UserError unless a directory holds a run, was claimed for one, or is free."""
    if not workdir.is_dir():
        if workdir.exists() or workdir.is_symlink():
            raise UserError(f"--workdir {workdir}: this is not a directory; name another")
        return
    if (workdir / "config.json").exists():
        if "stage" not in read_config(workdir / "config.json"):
            raise UserError(
                f"{workdir}: its config.json is not that of a run; name another --workdir"
            )
        return
    # Another process of this run may be claiming the directory. So a temporary file is none of
    # somebody else's, in use or not, and the names come first: a marker among them can be read.
    names = {path.name for path in workdir.iterdir() if not outputs.is_temporary(path)}
    owner = marker.read(workdir).get("made_by")
    if owner == marker.TRAIN:
        return
    if names - {NAME} or (NAME in names and not is_lock(workdir / NAME)):
        raise UserError(f"{workdir} is not empty and has no config.json; name another --workdir")


def read_config(path: Path) -> dict:
    """Return the contents of a run's config.json; UserError if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def is_lock(path: Path) -> bool:
    """Return whether a file is a lock that a run has left."""
    return path.is_file() and not path.is_symlink() and bool(HOLDER.fullmatch(path.read_bytes()))


def mark_run(workdir: Path) -> bool:
    """Write the marker of a new run, unless the directory has one or an old run.

    Returns whether it was written. Of two processes, one writes it.
    """
    path = workdir / marker.NAME
    if path.exists() or (workdir / "config.json").exists():
        return False
    temporary = outputs.temporary_beside(path)
    outputs.write_text(temporary, marker.dumps(new_run()))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def new_run() -> dict[str, str]:
    """Return the marker of a new run, with an id that no other run has."""
    return {"made_by": marker.TRAIN, "run": secrets.token_hex(8)}
