"""A user's own examples: JSON lines, a JSON array (each plain or gzipped), or Parquet.

An error names the file and the line (or the row). Of several processes each parses its share of
every file, and all of them get all the rows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from alignjax.config import UserError
from alignjax.data import formats, paths, raw_rows, shares
from alignjax.data.raw_rows import RawRow
from alignjax.machine import failures, jsonl, user_code


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How the rows of files become examples."""

    kind: str  # text, conversations, comparisons or prompts
    skip: bool = False  # leave bad rows out
    # {field: the name that it has in the rows}
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process read of a file. Each entry is (number of the row, what it says)."""

    examples: list[tuple[int, dict]] = field(default_factory=list)
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    fatal: list[tuple[int, str]] = field(default_factory=list)  # the error that stopped the reading


def read(
    pattern: str,
    kind: str,
    skip: bool = False,
    say: Callable[[str], None] = print,
    columns: Mapping[str, str] | None = None,
) -> list[dict]:
    """Return the examples in all files of a path or pattern, each with `where` it stands.

    `formats` has the fields of an example of each kind, and how a row becomes one. With `skip`, bad
    rows are left out, and their number and the first of them are printed. `columns` is
    {field: the name that it has in the rows}.

    Raises:
      UserError: a row is bad (without `skip`), a file cannot be read or has no good row.
    """
    options = RowOptions(kind=kind, skip=skip, columns=columns or {})
    formats.check_columns(options.columns, kind)
    examples = []
    for path in common_paths(str(pattern)):
        examples += read_file(path, options, say)
    return examples


def common_paths(pattern: str) -> list[str]:
    """Return the files that a pattern names, which must be the same for all processes.

    An error of one process is exchanged too, because the others would wait for it.
    """
    files = []
    problem = ""
    try:
        files = paths.find(pattern)
    except UserError as error:
        problem = str(error)
    for process, (other_files, other_problem) in enumerate(shares.exchange([files, problem])):
        if problem:
            raise UserError(problem)
        if other_files != files:
            raise UserError(
                f"{pattern}: process {process} finds {other_problem or other_files}, process "
                f"{jax.process_index()} finds {files}; all processes must see the same files"
            )
    return files


def read_file(path: str, options: RowOptions, say: Callable[[str], None]) -> list[dict]:
    """Return the examples of one file, in order, from the shares of all processes."""
    share = read_share(path, options)
    all_shares = shares.exchange([share.examples, share.bad_rows, share.fatal])
    examples = sorted_by_number(part[0] for part in all_shares)
    bad_rows = sorted_by_number(part[1] for part in all_shares)
    fatal = sorted_by_number(part[2] for part in all_shares)
    if fatal:
        raise UserError(fatal[0])
    if not examples and bad_rows:
        raise UserError(f"{path}: all {len(bad_rows)} rows are bad; the first: {bad_rows[0]}")
    if not examples:
        raise UserError(f"{path}: empty, there are no {options.kind} in it")
    if bad_rows:
        total = len(bad_rows) + len(examples)
        say(f"{path}: {len(bad_rows)} bad rows skipped of {total}; the first: {bad_rows[0]}")
    return examples


def sorted_by_number(parts: Iterator[list[tuple[int, Any]]]) -> list[Any]:
    """Return the values of numbered entries in the order of their numbers."""
    entries = [entry for part in parts for entry in part]
    return [value for _, value in sorted(entries, key=number_of)]


def number_of(entry: tuple[int, Any]) -> int:
    return entry[0]


def read_share(path: str, options: RowOptions) -> Share:
    """Read this process's share of a file; without `skip`, the first bad row ends the reading."""
    share = Share()
    try:
        for raw in raw_rows.read(path):
            try:
                share.examples.append((raw.number, read_row(raw, options)))
            except UserError as error:
                if error.details:  # a mistake in the code of a row format, not in the row
                    failures.print_details(error)
                    share.fatal.append((raw.number, str(error)))
                    break
                share.bad_rows.append((raw.number, str(error)))
                if not options.skip:
                    advice = 'data.on_bad_row="skip" leaves such rows out'
                    share.fatal.append((raw.number, f"{error}; {advice}"))
                    break
    except jsonl.Unreadable as error:
        share.fatal.append((error.line, str(error)))
    except OSError as error:
        share.fatal.append((0, f"{path}: cannot be read: {error.strerror or error}"))
    return share


def read_row(raw: RawRow, options: RowOptions) -> dict:
    """Return the example in a row, and where it stands."""
    if raw.fault:
        raise UserError(raw.fault)
    try:
        example = formats.example_of(raw.value, options.kind, options.columns)
    except UserError as error:
        raise UserError(f"{raw.where}: {error}") from None
    except Exception as error:
        error.add_note(f"while a row format read {raw.where}")
        if user_code.went_through(error):
            raise user_code.error_of(
                f"{raw.where}: a row format of {options.kind}", error
            ) from None
        raise
    return {"where": raw.where} | example
