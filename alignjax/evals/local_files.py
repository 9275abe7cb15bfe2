"""Read data sets from local files in the formats in which they were published: CSV and JSON.

If a file is missing or differs from the published format, a UserError of one line names the
file, the line and the field.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict

from alignjax.config import UserError
from alignjax.machine.jsonl import describe


class CsvRow(NamedTuple):
    """One row of a CSV file."""

    where: str  # file and line; a row that spans several lines has the number of its first
    fields: list[str]


def find_file(folder: str, names: list[str], source: str) -> Path:
    """Return the first of `names` that is a file in `folder`.

    If there is none, the UserError includes `source`, which says where to get the file.
    """
    for name in names:
        path = Path(folder) / name
        if path.is_file():
            return path
    raise UserError(f"{Path(folder) / names[0]}: there is no such file; {source}")


def dataset(**splits: list[dict]) -> DatasetDict:
    """Return splits of rows as a data set of the `datasets` library."""
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def read_csv(path: Path) -> Iterator[CsvRow]:
    """Yield the rows of a CSV file that are not empty."""
    last_line = 0  # of the previous row
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for fields in reader:
                where = f"{path}:{last_line + 1}"
                last_line = reader.line_num
                if fields:
                    yield CsvRow(where, fields)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}:{last_line + 1}: expected CSV in UTF-8: {error}") from None


def read_json(path: Path) -> Any:
    """Return the value that a JSON file holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected JSON in UTF-8: {error}") from None


def text_fields(row: Any, where: str, names: tuple[str, ...]) -> dict[str, str]:
    """Return the named fields of a row; each must be text that is not blank."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {describe(row)}")
    for name in names:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise UserError(f"{where}: {name}: expected text, found {describe(row.get(name))}")
    return {name: row[name] for name in names}


def require_rows(rows: list[dict], least: int, path: Path, purpose: str) -> list[dict]:
    """Return the rows; raise UserError if there are fewer than `least`."""
    if len(rows) < least:
        raise UserError(f"{path}: found {len(rows)} rows, but needs at least {least} {purpose}")
    return rows
