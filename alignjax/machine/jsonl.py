"""Read and write JSON lines, and read files that are one object.

Every error names the file, the line and the reason.
"""

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from alignjax.config import UserError

LINES_PER_REPORT = 256  # lines between two reports of progress
GZIP_MAGIC = b"\x1f\x8b"  # with which gzipped files begin
DAMAGES = (OSError, EOFError, zlib.error)  # what reading a file that is cut off or damaged raises


class Unreadable(UserError):
    """A file that cannot be read from some line on: it is cut off, damaged or not text."""

    def __init__(self, message: str, line: int):
        super().__init__(message)
        self.line = line


class Line(NamedTuple):
    """One line of a file that is not blank."""

    number: int  # counted from 1
    where: str  # "FILE:NUMBER", with which error messages begin
    text: str


class StoredLine(NamedTuple):
    """One line of a file that is not blank, before it is decoded."""

    number: int  # counted from 1
    where: str  # "FILE:NUMBER", with which error messages begin
    content: bytes


def lines(
    path: str | Path, *, gzipped: bool | None = None, progress: Callable[[int], None] | None = None
) -> Iterator[Line]:
    """Yield the lines of a file that are not blank, without parsing them.

    Args:
      path: a file in UTF-8, with or without a byte order mark; it may be in a bucket.
      gzipped: whether the file is compressed; by default, whether its name ends in ".gz".
      progress: called now and then with the number of bytes read of the file as it is stored.

    Raises:
      Unreadable: the file cannot be opened, is cut off, damaged or not in UTF-8.
    """
    for line in stored_lines(path, gzipped=gzipped, progress=progress):
        try:
            text = line.content.decode()
        except UnicodeDecodeError as error:
            raise unreadable(path, line.number, error) from None
        yield Line(line.number, line.where, text)


def stored_lines(
    path: str | Path,
    *,
    gzipped: bool | None = None,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Iterator[StoredLine]:
    """Yield the lines of a file that are not blank, without decoding them.

    Args:
      path: a file; it may be in a bucket.
      gzipped: whether the file is compressed; by default, whether its name ends in ".gz".
      process, processes: yield only the lines whose number is `process` modulo `processes`, so
        that several processes can share a file.
      progress: called now and then with the number of bytes read of the file as it is stored.

    Raises:
      Unreadable: the file cannot be opened, is cut off or damaged.
    """
    if gzipped is None:
        gzipped = str(path).endswith(".gz")
    number = 0
    try:
        with epath.Path(path).open("rb") as stored:
            for number, data in enumerate(gzip.open(stored) if gzipped else stored, 1):
                if number % processes == process:
                    # Files that were joined have a mark in front of each part.
                    content = data.removeprefix(codecs.BOM_UTF8)
                    if content.strip():
                        yield StoredLine(number, f"{path}:{number}", content)
                if progress and number % LINES_PER_REPORT == 0:
                    progress(stored.tell())
    except DAMAGES as error:
        raise unreadable(path, number + 1, error) from None


def opened(stored: BinaryIO) -> BinaryIO:
    """Return a file's content without its compression, which its first bytes tell."""
    is_gzipped = stored.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    stored.seek(0)
    return gzip.open(stored) if is_gzipped else stored


def unreadable(path: str | Path, number: int, error: Exception) -> Unreadable:
    return Unreadable(f"{path}:{number}: expected JSON lines in UTF-8: {error}", number)


class DuplicateField(ValueError):
    """An object has a field twice."""


def object_of(pairs: list[tuple[str, Any]]) -> dict:
    """Return an object of its fields; Python would keep the last of two values without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise DuplicateField(f"the field {duplicate!r} is there twice")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=object_of)


def parse(text: str, where: str) -> Any:
    """Return the value of a JSON text; the UserError for anything else begins with `where`."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {fault(error)}") from None


def fault(error: ValueError | RecursionError) -> str:
    """Return why a text could not be decoded."""
    if isinstance(error, RecursionError):
        return "objects or lists are nested too deeply"
    if isinstance(error, DuplicateField):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    return "a whole number has too many digits"  # the only other reason that Python has


def read(path: str | Path, *, unfinished: bool = False) -> list[Any]:
    """Return the values of all lines of a file.

    With `unfinished`, a last line that is torn (it has no line end) is left out: a run may still be
    writing it.
    """
    whole = [line for line in lines(path) if not unfinished or line.text.endswith("\n")]
    return [parse(line.text, line.where) for line in whole]


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; UserError for anything else, but for a missing file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is wanted, not {type(value).__name__}")
    return value


def dumps(rows: list[dict], **options: Any) -> str:
    """Return rows as JSON lines; the last line has no end.

    A number that is not finite is null. `options` are those of `json.dumps`.
    """
    return "\n".join(json.dumps(null(row), allow_nan=False, **options) for row in rows)


def null(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON cannot express, by None."""
    if isinstance(value, dict):
        return {key: null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def describe(value: Any) -> str:
    """Return the type of a JSON value and its beginning, for error messages: 'int: 3'."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):  # fields that are no text, too deep
        return type(value).__name__
    beginning = text[:80] + ("..." if len(text) > 80 else "")
    return f"{type(value).__name__}: {beginning}"
