"""A claim of the report as a study: arms that are compared, and the figures to compare.

A file of studies/ defines one `study`, which `python -m alignjax.study` runs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignjax.runs.records import Records

Figure = str | Callable[[Records], float]  # a name in summary.json, or what to compute from a run


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of several configs, each run with the same seeds."""

    title: str
    claim: str  # what the report says, what is compared, and at which budget
    # Label -> {dotted field: value}, and "config" where it differs from the study's. All arms are
    # compared with the first one.
    arms: dict[str, dict[str, Any]]
    figures: dict[str, Figure]  # label -> figure
    curves: tuple[str, ...] = ()  # metrics to draw over the steps
    config: str = "ppo.py"
    # What the runs have shown, once they are complete. Files of studies use this name.
    found: str = ""


def mean(name: str, first: int = 0, last: int | None = None) -> Callable[[Records], float]:
    """Return a figure: the mean of a metric over the steps from `first` on, before `last`.

    Steps without the metric do not count.
    """
    return functools.partial(mean_of_run, name=name, first=first, last=last)


def mean_of_run(run: Records, name: str, first: int, last: int | None) -> float:
    return float(np.mean([row[name] for row in run.metrics[first:last] if name in row]))
