"""The JSON-lines files of a run, which grow by rows of numbered steps."""

import contextlib
from pathlib import Path
from typing import Any

from alignjax.config import UserError
from alignjax.machine import jsonl
from alignjax.runs import records

# Every run has these. "evaluations" is opened by its first row, because not every run has one.
KINDS = ("metrics", "samples", "timing")


class StepFiles:
    """The files metrics, samples, timing and evaluations of a run, open for appending."""

    def __init__(self, workdir: Path, start: int):
        """Open the files, and drop rows of the steps from `start` on.

        A run that was cut off after its last checkpoint has such rows; it writes them again.
        """
        self.workdir = workdir
        self.files = {}
        for kind in (*KINDS, "evaluations"):
            drop_rows(self.path(kind), start)
        for kind in KINDS:
            self._open(kind)

    def path(self, kind: str) -> Path:
        """Return the path of a file."""
        return self.workdir / f"{kind}.jsonl"

    def rows(self, kind: str) -> list[dict]:
        """Return the rows that are in a file."""
        return records.read_lines(self.path(kind))

    def append(self, kind: str, row: dict[str, Any]) -> None:
        """Append a row; a number in it that is not finite becomes null."""
        if kind not in self.files:
            self._open(kind)
        self.files[kind].write(jsonl.dumps([row]) + "\n")
        self.files[kind].flush()

    def close(self) -> None:
        """Close all files, even if one of them fails."""
        with contextlib.ExitStack() as stack:
            for file in self.files.values():
                stack.callback(file.close)

    def _open(self, kind: str) -> None:
        self.files[kind] = self.path(kind).open("a", encoding="utf-8")


def drop_rows(path: Path, start: int) -> None:
    """Keep the rows of a JSON-lines file for the steps before `start`.

    A last line that a crash left incomplete is dropped too.
    """
    if not path.exists():
        return
    kept = []
    for line in jsonl.lines(path):
        try:
            if jsonl.parse(line.text, line.where)["step"] < start:
                kept.append(line.text.rstrip("\n") + "\n")
        except (UserError, KeyError):
            break
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
