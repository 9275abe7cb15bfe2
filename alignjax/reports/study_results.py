"""The results of a study: its record as JSON, its table, and the page of all studies.

A record is what `OUT/study/NAME.json` holds: name, title, claim, found (the study's outcome),
seeds, and for each arm its fields, its command with seed 0, and figures with a value a seed.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from alignjax.claims import BestOf, Figure, Study, fields_of
from alignjax.config import UserError
from alignjax.machine import outputs, pictures
from alignjax.reports.study_runs import Trial
from alignjax.runs.records import Records

QUANTILE = 0.975  # the upper end of a two-sided 95 % interval
RECORD_KEYS = frozenset({"name", "title", "claim", "found", "seeds", "arms"})
HEADING = """# Studies

Each study tests a claim of the report in the embedded world."""
INTRODUCTION = f"""{HEADING} In a table, each line is an \
arm, with the mean over the seeds ± half of its 95 % interval (Student's t). ↑ and ↓ mark \
a difference from the first line, taken seed by seed, that is larger than the 95 % \
interval of that difference. In a picture, a line is the mean over the seeds, the band \
around it reaches from the lowest to the highest seed, and a point is a seed. What holds \
here, in a world of five small tasks and for a model of 0.4M parameters, need not hold \
elsewhere.
"""


def study_record(
    name: str, study: Study, trials: list[Trial], runs: dict[str, list[Records]]
) -> dict:
    """Return the record of a study; `runs` has, by arm, the runs of its trials, by seed."""
    arms = {}
    for arm in study.arms:
        of_arm = [trial for trial in trials if trial.arm == arm]
        arms[arm] = arm_record(study, of_arm, runs[arm])
    return {
        "name": name,
        "title": study.title,
        "claim": study.claim,
        "found": study.found,
        "seeds": len({trial.seed for trial in trials}),
        "arms": arms,
    }


def arm_record(study: Study, trials: list[Trial], runs: list[Records]) -> dict:
    """Return an arm's fields and command, and its training time and figures for each seed."""
    first = trials[0]
    arm = study.arms[first.arm]
    return {
        "fields": fields_of(arm),
        "command": first.command_line,
        "seconds": [run.summary["training_seconds"] for run in runs],
        "figures": {
            label: [figure_value(figure, run, may_lack=isinstance(arm, BestOf)) for run in runs]
            for label, figure in study.figures.items()
        },
    }


def figure_value(figure: Figure, run: Records, may_lack: bool = False) -> float | None:
    """Return a figure of a run; None if the run may lack it and does.

    Raises UserError if the run must have it.
    """
    if not isinstance(figure, str):
        return figure(run)
    if figure not in run.summary and not may_lack:
        raise UserError(f"{run.workdir / 'summary.json'}: there is no figure {figure}")
    return run.summary.get(figure)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return (mean, half of its 95 % interval by Student's t, which is nan for one value)."""
    count = len(values)
    if count == 1:
        return float(values[0]), float("nan")
    half = stats.t.ppf(QUANTILE, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return float(np.mean(values)), float(half)


def table_rows(record: dict) -> list[list[str]]:
    """Return the cells of a study's table: a heading, then a line for each arm.

    An arrow marks a figure that differs from the first arm's, seed by seed, by more than half of
    the difference's interval.
    """
    arms = record["arms"]
    first = next(iter(arms.values()))["figures"]
    rows = [["", *first]]
    for arm, results in arms.items():
        figures = results["figures"]
        rows.append([arm, *(figure_cell(figures[label], first[label]) for label in first)])
    return rows


def figure_cell(values: list[float | None], first_values: list[float]) -> str:
    if None in values:
        return "-"
    change, half_of_change = interval(np.subtract(values, first_values))
    arrow = ""
    if abs(change) > half_of_change:
        arrow = " ↑" if change > 0 else " ↓"
    return f"{mean_cell(values)}{arrow}"


def mean_cell(values: Sequence[float]) -> str:
    """Return a mean with half of its 95 % interval as text."""
    middle, half = interval(values)
    return f"{middle:.3g} ± {half:.2g}"


@dataclass(frozen=True, kw_only=True)
class ResultFiles:
    """The files that a study writes."""

    record: Path
    picture: Path
    page: Path  # of all studies


def result_files(out: Path, name: str) -> ResultFiles:
    """Return where the results of a study go."""
    return ResultFiles(
        record=out / "study" / f"{name}.json",
        picture=out / "study" / f"{name}.png",
        page=out / "study.md",
    )


def check_files(out: Path, name: str, overwrite: bool) -> None:
    """Raise UserError unless a study may write its results, before its first run."""
    files = result_files(out, name)
    is_own = {
        files.record: functools.partial(outputs.has_keys, keys=RECORD_KEYS),
        files.picture: functools.partial(
            pictures.is_picture, record=files.record, keys=RECORD_KEYS
        ),
        files.page: functools.partial(outputs.begins_with, mark=HEADING.encode()),
    }
    for path, test in is_own.items():
        outputs.check_file(path, "--out", is_own=test, overwrite=overwrite, make_parents=True)


def document(out: Path) -> str:
    """Return the page of all studies whose records are in `out`/study."""
    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((out / "study").glob("*.json"))
    ]
    return "\n".join([INTRODUCTION, *map(study_section, records)])


def study_section(record: dict) -> str:
    """Return a study as Markdown: its claim, table, picture, outcome and commands."""
    name = record["name"]
    seeds = record["seeds"]
    arms = record["arms"]
    hours = sum(sum(results["seconds"]) for results in arms.values()) / 3600
    rows = table_rows(record)
    heading, *lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    commands = [f"{results['command']}  # {arm}" for arm, results in arms.items()]
    parts = [
        f"## {record['title']}\n",
        f"{record['claim'].strip()}\n",
        heading,
        "|---" * len(rows[0]) + "|",
        *lines,
        "",
        f"![{record['title']}](study/{name}.png)\n",
        f"{record['found'].strip()}\n",
        f"`python -m alignjax.study {name} --seeds {seeds}`; seeds 0 to {seeds - 1}, "
        f"{hours:.1f} hours of training, not counting the parents. With seed 0:\n",
        "```",
        *commands,
        "```\n",
    ]
    return "\n".join(parts)
