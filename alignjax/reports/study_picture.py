"""The picture of a study: a panel for each curve, then a panel for each figure."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignjax.claims import Study
from alignjax.reports.study_results import interval
from alignjax.runs.records import Records

# The palette of Okabe and Ito.
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#999999",
)
SMOOTHING = 20  # a curve is a moving mean over this part of its steps
COLUMNS = 4
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


def draw_study(study: Study, record: dict, runs: dict[str, list[Records]]) -> Figure:
    """Draw a study; `runs` has, by arm, a run for each seed, and `record` the study's figures."""
    curve_rows = -(-len(study.curves) // COLUMNS)
    figure_rows = -(-len(study.figures) // COLUMNS)
    rows = curve_rows + figure_rows
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(3 * COLUMNS, 2.5 * rows), layout="constrained")
        axes = list(picture.subplots(rows, COLUMNS).flat)
        for axis, name in zip(axes, study.curves, strict=False):
            draw_curve(axis, name, runs)
        figure_axes = axes[curve_rows * COLUMNS :]
        for axis, label in zip(figure_axes, study.figures, strict=False):
            draw_figure(axis, label, record["arms"])
        unused = axes[len(study.curves) : curve_rows * COLUMNS]
        for axis in unused + figure_axes[len(study.figures) :]:
            axis.axis("off")
        if study.curves:
            arms = list(study.arms)
            lines = picture.axes[0].get_lines()
            picture.legend(lines, arms, loc="outside lower center", ncols=len(arms))
    return picture


def draw_curve(axis: Axes, name: str, runs: dict[str, list[Records]]) -> None:
    """Draw a metric: each arm's mean over the seeds, in a band from the lowest to the highest."""
    for of_arm, colour in zip(runs.values(), COLOURS, strict=False):
        steps = [row["step"] for row in of_arm[0].metrics if name in row]
        if not steps:
            axis.plot([], [], color=colour)
            continue
        width = max(1, len(steps) // SMOOTHING)
        values = [[row[name] for row in run.metrics if name in row] for run in of_arm]
        curves = np.array([moving_mean(row, width) for row in values])
        ends = steps[width - 1 :]
        axis.plot(ends, curves.mean(0), color=colour, linewidth=1.2)
        axis.fill_between(ends, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)
    axis.set_xlabel("step")
    axis.set_title(name)


def moving_mean(values: list[float], width: int) -> np.ndarray:
    return np.convolve(values, np.ones(width) / width, "valid")


def draw_figure(axis: Axes, label: str, arms: dict[str, dict]) -> None:
    """Draw a figure: for each arm a point for each seed, and the mean with its interval."""
    for place, (results, colour) in enumerate(zip(arms.values(), COLOURS, strict=False)):
        values = results["figures"][label]
        if None in values:
            continue
        middle, half = interval(values)
        axis.plot(values, np.full(len(values), place), ".", color=colour, alpha=0.5)
        axis.errorbar(
            [middle],
            [place],
            xerr=[np.nan_to_num(half)],
            fmt="D",
            markersize=4,
            color=colour,
            capsize=3,
        )
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()
    axis.set_title(label)
