"""What commands print: errors, lines that keep a progress bar intact, the bar, and tables."""

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

import jax
from tqdm import tqdm

from alignjax.config import UserError, one_line
from alignjax.machine import failures
from alignjax.machine.arguments import Finished
from alignjax.machine.processes import Stopped, membership
from alignjax.machine.watchdog import watching_interrupts

LAST_STREAM = 2  # the number of standard error
TERMINAL_REFRESH = 0.5  # seconds between two updates of a bar on a terminal
LOG_REFRESH = 15.0  # the same where each update is a new line, in a file or a pipe


def run_command(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run the body of a command and return its exit code.

    Every error is one line on standard error, below its details if it has any; `failures` has the
    exit codes. A body that returns
    nothing gives 0, and so does a run that SIGTERM has stopped and that is saved. After another
    signal and a save the code is 128 + its number. Output that nobody reads any more, as in
    `command | head`, ends the command without a line.

    Args:
      command: the body, which parses its arguments too.
      interrupted: what to print after an interrupt that brings no text of its own.
    """
    prepare_streams()
    try:
        with watching_interrupts():
            code = exit_code_of(command)
        flush_output()
        return code
    except Stopped as stopped:
        if jax.process_index() == 0:
            print_error(str(stopped))
        return 0 if stopped.number == signal.SIGTERM else 128 + stopped.number
    except KeyboardInterrupt as interrupt:
        return report_failure(interrupt if interrupt.args else KeyboardInterrupt(interrupted))
    except (Exception, SystemExit) as error:
        return report_failure(error)


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Run the body of a command whose parser may end it."""
    try:
        return command() or 0
    except Finished as finished:
        return finished.code


def flush_output() -> None:
    """Write what is left in the buffer of standard output, while errors can be reported."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output: {error.strerror}") from None


def leave(code: int) -> NoReturn:
    """Leave Python with the exit code of a command.

    When Python ends, XLA waits for what the device still computes. After an interrupt nobody wants
    it, so the process ends at once, unless it has other processes to take leave of.
    """
    if code == failures.INTERRUPTED and membership().client is None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def report_failure(error: BaseException) -> int:
    """Print the line of an error, and return its exit code."""
    if isinstance(error, BrokenPipeError) and output_is_closed():
        discard_output()
        return failures.CLOSED_OUTPUT
    several_processes = membership().client is not None
    failure = failures.failure_of(error, several_processes=several_processes)
    failures.print_details(error)
    print_error(failure.line)
    try:
        sys.stdout.flush()
    except OSError:  # A full disk: Python would try once more, and print a traceback.
        discard_output()
    return failure.code


def prepare_streams() -> None:
    """Make the standard streams take any text.

    The null device replaces streams that the caller has closed: otherwise the next file that is
    opened would take the place of one, and what a library prints would end up in it.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= LAST_STREAM:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            # A terminal without some character shows its code.
            stream.reconfigure(errors="backslashreplace")


def output_is_closed() -> bool:
    """Return whether nobody reads standard output or standard error any more."""
    return any(is_closed(stream) for stream in (sys.stdout, sys.stderr))


def is_closed(stream: TextIO) -> bool:
    """Return whether a stream is a pipe or socket whose reader is gone."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a stream in memory
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def discard_output() -> None:
    """Send what is left in the buffers of the standard streams to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(null, stream.fileno())
    os.close(null)


def print_error(text: str) -> None:
    """Print an error as one line on standard error."""
    line = one_line(text)
    with contextlib.suppress(OSError):
        print(f"alignjax: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar_set_aside() -> Iterator[None]:
    """Let code that we did not write print without breaking the progress bar of a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    # Without tqdm's lock, because the code may use tqdm in threads of its own.
    with tqdm.external_write_mode(nolock=True):
        try:
            yield
        finally:
            sys.stdout.flush()


def say(text: str) -> None:
    """Print a line in the first process, above the progress bar if there is one."""
    if jax.process_index() != 0:
        return
    if sys.stderr.isatty():
        tqdm.write(text)
    else:
        print(text)
    sys.stdout.flush()


def progress_bar(
    total: int,
    description: str,
    unit: str,
    *,
    initial: int = 0,
    enabled: bool = True,
    log_refresh: float = LOG_REFRESH,
    **options: Any,
) -> tqdm:
    """Make a progress bar on standard error; it is a context manager that closes the bar.

    On a terminal the bar is redrawn twice a second. Elsewhere it is a line every `log_refresh`
    seconds. `options` are further options of tqdm, such as `leave`, `delay` and `unit_scale`.
    """
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=not enabled,
        dynamic_ncols=True,
        file=sys.stderr,
        mininterval=TERMINAL_REFRESH if on_terminal else log_refresh,
        **options,
    )


def table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Format a table of two columns, names and values, as text."""
    name_width = max(len(name) for name, _ in rows)
    value_width = max(len(value) for _, value in rows)
    rule = "-" * max(len(title), name_width + 2 + value_width)
    lines = [f"{name:<{name_width}}  {value}" for name, value in rows]
    return "\n".join([title, rule, *lines, rule])


def grid(
    title: str,
    head: tuple[str, Sequence[str]],
    lines: Sequence[tuple[str, Sequence[str]]],
) -> str:
    """Format a table of several columns; the head and each line are (name, cells)."""
    rows = [head, *lines]
    columns = zip(*(cells for _, cells in rows), strict=True)
    widths = [max(map(len, column)) for column in columns]
    return table(title, [(name, align_cells(cells, widths)) for name, cells in rows])


def align_cells(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Join cells, each padded to the width of its column."""
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join(padded).rstrip()
