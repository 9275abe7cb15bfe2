"""Rows as files hold them, before a row format reads them.

Of several processes each parses its share: the rows whose number, from 1, is `process` modulo
`processes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import pyarrow
import pyarrow.parquet

from alignjax.config import UserError, reason_of
from alignjax.data import json_array, paths
from alignjax.machine import jsonl

PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """A row of a file, parsed, or why it could not be parsed."""

    number: int  # in the file, from 1
    where: str  # "FILE:LINE" or "FILE: row NUMBER", with which error messages begin
    value: Any = None
    fault: str = ""  # the whole message


def read(path: str) -> Iterator[RawRow]:
    """Yield this process's share of the rows of a file, whatever its form.

    The content tells the form: a user's file may have any name.

    Raises:
      Unreadable: the file cannot be read from some row on.
    """
    if is_parquet(path):
        return parquet_rows(path)
    if json_array.is_array(path):
        return array_rows(path)
    return lines(path)


def is_parquet(path: str) -> bool:
    """Return whether a file is Parquet, by its name or by its first bytes."""
    with open(path, "rb") as file:
        return path.endswith(".parquet") or file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


def is_local(number: int) -> bool:
    """Return whether the row with a number is in this process's share."""
    return number % jax.process_count() == jax.process_index() % jax.process_count()


def lines(path: str) -> Iterator[RawRow]:
    """Yield the rows of JSON lines; blank lines are none."""
    gzipped = path.endswith(".gz") or has_gzip_magic(path)
    process = jax.process_index()
    processes = jax.process_count()
    for line in jsonl.stored_lines(path, gzipped=gzipped, process=process, processes=processes):
        yield row_of_line(line)


def row_of_line(line: jsonl.StoredLine) -> RawRow:
    """Return the row in a line."""
    try:
        value = jsonl.parse(line.content.decode(), line.where)
    except UnicodeDecodeError as error:
        fault = f"{line.where}: expected JSON in UTF-8: {error}"
        return RawRow(number=line.number, where=line.where, fault=fault)
    except UserError as error:
        # The first line of something else, such as one object over several lines, is no JSON.
        hint = f"; expected {paths.FORMS}" if line.number == 1 else ""
        return RawRow(number=line.number, where=line.where, fault=f"{error}{hint}")
    return RawRow(number=line.number, where=line.where, value=value)


def has_gzip_magic(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(jsonl.GZIP_MAGIC)) == jsonl.GZIP_MAGIC


def array_rows(path: str) -> Iterator[RawRow]:
    """Yield the rows of a JSON array.

    Every process has to parse all of it to know where its rows are.
    """
    for item in json_array.values(path):
        if is_local(item.number):
            where = f"{path}: row {item.number}"
            fault = f"{where}: {item.fault}" if item.fault else ""
            yield RawRow(number=item.number, where=where, value=item.value, fault=fault)


def parquet_rows(path: str) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file, without the columns that are null."""
    rows_before = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_column_names(path, file.schema_arrow.names)
            for batch in file.iter_batches():
                # Numbers count from 1.
                indices = [i for i in range(len(batch)) if is_local(rows_before + i + 1)]
                yield from rows_of_batch(batch, indices, path, rows_before)
                rows_before += len(batch)
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # also names not in UTF-8
        message = f"{path}: expected Parquet: {reason_of(error)}"
        raise jsonl.Unreadable(message, rows_before + 1) from None


def check_column_names(path: str, names: list[str]) -> None:
    """Raise Unreadable if two columns have one name: no row could have both."""
    for name in names:
        if names.count(name) > 1:
            raise jsonl.Unreadable(f"{path}: the column {name!r} is there twice", 1)


def rows_of_batch(
    batch: pyarrow.RecordBatch, indices: list[int], path: str, rows_before: int
) -> Iterator[RawRow]:
    """Yield the rows with these places in a batch, which begins after so many rows."""
    local_batch = batch
    if len(indices) < len(batch):
        local_batch = batch.take(pyarrow.array(indices, pyarrow.int32()))
    try:
        values = local_batch.to_pylist()
    except Exception:  # some value has no counterpart in Python: a date, a zone, text not in UTF-8
        values = None
    for place, index in enumerate(indices):
        number = rows_before + index + 1
        where = f"{path}: row {number}"
        if values is not None:
            yield RawRow(number=number, where=where, value=without_nulls(values[place]))
        else:
            yield converted_row(local_batch, place, number, where)


def converted_row(batch: pyarrow.RecordBatch, place: int, number: int, where: str) -> RawRow:
    """Return a row of a batch of which some row cannot be converted: perhaps this one."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column[place].as_py()
        except Exception as error:  # of pyarrow, or of the library that has the type
            fault = f"{where}: {name}: {reason_of(error)}"
            return RawRow(number=number, where=where, fault=fault)
    return RawRow(number=number, where=where, value=without_nulls(columns))


def without_nulls(columns: dict) -> dict:
    return {name: value for name, value in columns.items() if value is not None}
