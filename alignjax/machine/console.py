"""What commands print: errors, lines that keep a progress bar intact, the bar, and tables."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from tqdm import tqdm

from alignjax.config import UserError
from alignjax.machine.processes import Stopped

USER_ERROR = 2  # exit code
INTERRUPTED = 128 + signal.SIGINT  # exit code
TERMINAL_REFRESH = 0.5  # seconds between two updates of a bar on a terminal
LOG_REFRESH = 15.0  # the same where each update is a new line, in a file or a pipe


def run_command(
    command: Callable[[], int | None],
    errors: tuple[type[Exception], ...] = (),
    interrupted: str | None = None,
) -> int:
    """Run the body of a command and return its exit code.

    An error that the user can mend is printed as one line on standard error:

    - UserError, below its details if it has any, and the types in `errors`: exit code 2.
    - Stopped, after a run has saved: 0 after SIGTERM, else 128 + the number of the signal.
    - KeyboardInterrupt, if `interrupted` is the text to print ("interrupted"): 130. Otherwise
      it passes through.

    The exit code of a body that returns nothing is 0.
    """
    try:
        return command() or 0
    except Stopped as stopped:
        if jax.process_index() == 0:
            print_error(str(stopped))
        return 0 if stopped.number == signal.SIGTERM else 128 + stopped.number
    except (UserError, *errors) as error:
        print_details(error)
        print_error(str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        print_error(interrupted)
        return INTERRUPTED


def print_error(text: str) -> None:
    """Print a line of an error on standard error."""
    print(f"alignjax: {text}", file=sys.stderr)


def print_details(error: BaseException) -> None:
    """Print the details of an error, such as a traceback of the user's own code, if it has any."""
    details = getattr(error, "details", "")
    if details:
        print(details.rstrip("\n"), file=sys.stderr)


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
    **options: bool,
) -> tqdm:
    """Make a progress bar on standard error; it is a context manager that closes the bar.

    On a terminal the bar is redrawn twice a second. Elsewhere it is a line every `log_refresh`
    seconds. `options` are further options of tqdm, such as `leave` and `unit_scale`.
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
