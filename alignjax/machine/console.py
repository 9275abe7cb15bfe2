"""Messages on the terminal: lines that keep a progress bar intact, and tables."""

import sys
from collections.abc import Callable

import jax
from tqdm import tqdm

from alignjax.config import UserError


def run_command(command: Callable[[], int | None]) -> int:
    """Run the body of a command and return its exit code.

    A `UserError` is printed as one line on standard error and gives 2; a body that returns
    nothing gives 0.
    """
    try:
        return command() or 0
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2


def say(text: str) -> None:
    """Print a line, in the first process alone."""
    if jax.process_index() == 0:
        (tqdm.write if sys.stderr.isatty() else print)(
            text
        )  # where there is a bar to be seen, it isn't torn
        sys.stdout.flush()


def table(title: str, rows: list[tuple[str, str]]) -> str:
    """A two-column table as text."""
    width = max(len(name) for name, _ in rows)
    rule = "-" * max(len(title), width + 2 + max(len(value) for _, value in rows))
    return "\n".join([title, rule, *(f"{name:<{width}}  {value}" for name, value in rows), rule])


def grid(title: str, head, lines) -> str:
    """A table of several columns, each line (name, cells)."""
    rows = [head, *lines]
    widths = [max(map(len, cells)) for cells in zip(*(cells for _, cells in rows), strict=True)]
    line = lambda cells: "  ".join(map(str.ljust, cells, widths)).rstrip()
    return table(title, [(name, line(cells)) for name, cells in rows])
