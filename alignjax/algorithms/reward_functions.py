"""A user's function as a source of scores.

    def reward(prompts, responses, **columns) -> scores

`prompts` are lists of messages, `responses` texts without their end token, `columns` the other
fields of each prompt's row; all are lists of one length. The scores are as many numbers, in a
list, an array, or any other sequence; a rollout with one that is not finite produces no update.

The function gets copies, so what it does to them changes nothing else. Every call has the same
columns, those of all rows of the run, with None where a row lacks one. A column whose name is
that of the parameter for the prompts or the responses gets "_" appended. The function must accept
columns that it does not use.

The function must be pure: a run that resumes calls it again, and so does each of several
processes. It is called once with one prompt before anything is loaded, and once more for each
row of a rollout in which it raises an exception, to find the row.
"""

import contextlib
import copy
import inspect
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from alignjax.algorithms import plugins
from alignjax.config import UserError
from alignjax.machine import console, user_code

SEARCH_SECONDS = 20.0  # of calls with single rows, to find the one that raises an exception
USUAL_NAMES = ("prompts", "responses")  # of the parameters, where a function does not show them
NO_LISTS = (str, bytes, bytearray, Mapping, Set)  # iterable, but no scores in the rows' order


@dataclass(frozen=True, kw_only=True)
class FunctionReward:
    """A user's function as a text-based reward."""

    field: str  # of the config, that names it
    spec: str  # module:function
    function: Callable[..., Any]
    keywords: Mapping[str, str]  # column of the rows -> the keyword under which it is passed

    @property
    def name(self) -> str:
        """Return how errors begin."""
        return f"{self.field}={self.spec}"

    def __call__(self, rows: list[dict], responses: list[str]) -> np.ndarray:
        """Return the scores of the function, as float32.

        Raises:
          UserError: for an exception of the function, with its traceback; for scores that are
            too few or too many, or not numbers.
        """
        try:
            with console.bar_set_aside():
                result = self.invoke(rows, responses)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self.failure(error, rows, responses) from None
        scores = self.check(result, rows, responses)
        with np.errstate(over="ignore"):
            return np.asarray(scores, np.float64).astype(np.float32)

    def invoke(self, rows: list[dict], responses: Sequence[str]) -> Any:
        """Call the function with copies, and return what it returns; an iterator as a list."""
        # Rows may be one object, so each is copied by itself.
        prompts = [copy.deepcopy(row["prompt"]) for row in rows]
        columns = {
            keyword: [copy.deepcopy(row.get("columns", {}).get(column)) for row in rows]
            for column, keyword in self.keywords.items()
        }
        result = self.function(prompts, list(responses), **columns)
        return list(result) if isinstance(result, Iterator) else result

    def failure(self, error: BaseException, rows: list[dict], responses: list[str]) -> UserError:
        """Return the error for an exception of the function; it names the row, if one raises it."""
        number = self.find_row(error, rows, responses)
        if number is None:
            called = f" for {len(rows)} responses, the first to the prompt of {where(rows[0])}"
        else:
            called = for_response(rows[number], responses[number])
        return user_code.error_of(self.name, error, called)

    def find_row(self, error: BaseException, rows: list[dict], responses: list[str]) -> int | None:
        """Return the number of the first row that raises the same exception when it is alone."""
        if len(rows) == 1:
            return 0
        deadline = time.monotonic() + SEARCH_SECONDS
        for number, (row, response) in enumerate(zip(rows, responses, strict=True)):
            if time.monotonic() > deadline:
                return None
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    self.invoke([row], [response])
            except KeyboardInterrupt:
                raise
            except BaseException as other:
                if type(other) is type(error) and user_code.place(other) == user_code.place(error):
                    return number
        return None

    def check(self, result: Any, rows: list[dict], responses: list[str]) -> list[float]:
        """Return the scores as numbers; raise UserError if they are not one for each response."""
        responses_to = f"{len(rows)} responses, the first to the prompt of {where(rows[0])}"
        items = self.items(result, responses_to)
        if len(items) != len(rows):
            raise UserError(f"{self.name}: {len(items)} scores for {responses_to}")
        numbers = []
        for item, row, response in zip(items, rows, responses, strict=True):
            number = number_of(item)
            if number is None:
                raise UserError(
                    f"{self.name}: score {user_code.describe_value(item)}"
                    f"{for_response(row, response)} is not a number"
                )
            numbers.append(number)
        return numbers

    def items(self, result: Any, responses_to: str) -> list:
        """Return what a function returned as a list; raise UserError if it is no list of scores.

        `responses_to` describes the responses that it scored.
        """
        wanted = f"expected a list or an array of numbers for {responses_to}"
        if inspect.iscoroutine(result):
            result.close()  # otherwise Python warns that it was never awaited
            raise UserError(f"{self.name}: {wanted}, found a coroutine: write no async function")
        if isinstance(result, np.ndarray | jax.Array) and result.ndim != 1:
            raise UserError(f"{self.name}: {wanted}, found an array of shape {list(result.shape)}")
        if isinstance(result, NO_LISTS) or not isinstance(result, Iterable):
            value = user_code.describe_value(result)
            raise UserError(f"{self.name}: {wanted}, found {type(result).__name__} {value}")
        with user_code.errors_named(self.name):
            if isinstance(result, jax.Array):
                result = np.asarray(result)  # one copy to the host, not one for each number
            return list(result)


def load(field: str, spec: str, rows: list[dict]) -> FunctionReward:
    """Import the function that a field of the config names, for the rows of a run.

    Raises:
      UserError: if there is no such function, or it does not accept the columns of the rows.
    """
    function = plugins.load_function(field, spec)
    reward = FunctionReward(
        field=field,
        spec=spec,
        function=function,
        keywords=choose_keywords(function, column_names(rows)),
    )
    check_signature(reward, rows)
    return reward


def column_names(rows: list[dict]) -> list[str]:
    """Return the columns of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row.get("columns", {})))


def choose_keywords(function: Callable, columns: Sequence[str]) -> dict[str, str]:
    """Return the keyword for each column: its name, but no parameter that is taken already."""
    return free_keywords(positional_names(function, len(USUAL_NAMES)), columns)


def free_keywords(taken: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """Return the keyword for each column: its name, with "_" behind a name that is taken."""
    keywords = {}
    for column in columns:
        keyword = column
        while keyword in taken or (keyword != column and keyword in columns):
            keyword += "_"
        keywords[column] = keyword
    return keywords


def positional_names(function: Callable, count: int) -> tuple[str, ...]:
    """Return the names of the parameters that take the first `count` positional arguments.

    Parameters that are positional only do not count: a keyword may have their name.
    """
    # The parameter for the object of a method, and those that a partial object fills, take part.
    if hasattr(function, "func") and hasattr(function, "args"):
        return positional_names(function.func, count + len(function.args))
    if inspect.ismethod(function):
        return positional_names(function.__func__, count + 1)
    if not inspect.isroutine(function):
        return positional_names(type(function).__call__, count + 1)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function of C
        return USUAL_NAMES
    return tuple(
        parameter.name
        for parameter in parameters[:count]
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )


def check_signature(reward: FunctionReward, rows: list[dict]) -> None:
    """Raise UserError if a function does not accept prompts, responses and the rows' columns."""
    keywords = list(reward.keywords.values())
    try:
        signature = inspect.signature(reward.function)
    except (TypeError, ValueError):  # a function of C: the call will show
        return
    try:
        signature.bind([], [], **dict.fromkeys(keywords, []))
    except TypeError as error:
        columns = ", ".join(map(repr, keywords)) or "none"
        example = next((row for row in rows if row.get("columns")), rows[0])
        raise UserError(
            f"{reward.name}: {error}; it must accept prompts, responses and the columns of the "
            f"prompts' rows, such as {where(example)} ({columns}), for example by **columns"
        ) from None


def number_of(value: Any) -> float | None:
    """Return a score as a float, None if it is not a number; one too large is infinite.

    Python's numbers count, and those of NumPy, JAX and others alone or in an array of no axes.
    Text, complex numbers, times and masked values do not.
    """
    if isinstance(value, np.ma.core.MaskedConstant):
        return None
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "mM":
        return None
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        try:
            value = value.item()
        except Exception:
            return None
    if not isinstance(value, int | float | Decimal | Fraction | np.floating):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except ValueError:  # a signalling NaN of Decimal
        return math.nan


def where(row: dict) -> str:
    """Return the file and the line of a prompt's row."""
    return row.get("where", "the embedded world")


def for_response(row: dict, response: str) -> str:
    """Return which response an error is about."""
    return f" for the response {response[:80]!r} to the prompt of {where(row)}"
