"""Directories that commands write: claimed by a marker, and never over what is not ours."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from alignjax.config import UserError
from alignjax.machine import marker, outputs


def check_directory(
    directory: Path,
    option: str,
    *,
    command: str,
    is_own: Callable[[Path], bool] | None = None,
    overwrite: bool = False,
) -> None:
    """Check that a command may write results into a directory, before it begins to work.

    Args:
      directory: local; it may exist if it is empty or an earlier one of the same command.
      option: how the command line names it, such as "--out".
      command: the name in the marker, such as "alignjax.evaluate".
      is_own: whether a directory without a marker was made by an earlier version; None if no
        version of the command left one unmarked.
      overwrite: allow a directory that holds other files. They stay, unless they have the name
        of a result.

    Raises:
      UserError: if the directory holds something else, or cannot be one.
    """
    where = f"{option} {directory}"
    kind = outputs.kind_of(directory, where)
    outputs.check_outside_runs(directory, where)
    if kind == "":
        return
    if not directory.is_dir():
        raise UserError(f"{where}: this is {kind}; name a directory")
    if marker.is_run(directory):
        raise UserError(f"{where}: this is the directory of a run; name another")
    owner = marker.read(directory).get("made_by")
    if overwrite or owner == command:
        return
    with outputs.writing(directory):
        is_used = any(not outputs.is_temporary(path) for path in directory.iterdir())
    if is_used and (owner or is_own is None or not is_own(directory)):
        raise UserError(
            f"{where}: this directory holds files that the command has not written; name another "
            "one, or write into it with --overwrite"
        )


def claim_directory(directory: Path, command: str) -> None:
    """Make a directory for results, if it does not exist, and mark it as this command's."""
    with outputs.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    if marker.read(directory).get("made_by") != command:
        outputs.write_text(directory / marker.NAME, marker.dumps({"made_by": command}))


@contextlib.contextmanager
def new_directory(out: Path, option: str, *, command: str, overwrite: bool) -> Iterator[Path]:
    """Yield a directory to fill, which takes the place of `out` at the end of the body.

    It has a marker, which at the end lists all files. `out` may be an empty directory; with
    `overwrite`, it may also be one that the same command has made, if nothing was added to it.
    After an error nothing has changed. Raises UserError for any other `out`, and if another
    process has made it meanwhile.
    """
    where = f"{option} {out}"
    check_replaceable(out, where, command, overwrite)
    with outputs.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        outputs.remove_leftovers(out.parent, out.name)
        temporary = outputs.temporary_beside(out)
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
    try:
        outputs.hold(descriptor)
        outputs.write_text(temporary / marker.NAME, marker.dumps({"made_by": command}))
        yield temporary
        entries = {"made_by": command, "files": sorted(names_below(temporary))}
        outputs.write_text(temporary / marker.NAME, marker.dumps(entries))
        with outputs.writing(out):
            put_in_place(temporary, out, where, command, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def check_replaceable(out: Path, where: str, command: str, overwrite: bool) -> None:
    """Raise UserError unless a new directory may take the place of `out`."""
    kind = outputs.kind_of(out, where)
    outputs.check_outside_runs(out, where)
    if kind == "":
        return
    if kind != "a directory":
        raise UserError(f"{where}: this is {kind}; name a new or empty directory")
    with outputs.writing(out):
        names = names_below(out)
    if not names:
        return
    if marker.read(out).get("made_by") != command:
        raise UserError(f"{where}: already exists; name a new or empty directory")
    if not overwrite:
        raise UserError(
            f"{where}: an earlier export is there; name a new directory, or replace it with "
            "--overwrite"
        )
    added = sorted(names - listed_files(out))
    if added:
        raise UserError(
            f"{where}: {added[0]} there was not written by the command, so the directory can't be "
            "replaced; move the file, or name another directory"
        )


def put_in_place(temporary: Path, out: Path, where: str, command: str, overwrite: bool) -> None:
    """Rename `temporary` to `out`, and remove what was there."""
    try:
        temporary.rename(out)  # Works if there is nothing, or an empty directory.
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    # Another process may have made it since the first check.
    check_replaceable(out, where, command, overwrite)
    earlier = outputs.temporary_beside(out)
    out.rename(earlier)
    try:
        temporary.rename(out)
    except BaseException:
        earlier.rename(out)
        raise
    remove_listed(earlier)


def names_below(directory: Path) -> set[str]:
    """Return the paths of everything below a directory, relative to it."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def listed_files(directory: Path) -> set[str]:
    """Return the paths that the marker of a directory says were written with it."""
    listed = marker.read(directory).get("files")
    return {marker.NAME, *(listed if isinstance(listed, list) else [])}


def remove_listed(directory: Path) -> None:
    """Remove what the marker of a directory lists, and the directory if nothing else is in it."""
    names = sorted(listed_files(directory) - {marker.NAME}, reverse=True)
    for name in (*names, marker.NAME):  # what is in a directory comes before it
        path = directory / name
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()
