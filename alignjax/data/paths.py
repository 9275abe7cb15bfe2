"""Which files a user's path or pattern names, and whether they can be read at all."""

import glob
import os
import stat
import unicodedata
from pathlib import Path

from alignjax.config import UserError, nearest

FORMS = "JSON lines, a JSON array (both may be gzipped) or Parquet"
# What the first bytes of a file say, of files that are not read.
FOREIGN_FORMATS = {
    b"\xff\xfe": "text in UTF-16 (expected UTF-8)",
    b"\xfe\xff": "text in UTF-16 (expected UTF-8)",
    b"\x28\xb5\x2f\xfd": "a file compressed with zstd",
    b"\xfd7zXZ": "a file compressed with xz",
    b"BZh": "a file compressed with bzip2",
    b"PK\x03\x04": "a zip archive or spreadsheet",
    b"7z\xbc\xaf": "a 7z archive",
    b"ARROW1": "an Arrow or Feather file",
    b"SQLite": "an SQLite database",
    b"Obj\x01": "an Avro file",
    b"\x93NUMPY": "an array of numpy",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x04": "a pickle",
    b"version https://git": "a pointer of Git LFS, not the file itself",
}
FOREIGN_SUFFIXES = (".csv", ".tsv", ".yaml", ".yml", ".xml", ".tar", ".tgz")
HEAD_BYTES = 32


def find(pattern: str) -> list[str]:
    """Return the files that a path or pattern names, sorted.

    An existing file of exactly that name is meant, even if the name looks like a pattern. The same
    holds for the directories in front of a pattern.

    Raises:
      UserError: there is no such file, or one of them is no file with data.
    """
    check_name(pattern)
    if os.path.lexists(pattern):
        paths = [pattern]
    else:
        paths = sorted(glob.glob(with_literal_directories(pattern)))
    if not paths:
        raise UserError(absence(pattern))
    for path in paths:
        check_file(path)
    return paths


def exists(pattern: str) -> bool:
    """Return whether a path or pattern names anything."""
    if "\0" in pattern:
        return False
    return os.path.lexists(pattern) or bool(glob.glob(with_literal_directories(pattern)))


def check_name(name: str) -> None:
    """Raise UserError for a name that could not stand in a line of an error or a config."""
    categories = {unicodedata.category(character) for character in name}
    if categories & {"Cc", "Cs"}:
        raise UserError(f"{name!r}: expected a file's name in UTF-8 without control characters")
    if "://" in name:
        raise UserError(f"{name}: no such file; a file of data must be local, so fetch it first")


def with_literal_directories(pattern: str) -> str:
    """Return a pattern in which the special characters of leading directories that exist count.

    Of "runs[1]/*.jsonl", the directory is "runs[1]" if there is one.
    """
    directory, slash, rest = pattern.rpartition("/")
    if not slash:
        return pattern
    if os.path.isdir(directory):
        return f"{glob.escape(directory)}/{rest}"
    return f"{with_literal_directories(directory)}/{rest}"


def absence(pattern: str) -> str:
    """Return what to say if no file matches: similar names in the directory, if there are any."""
    message = f"{pattern}: no such file"
    if pattern.startswith("~"):
        return message + "; a shell replaces ~ only at the beginning of an argument"
    if glob.has_magic(pattern):
        return message + "; *, ? and [...] make it a pattern, which matches nothing"
    directory = Path(pattern).parent
    if not directory.is_dir():
        return message + f"; there is no directory {directory}"
    name = Path(pattern).name
    hint = nearest(name, sorted(os.listdir(directory)))
    return message + (hint if "did you mean" in hint else "")


def check_file(path: str) -> None:
    """Raise UserError for anything but a regular file that can hold rows.

    A pipe or a device is never opened: that could wait for ever, and data is read several times.
    """
    check_name(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path}: a directory; name the files in it, such as {path}/*.jsonl")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(
                f"{path}: expected a regular file: a pipe or a device can't be read several times"
            )
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    for magic, description in FOREIGN_FORMATS.items():
        if head.startswith(magic):
            raise UserError(f"{path}: expected {FORMS}, found {description}")
    if path.lower().endswith(FOREIGN_SUFFIXES):
        suffix = path.rpartition(".")[2]
        raise UserError(f"{path}: expected {FORMS}, found a file that ends in .{suffix}")
