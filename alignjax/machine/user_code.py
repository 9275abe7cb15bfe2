"""Errors in code that a user wrote: one line, and above it the user's own traceback.

A config names functions (rewards, samplers, estimators) or is itself a file of code. What such
code raises becomes a `UserError` here. Its text is one line, and its `details` hold the traceback
without the frames that are not the user's.
"""

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Iterator

from alignjax.config import CONFIGS, PACKAGE, UserError, one_line

LONGEST_TEXT = 300  # characters of an exception's text in a line
LONGEST_VALUE = 80  # characters of a value in a line
PATHS = sysconfig.get_paths()
INSTALLED = tuple(os.path.join(PATHS[name], "") for name in ("purelib", "platlib"))
STANDARD = tuple(os.path.join(PATHS[name], "") for name in ("stdlib", "platstdlib"))


@contextlib.contextmanager
def errors_named(name: str) -> Iterator[None]:
    """Turn what the body raises into a UserError that begins with `name`.

    SystemExit is an error too. KeyboardInterrupt passes through, because Ctrl-C raises it.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise error_of(name, error) from None


def error_of(name: str, error: BaseException, suffix: str = "") -> UserError:
    """Return the UserError for an exception of the user's code.

    The user's own UserError keeps its text, and has no traceback.
    """
    if isinstance(error, UserError):
        return UserError(f"{name}: {one_line(str(error))}{suffix}", error.details)
    position = place(error)
    at = f" ({position})" if position else ""
    return UserError(f"{name}: {describe_exception(error)}{at}{suffix}", own_traceback(error))


def describe_exception(error: BaseException) -> str:
    """Return the type and the text of an exception in one line."""
    try:
        text = one_line(str(error))[:LONGEST_TEXT]
    except Exception:
        text = ""
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind


def describe_value(value: object) -> str:
    """Return the representation of a value in one short line, whatever its type does."""
    try:
        text = one_line(repr(value))
    except Exception:
        return f"of type {type(value).__name__}"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def place(error: BaseException) -> str:
    """Return "file:line" of the user's last frame, or of a syntax error; "" if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{os.path.basename(error.filename)}:{error.lineno}"
    frames = own_frames(traceback.extract_tb(error.__traceback__))
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""


def went_through(error: BaseException) -> bool:
    """Return whether code outside of what is installed took part in an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(not is_ours(frame) and not is_library(frame) for frame in frames)


def own_traceback(error: BaseException) -> str:
    """Format an exception and those that it follows from, with the user's frames only.

    It is empty if no frame is the user's, except for a syntax error, which shows its line.
    """
    report = traceback.TracebackException.from_exception(error)
    keep_own_frames(report)
    if not report.stack and not isinstance(error, SyntaxError):
        return ""
    return "".join(report.format())


def keep_own_frames(report: traceback.TracebackException | None) -> None:
    """Drop the frames that are not the user's from a report and those that it follows from."""
    if report is None:
        return
    report.stack = traceback.StackSummary.from_list(own_frames(report.stack)) or None
    keep_own_frames(report.__cause__)
    keep_own_frames(report.__context__)
    for part in getattr(report, "exceptions", None) or []:
        keep_own_frames(part)


def own_frames(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Return the frames that are the user's.

    A user's code may be an installed package. So if no frame is outside of what is installed,
    those of installed packages below our last frame count.
    """
    own = [frame for frame in frames if not is_ours(frame) and not is_library(frame)]
    if own:
        return own
    below_ours = []
    for frame in frames:
        below_ours = [] if is_ours(frame) else [*below_ours, frame]
    return [frame for frame in below_ours if frame.filename.startswith(INSTALLED)]


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Return whether a frame is of this package; the configs that come with it are the user's."""
    return is_below(frame.filename, PACKAGE) and not is_below(frame.filename, CONFIGS)


def is_library(frame: traceback.FrameSummary) -> bool:
    """Return whether a frame is of Python itself or of an installed package."""
    if is_below(frame.filename, CONFIGS):
        return False
    return frame.filename.startswith(("<frozen ", *STANDARD, *INSTALLED))


def is_below(path: str, directory: os.PathLike) -> bool:
    """Return whether a path is inside a directory."""
    return path.startswith(os.path.join(os.fspath(directory), ""))
