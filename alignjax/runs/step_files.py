"""The JSON-lines files of a run, which grow by rows of numbered steps."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignjax.machine import jsonl, outputs
from alignjax.runs import records

# Every run has these. "evaluations" is opened by its first row, because not every run has one.
KINDS = ("metrics", "samples", "timing")
LOST = "lost"  # 1 in the row of a step whose figures are lost


class StepFiles:
    """The files metrics, samples, timing and evaluations of a run, open for appending."""

    def __init__(self, workdir: Path, start: int, say: Callable[[str], object] = print):
        """Open the files, and drop rows of the steps from `start` on.

        A run that was cut off after its last checkpoint has such rows; it writes them again. A
        file that is damaged before is kept in damaged/, and `say` reports it.
        """
        self.workdir = workdir
        self.files = {}
        for kind in (*KINDS, "evaluations"):
            restore_rows(self.path(kind), start, say, every_step=kind == "metrics")
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
        with outputs.writing(self.path(kind)):
            self.files[kind].write(jsonl.dumps([row]) + "\n")
            self.files[kind].flush()

    def sync(self) -> None:
        """Wait until all rows are on the disk, where a loss of power cannot reach them."""
        for kind, file in self.files.items():
            with outputs.writing(self.path(kind)):
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close all files, even if one of them fails."""
        with contextlib.ExitStack() as stack:
            for kind, file in self.files.items():
                stack.enter_context(outputs.writing(self.path(kind)))
                stack.callback(file.close)

    def _open(self, kind: str) -> None:
        with outputs.writing(self.path(kind)):
            self.files[kind] = self.path(kind).open("a", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What could be read of a file of rows."""

    rows: list[tuple[int, bytes]]  # (step, line without its end), in the file's order
    damaged_lines: list[int]  # their numbers, from 1; a torn last line does not count


def restore_rows(
    path: Path, start: int, say: Callable[[str], object], *, every_step: bool = False
) -> None:
    """Keep the rows of a JSON-lines file for the steps before `start`.

    A last line that a crash left incomplete is dropped too. If other lines can't be read, or, with
    `every_step`, if a step before `start` has no row, the file is kept as it was in damaged/, and
    `say` reports it. The rows that can be read stay, and a step without a row gets one that says
    so: {"step": STEP, "lost": 1}.
    """
    if not path.exists() and not (every_step and start):
        return
    contents = read_contents(path)
    kept = [(step, line) for step, line in contents.rows if step < start]
    lines = [line for _, line in kept]
    absent = []
    if every_step:
        by_step = dict(reversed(kept))  # of several rows of a step, the first
        absent = [step for step in range(start) if step not in by_step]
        lost = {step: json.dumps({"step": step, LOST: 1}).encode() for step in absent}
        lines = [line for _, line in sorted((by_step | lost).items())]
    if absent or contents.damaged_lines:
        report_damage(path, contents, absent, say)
    outputs.write_bytes(path, b"".join(line + b"\n" for line in lines))


def read_contents(path: Path) -> Contents:
    """Read the rows of a file, as far as it can be read."""
    if not path.exists():
        return Contents(rows=[], damaged_lines=[])
    with outputs.writing(path):
        *lines, last = path.read_bytes().split(b"\n")
    rows = []
    damaged = []
    for number, line in enumerate([*lines, last], 1):
        step = step_of(line)
        if step is not None:
            rows.append((step, line))
        elif line.strip() and (number <= len(lines) or b"\0" in line):
            damaged.append(number)
    return Contents(rows=rows, damaged_lines=damaged)


def step_of(line: bytes) -> int | None:
    """Return the step of a row, None if the line is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError.
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def report_damage(
    path: Path, contents: Contents, absent: list[int], say: Callable[[str], object]
) -> None:
    """Report a damaged file, and keep it as it is in damaged/, unless it is missing."""
    problems = []
    if not path.exists():
        problems.append("the file is missing")
    if contents.damaged_lines:
        problems.append(f"line {spans(contents.damaged_lines)} can't be read")
    if absent:
        problems.append(f"the rows of steps {spans(absent)} are lost, and marked so")
    kept = ""
    if path.exists():
        aside = outputs.free_path(path.parent / "damaged" / path.name)
        with outputs.writing(aside):
            aside.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, aside)
        kept = f"; it is kept in {aside}"
    say(f"{path}: {', '.join(problems)}{kept}")


def spans(numbers: list[int]) -> str:
    """Return ascending numbers as text: "1, 3-5, 8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
