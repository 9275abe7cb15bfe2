"""A user's own examples: JSON lines, plain or gzipped, or Parquet.

An error names the file and the line (or the row). Of several processes each parses its share of
every file, and all of them get all the rows.
"""

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import pyarrow
import pyarrow.parquet

from alignjax.config import UserError
from alignjax.data import formats, shares
from alignjax.machine import jsonl


class RawRow(NamedTuple):
    """A row as a file holds it: JSON text, or the columns of a Parquet file."""

    number: int  # in the file, from 1
    where: str  # "FILE:LINE" or "FILE: row NUMBER", with which error messages begin
    value: str | dict


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process read of a file. Each entry is (number of the row, what it says)."""

    examples: list[tuple[int, dict]] = field(default_factory=list)
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    fatal: list[tuple[int, str]] = field(default_factory=list)  # the error that stopped the reading


def read(
    pattern: str, kind: str, skip: bool = False, say: Callable[[str], None] = print
) -> list[dict]:
    """Return the examples in all files that match a pattern, each with `where` it stands.

    `formats` has the fields of an example of each kind, and how a row becomes one. With `skip`, bad
    rows are left out, and their number and the first of them are printed.

    Raises:
      UserError: a row is bad (without `skip`), a file cannot be read or has no good row.
    """
    paths = sorted(glob.glob(str(pattern)))
    check_paths(pattern, paths)
    examples = []
    for path in paths:
        examples += read_file(path, kind, skip, say)
    return examples


def check_paths(pattern: str, paths: list[str]) -> None:
    """Raise UserError if no file matches, or not the same files for every process."""
    if not paths:
        raise UserError(f"{pattern}: no such file")
    for process, other_paths in enumerate(shares.exchange(paths)):
        if other_paths != paths:
            raise UserError(
                f"{pattern}: process {process} finds {other_paths}, process "
                f"{jax.process_index()} finds {paths}; all processes must see the same files"
            )


def read_file(path: str, kind: str, skip: bool, say: Callable[[str], None]) -> list[dict]:
    """Return the examples of one file, in order, from the shares of all processes."""
    share = read_share(path, kind, skip)
    all_shares = shares.exchange([share.examples, share.bad_rows, share.fatal])
    examples = sorted_by_number(part[0] for part in all_shares)
    bad_rows = sorted_by_number(part[1] for part in all_shares)
    fatal = sorted_by_number(part[2] for part in all_shares)
    if fatal:
        raise UserError(fatal[0])
    if bad_rows:
        total = len(bad_rows) + len(examples)
        say(f"{path}: {len(bad_rows)} bad rows skipped of {total}; the first: {bad_rows[0]}")
    if not examples:
        raise UserError(f"{path}: empty, there are no {kind} in it")
    return examples


def sorted_by_number(parts: Iterator[list[tuple[int, Any]]]) -> list[Any]:
    """Return the values of numbered entries in the order of their numbers."""
    entries = [entry for part in parts for entry in part]
    return [value for _, value in sorted(entries, key=number_of)]


def number_of(entry: tuple[int, Any]) -> int:
    return entry[0]


def read_share(path: str, kind: str, skip: bool) -> Share:
    """Read this process's share of a file; without `skip`, the first bad row ends the reading."""
    share = Share()
    raw_rows = parquet_rows(path) if path.endswith(".parquet") else json_rows(path)
    try:
        for raw in raw_rows:
            try:
                share.examples.append((raw.number, read_row(raw.value, raw.where, kind)))
            except UserError as error:
                share.bad_rows.append((raw.number, str(error)))
                if not skip:
                    advice = 'data.on_bad_row="skip" leaves such rows out'
                    share.fatal.append((raw.number, f"{error}; {advice}"))
                    break
    except jsonl.Unreadable as error:
        share.fatal.append((error.line, str(error)))
    return share


def read_row(value: str | dict, where: str, kind: str) -> dict:
    """Return the example in a row, given as JSON text or as an object, and where it stands."""
    row = jsonl.parse(value, where) if isinstance(value, str) else value
    try:
        example = formats.example_of(row, kind)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:
        error.add_note(f"while a row format read {where}")
        raise
    return {"where": where} | example


def json_rows(path: str) -> Iterator[RawRow]:
    """Yield this process's share of the lines that are not blank."""
    lines = jsonl.lines(path, process=jax.process_index(), processes=jax.process_count())
    for line in lines:
        yield RawRow(line.number, line.where, line.text)


def parquet_rows(path: str) -> Iterator[RawRow]:
    """Yield this process's share of the rows, without the columns that are null."""
    process = jax.process_index()
    processes = jax.process_count()
    rows_before = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                # As for lines: the rows whose number, from 1, is `process` modulo `processes`.
                first = (process - rows_before - 1) % processes
                indices = range(first, len(batch), processes)
                if processes > 1:
                    batch_share = batch.take(pyarrow.array(indices, pyarrow.int32()))
                else:
                    batch_share = batch
                for index, columns in zip(indices, batch_share.to_pylist(), strict=True):
                    number = rows_before + index + 1
                    yield RawRow(number, f"{path}: row {number}", without_nulls(columns))
                rows_before += len(batch)
    except (OSError, pyarrow.ArrowException) as error:
        message = f"{path}: expected Parquet: {error}"
        raise jsonl.Unreadable(message, rows_before + 1) from None


def without_nulls(columns: dict) -> dict:
    return {name: value for name, value in columns.items() if value is not None}
