"""Checks of the values in a row.

What passes can be tokenised, trained on, saved and printed. Every error names
the field, and what was expected and found.
"""

import math
from typing import Any

import numpy as np

from alignjax.config import UserError
from alignjax.machine import jsonl

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
INTEGERS = range(-(2**63), 2**63)  # that numpy and JAX can hold
DEEPEST = 100  # objects and lists in each other


def checked_text(value: Any, field: str, expected: str = "text") -> str:
    """Return a text, which must be one that UTF-8 can express."""
    if not isinstance(value, str):
        raise UserError(f"{field}: expected {expected}, found {jsonl.describe(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{field}: expected text, found half of a surrogate pair, "
                f"{value[error.start]!r}, at character {error.start}"
            ) from None
    return value


def checked_number(value: Any, field: str) -> float:
    """Return a number that float32 can hold, in which training computes."""
    number = as_float(value)
    if number is None or math.isnan(number):
        raise UserError(f"{field}: expected a number, found {jsonl.describe(value)}")
    if abs(number) > LARGEST_FLOAT32:
        raise UserError(
            f"{field}: expected a number in the range of float32, found {jsonl.describe(value)}"
        )
    return number


def as_float(value: Any) -> float | None:
    """Return a number as float, infinite if it is too large for one; None if it is no number.

    Parquet has decimal numbers too.
    """
    is_text = isinstance(value, str | bytes | bool)
    if is_text or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def checked_object(value: dict, prefix: str = "", depth: int = 0) -> dict:
    """Return an object with every field checked; errors put the prefix before a field's name."""
    return {
        checked_text(name, f"{prefix}the name of a field"): checked_json(
            item, f"{prefix}{name}", depth
        )
        for name, item in value.items()
    }


def checked_json(value: Any, field: str, depth: int = 0) -> Any:
    """Return a value in JSON's types, as a reward function or a chat template gets it.

    Parquet has more types, and a time, say, becomes text.

    Raises:
      UserError: it is nested over DEEPEST, or contains half a surrogate pair, bytes, or a number
        that is not finite or does not fit in 64 bits.
    """
    if depth > DEEPEST:
        raise UserError(f"{field[:80]}: objects or lists are nested over {DEEPEST} deep")
    if isinstance(value, dict):
        return checked_object(value, f"{field}.", depth + 1)
    if isinstance(value, list | tuple):
        return [
            checked_json(item, f"{field}[{index}]", depth + 1) for index, item in enumerate(value)
        ]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field}: expected a finite number, found {jsonl.describe(value)}")
    if isinstance(value, int) and value not in INTEGERS:
        raise UserError(
            f"{field}: expected a whole number of 64 bits, found {jsonl.describe(value)}"
        )
    if isinstance(value, bytes):
        raise UserError(f"{field}: expected a value that JSON can express, found bytes")
    if value is None or isinstance(value, bool | int | float):
        return value
    return checked_text(str(value), field)
