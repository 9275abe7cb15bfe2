"""A claim of the report as a study: arms that are held against each other, and what came of their runs as a table, a picture
and a page. `study` runs it."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from alignjax.runs.records import Records

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#999999",
)  # Okabe and Ito
SMOOTH = 20  # a curve is a mean over this part of its steps


class Study(NamedTuple):
    title: str
    claim: str  # what the report says, and what is compared at which budget
    # label -> {dotted field: value}, and "config" where it is another; the others are held against the first
    arms: dict[str, dict]
    figures: dict[
        str, str | Callable[[Records], float]
    ]  # label -> a name in summary.json, or what to make of a run
    curves: tuple[str, ...] = ()  # metrics to draw over the steps
    config: str = "ppo.py"
    found: str = ""  # what came out, once it has


class Trial(NamedTuple):
    """A run: one arm with one seed."""

    arm: str
    seed: int
    workdir: Path
    command: tuple[str, ...]
    steps: int


def mean(name: str, first: int = 0, last: int | None = None) -> Callable[[Records], float]:
    """A figure: the mean of a metric over the steps from `first` on, before `last`, that have it."""
    return lambda run: float(np.mean([row[name] for row in run.metrics[first:last] if name in row]))


def outcome(study: Study, mine: list[Trial], runs: list[Records]) -> dict:
    """Of an arm: what differs, its command of seed 0, seconds of training and figures, each of [seeds]."""
    figures = {
        label: [run.summary[what] if isinstance(what, str) else what(run) for run in runs]
        for label, what in study.figures.items()
    }
    return {
        "fields": study.arms[mine[0].arm],
        "command": shlex.join(mine[0].command),
        "seconds": [run.summary["training_seconds"] for run in runs],
        "figures": figures,
    }


def interval(values) -> tuple[float, float]:
    """(mean, half of its 95 % interval by Student's t, nan for one value)."""
    n = len(values)
    spread = np.std(values, ddof=1) if n > 1 else np.nan
    return float(np.mean(values)), float(stats.t.ppf(0.975, max(n - 1, 1)) * spread / np.sqrt(n))


def cells(found: dict) -> list[list[str]]:
    """The table: a line for each arm, with each figure's mean and half interval; and, from the second arm on, whether it
    differs from the first arm's, seed by seed, by more than the half interval of the difference: ↑, ↓."""
    labels = list(next(iter(found["arms"].values()))["figures"])
    first, out = None, [["", *labels]]
    for arm, had in found["arms"].items():
        first, line = first or had, [arm]
        for label in labels:
            middle, half = interval(had["figures"][label])
            change, room = interval(np.subtract(had["figures"][label], first["figures"][label]))
            sign = (" ↑" if change > 0 else " ↓") if abs(change) > room else ""
            line.append(f"{middle:.3g} ± {half:.2g}{sign}")
        out.append(line)
    return out


def picture(study: Study, found: dict, runs: dict[str, list[Records]]) -> Figure:
    """A panel for each curve, its mean over seeds and what lies between the least and the largest; and for each figure, a
    point for each seed."""
    figures = list(study.figures)
    columns = 4
    rows = -(-len(study.curves) // columns) + -(-len(figures) // columns)
    with matplotlib.rc_context(
        {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    ):
        whole = Figure(figsize=(3 * columns, 2.5 * rows), layout="constrained")
        axes = iter(whole.subplots(rows, columns).flat)
        for name in study.curves:
            curve_panel(axis := next(axes), runs, name)
            axis.set_title(name)
        for _ in range(-len(study.curves) % columns):
            next(axes).axis("off")
        for label in figures:
            axis = next(axes)
            for i, (had, colour) in enumerate(zip(found["arms"].values(), COLOURS, strict=False)):
                values = had["figures"][label]
                middle, half = interval(values)
                axis.plot(values, np.full(len(values), i), ".", color=colour, alpha=0.5)
                axis.errorbar(
                    [middle],
                    [i],
                    xerr=[np.nan_to_num(half)],
                    fmt="D",
                    markersize=4,
                    color=colour,
                    capsize=3,
                )
            axis.set_yticks(range(len(found["arms"])), found["arms"])
            axis.invert_yaxis()
            axis.set_title(label)
        for axis in axes:
            axis.axis("off")
        if study.curves:
            handles = whole.axes[0].get_lines()
            whole.legend(
                handles, list(study.arms), loc="outside lower center", ncols=len(study.arms)
            )
    return whole


def curve_panel(axis, runs: dict[str, list[Records]], name: str) -> None:
    for mine, colour in zip(runs.values(), COLOURS, strict=False):
        steps = [row["step"] for row in mine[0].metrics if name in row]
        if not steps:
            axis.plot([], [], color=colour)
            continue
        lines = np.array([[row[name] for row in run.metrics if name in row] for run in mine])
        width = max(1, len(steps) // SMOOTH)
        lines = np.apply_along_axis(
            lambda line: np.convolve(line, np.ones(width) / width, "valid"),  # noqa: B023
            1,
            lines,
        )
        axis.plot(steps[width - 1 :], lines.mean(0), color=colour, linewidth=1.2)
        axis.fill_between(
            steps[width - 1 :], lines.min(0), lines.max(0), color=colour, alpha=0.12, linewidth=0
        )
    axis.set_xlabel("step")


def document(out: Path) -> str:
    """All studies of a directory as one page."""
    parts = [
        "# Studies\n\nClaims of the report, put to the test in the embedded world. Each table has an arm a line: mean over the seeds "
        "± half of its 95 % interval (Student's t); ↑ and ↓ mark what differs from the first line, seed by seed, by more than the "
        "95 % interval of that difference. In the pictures a line is a mean over the seeds, its band goes from the least to "
        "the largest; a point is a seed. What holds here, in a world of five small tasks and a model of 0.4M parameters, "
        "need not hold elsewhere.\n"
    ]
    for path in sorted((out / "study").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        hours = sum(sum(had["seconds"]) for had in found["arms"].values()) / 3600
        table = cells(found)
        lines = ["| " + " | ".join(line) + " |" for line in table]
        lines.insert(1, "|---" * len(table[0]) + "|")
        commands = [f"{had['command']}  # {arm}" for arm, had in found["arms"].items()]
        parts.append(
            "\n".join(
                [
                    f"## {found['title']}\n",
                    f"{found['claim'].strip()}\n",
                    *lines,
                    "",
                    f"![{found['title']}](study/{found['name']}.png)\n",
                    f"{found['found'].strip()}\n",
                    f"`python -m alignjax.study {found['name']} --seeds {found['seeds']}`; seeds 0 to "
                    f"{found['seeds'] - 1}, {hours:.1f} hours of training, parents not counted. With seed 0:\n",
                    "```",
                    *commands,
                    "```\n",
                ]
            )
        )
    return "\n".join(parts)
