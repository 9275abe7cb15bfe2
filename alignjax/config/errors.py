"""Errors that commands print as one line, and the texts in them."""

import difflib
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A user's mistake: commands print it as one line, without a traceback, and exit with 2.

    `details` are lines to print above it: the traceback of an error in code that the user wrote.
    """

    def __init__(self, text: str = "", details: str = ""):
        super().__init__(text)
        self.details = details


# What loading does with a problem: it raises, or a check notes the problem and goes on.
Refuse = Callable[[str], None]


def refuse(message: str) -> None:
    """Raise UserError with this message."""
    raise UserError(message)


LONGEST_LINE = 2000  # characters of an error
LONGEST_VALUE = 80  # characters of a value in it


def rule(holds: bool, message: str) -> None:
    """Raise UserError unless a rule holds."""
    if not holds:
        raise UserError(message)


def one_line(text: str) -> str:
    """Return a text as one line of printable characters, shortened in the middle if very long."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    if len(line) > LONGEST_LINE:
        half = LONGEST_LINE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def first_line(text: str, longest: int = 500) -> str:
    """Return the first line of a text, at most `longest` characters of it."""
    lines = text.strip().splitlines()
    return lines[0][:longest] if lines else ""


def reason_of(error: BaseException, longest: int = LONGEST_LINE) -> str:
    """Return the first line of what another library's error says, or the error's type."""
    return first_line(str(error), longest) or type(error).__name__


def short(text: str) -> str:
    """Return a user's value as an error shows it: its beginning."""
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def describe_error(error: BaseException) -> str:
    """Return an exception as "TYPE: TEXT"."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the closest of the known names, or a list of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(map(repr, names))}"
