"""Read and write JSON lines: the one reader and writer of the package.

Every error names the file, the line and the reason.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from alignjax.config import UserError

LINES_PER_REPORT = 256  # lines between two reports of progress


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


def lines(
    path: str | Path,
    *,
    gzipped: bool | None = None,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Line]:
    """Yield the lines of a file that are not blank, without parsing them.

    Args:
      path: a file in UTF-8; it may be in a bucket.
      gzipped: whether the file is compressed; by default, whether its name ends in ".gz".
      process, processes: yield only the lines whose number is `process` modulo `processes`, so
        that several processes can share a file.
      progress: called now and then with the number of bytes read of the file as it is stored.

    Raises:
      Unreadable: the file cannot be opened, is cut off, damaged or not in UTF-8.
    """
    if gzipped is None:
        gzipped = str(path).endswith(".gz")
    number = 0
    try:
        with epath.Path(path).open("rb") as stored:
            for number, data in enumerate(gzip.open(stored) if gzipped else stored, 1):
                if number % processes == process and data.strip():
                    text = decoded(data, path, number)
                    yield Line(number, f"{path}:{number}", text)
                if progress and number % LINES_PER_REPORT == 0:
                    progress(stored.tell())
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, number + 1, error) from None


def decoded(data: bytes, path: str | Path, number: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise unreadable(path, number, error) from None


def unreadable(path: str | Path, number: int, error: Exception) -> Unreadable:
    return Unreadable(f"{path}:{number}: expected JSON lines in UTF-8: {error}", number)


def parse(text: str, where: str) -> Any:
    """Return the value of a JSON text; the UserError for anything else begins with `where`."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def read(path: str | Path, *, unfinished: bool = False) -> list[Any]:
    """Return the values of all lines of a file.

    With `unfinished`, a last line that is torn (it has no line end) is left out: a run may still be
    writing it.
    """
    whole = [line for line in lines(path) if not unfinished or line.text.endswith("\n")]
    return [parse(line.text, line.where) for line in whole]


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
    text = json.dumps(value, default=str)
    beginning = text[:80] + ("..." if len(text) > 80 else "")
    return f"{type(value).__name__}: {beginning}"
