"""Tokenise the rows of a data set, divided among processes, and find those that cannot be.

A row cannot be tokenised if the chat template refuses it, or leaves out its reply, or if its text
is not one: half of a surrogate pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.config import UserError
from alignjax.data import chat, shares

# Rows that are tokenised at a time: lists of ids take many times the memory of arrays.
CHUNK = 4096

IdColumns = dict[str, list[list[int]]]  # named columns, each with the ids of every row
Encoded = TypeVar("Encoded")  # whatever a function makes of rows
# (tokenizer, rows) -> columns
ToColumns = Callable[[PreTrainedTokenizerBase, list[dict]], IdColumns]


class Part(NamedTuple):
    """Columns of some rows, and what is wrong with those that could not be encoded."""

    columns: IdColumns  # a bad row has no ids
    faults: dict[int, str]  # place of the row -> what is wrong


class Tokenised(NamedTuple):
    """The columns of the rows that could be encoded, and the numbers of these rows."""

    columns: shares.Columns
    numbers: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """What is done with a row that cannot be encoded."""

    skip: bool = False  # leave it out and count it, instead of an error
    say: Callable[[str], None] = print  # prints how many were left out


DEFAULT_RULES = RowRules()


def tokenise(
    to_columns: ToColumns,
    names: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    kind: str,
    rules: RowRules,
) -> Tokenised:
    """Return the columns of these names that a function makes of rows, as arrays.

    The function gets CHUNK rows at a time. Of several processes each tokenises its share.

    Raises:
      UserError: a row cannot be encoded and is not to be skipped, or none can be encoded.
    """
    if kind != "text":
        chat.end_token(tokenizer)  # a template that is of no use is no fault of a row
    columns: shares.Columns = {name: [] for name in names}
    local_rows = shares.local(rows)
    faults = []  # pairs of a row's number among the local ones and what is wrong
    for first in range(0, len(local_rows), CHUNK):
        part = encode_part(to_columns, names, tokenizer, local_rows[first : first + CHUNK])
        for name in names:
            columns[name] += [np.asarray(ids, np.int32) for ids in part.columns[name]]
        faults += [[first + place, fault] for place, fault in part.faults.items()]
    bad_rows = report_faults(faults, rows, kind, rules)
    numbers = np.setdiff1d(np.arange(len(rows)), bad_rows)
    whole = shares.whole_columns(columns)
    good = {name: [column[number] for number in numbers] for name, column in whole.items()}
    return Tokenised(good, numbers)


def encode_part(
    to_columns: ToColumns,
    names: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
) -> Part:
    """Encode rows at once if all can be encoded; otherwise, find those that cannot by halving."""
    try:
        return Part(to_columns(tokenizer, rows), {})
    except UserError as error:
        if len(rows) == 1:
            return Part({name: [[]] for name in names}, {0: str(error)})
    half = len(rows) // 2
    first = encode_part(to_columns, names, tokenizer, rows[:half])
    second = encode_part(to_columns, names, tokenizer, rows[half:])
    columns = {name: [*first.columns[name], *second.columns[name]] for name in names}
    later_faults = {half + place: fault for place, fault in second.faults.items()}
    return Part(columns, first.faults | later_faults)


def naming_rows(encode: Callable[[list[dict]], Encoded], rows: list[dict]) -> Encoded:
    """Return encode(rows); if a row cannot be encoded, the UserError begins with its place."""
    try:
        return encode(rows)
    except UserError:
        for number, row in enumerate(rows):
            try:
                encode([row])
            except UserError as error:
                raise UserError(f"{place_of(row, number, len(rows))}: {error}") from None
        raise


def place_of(row: dict, number: int, count: int) -> str:
    """Return where a row stands, as errors name it."""
    return row.get("where", f"row {number + 1} of {count}")


def report_faults(
    local_faults: list[list], rows: list[dict], kind: str, rules: RowRules
) -> np.ndarray:
    """Return the numbers of the bad rows of all processes; every process must call this.

    Args:
      local_faults: pairs of a row's number among those of this process and what is wrong.
      rows: all rows.
      kind: what the rows are.
      rules: whether bad rows are skipped, and counted, or are an error.
    """
    all_faults = shares.exchange(local_faults)
    faults = {}
    for process, part in enumerate(all_faults):
        faults |= {process + number * len(all_faults): fault for number, fault in part}
    if not faults:
        return np.zeros(0, np.int64)
    first = min(faults)
    where = place_of(rows[first], first, len(rows))
    if not rules.skip:
        advice = 'data.on_bad_row="skip" leaves such rows out'
        raise UserError(f"{where}: {faults[first]}; {advice}")
    if len(faults) == len(rows):
        raise UserError(f"all {len(rows)} {kind} are bad; the first: {where}: {faults[first]}")
    count = f"{len(faults)} of {len(rows)} {kind} cannot be encoded and are skipped"
    rules.say(f"{count}; the first: {where}: {faults[first]}")
    return np.array(sorted(faults))
