"""Data sets from local files as they were published: CSV, JSON and JSON lines, the latter plain or gzipped.

What is missing, or not as it was published, is a UserError of one line that names file, line and field.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

from alignjax.config import UserError
from alignjax.machine.jsonl import describe


def find(folder: str, names: list[str], source: str) -> Path:
    """The first of `names` that is a file in `folder`."""
    path = next((p for p in (Path(folder) / name for name in names) if p.is_file()), None)
    if path is None:
        raise UserError(f"{Path(folder) / names[0]}: no such file; {source}")
    return path


def dataset(**splits: list[dict]) -> DatasetDict:
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(where, fields) of each row that is not empty; a row may go over several lines, the first of them is named."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for fields in reader:
                where, line = f"{path}:{line + 1}", reader.line_num
                if fields:
                    yield where, fields
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}:{line + 1}: CSV in UTF-8 wanted, {error}") from None


def json_file(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: JSON in UTF-8 wanted, {error}") from None


def texts(row, where: str, fields: tuple[str, ...]) -> dict[str, str]:
    """The fields of a row, each of which must be text and not empty."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {describe(row)}")
    for field in fields:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise UserError(f"{where}: {field}: expected text, found {describe(row.get(field))}")
    return {field: row[field] for field in fields}


def at_least(rows: list, count: int, path: Path, what: str) -> list:
    if len(rows) < count:
        raise UserError(f"{path}: {len(rows)} rows, at least {count} wanted {what}")
    return rows
