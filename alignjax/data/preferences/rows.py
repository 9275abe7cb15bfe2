"""Rows of published files: reading them with a progress bar, and checking their fields."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from alignjax.config import UserError, nearest
from alignjax.data import values
from alignjax.machine import console, jsonl

EXPECTED = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
LFS_POINTER = b"version https://git"  # how a file begins that stands for one in Git LFS


class Row(NamedTuple):
    """One line of a published file."""

    id: str  # the file without its endings, and the line
    where: str  # the same for error messages: the path and the line
    value: dict


def read_rows(paths: dict[str, Path], description: str) -> Iterator[Row]:
    """Yield the rows of files of JSON lines, with a bar over the bytes of all of them.

    Args:
      paths: {published name: path}; a file is gzipped if its published name ends in ".gz".
      description: what the bar says.
    """
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    with console.progress_bar(
        sum(sizes.values()), description, "B", unit_scale=True, leave=False
    ) as bar:
        bytes_before = 0
        for name, path in paths.items():
            refuse_lfs_pointer(path)
            progress = functools.partial(advance, bar, bytes_before)
            for line in jsonl.lines(path, gzipped=name.endswith(".gz"), progress=progress):
                row_id = f"{name.partition('.')[0]}/{line.number}"
                yield Row(row_id, line.where, parse_object(line))
            bytes_before += sizes[name]
            advance(bar, bytes_before, 0)


def refuse_lfs_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path}: a pointer of Git LFS, not the file: fetch the file itself")


def advance(bar: tqdm, bytes_before: int, bytes_read: int) -> None:
    """Move a bar to the bytes of the files before, and those read of this one."""
    bar.update(bytes_before + bytes_read - bar.n)


def parse_object(line: jsonl.Line) -> dict:
    value = jsonl.parse(line.text, line.where)
    if not isinstance(value, dict):
        raise UserError(f"{line.where}: expected an object, found {jsonl.describe(value)}")
    return value


def field(row: Row, path: str, kind: type, optional: bool = False) -> Any:
    """Return the value at a dotted path of a row, checked; numbers are places in lists.

    With `optional`, it is None where the value is null or absent.

    Raises:
      UserError: it names file, line and path, with what was found and what was expected.
    """
    value = row.value
    passed = []
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        elif optional and isinstance(value, dict):
            return None
        elif isinstance(value, dict):
            missing = ".".join([*passed, part])
            raise UserError(
                f"{row.where}: expected a field {missing!r}{nearest(part, sorted(value))}"
            )
        else:
            above = ".".join(passed)
            below = path.removeprefix(above)[1:]
            raise UserError(
                f"{row.where}: {above}: expected {below!r} in it, found {jsonl.describe(value)}"
            )
        passed.append(part)
    if value is None and optional:
        return None
    if not is_of_kind(value, kind):
        raise UserError(
            f"{row.where}: {path}: expected {EXPECTED[kind]}, found {jsonl.describe(value)}"
        )
    if kind is str:
        values.checked_text(value, f"{row.where}: {path}")
    return value


def is_of_kind(value: Any, kind: type) -> bool:
    """Return whether a JSON value is of a kind: true and false are no numbers, 3 is a float too."""
    if isinstance(value, bool) != (kind is bool):
        return False
    if kind is float:
        number = values.as_float(value)
        return number is not None and abs(number) <= values.LARGEST_FLOAT32
    return isinstance(value, kind)


def fault(chosen: str, rejected: str) -> str:
    """Return why two replies are no comparison, or ""."""
    if chosen == rejected:
        return "two equal replies"
    if not chosen.strip() or not rejected.strip():
        return "an empty reply"
    return ""
