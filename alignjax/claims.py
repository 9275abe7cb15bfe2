"""A claim of the report as a study: arms that are compared, and the figures to compare.

A file of studies/ defines one `study`, which `python -m alignjax.study` runs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignjax.config import UserError, short
from alignjax.runs.records import Records

Figure = str | Callable[[Records], float]  # a name in summary.json, or what to compute from a run


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """An arm that trains nothing: the best of n responses under a reward model.

    Policy, reward model, prompts and sampling are those of the study's config, whose parents an
    earlier arm has run.
    """

    n: int = 16


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of several configs, each run with the same seeds."""

    title: str
    claim: str  # what the report says, what is compared, and at which budget
    # Label -> {dotted field: value}, and "config" where it differs from the study's; or BestOf. All
    # arms are compared with the first one, which trains.
    arms: dict[str, dict[str, Any] | BestOf]
    # Label -> figure; an arm whose summary lacks a named figure has none, but for the first arm.
    figures: dict[str, Figure]
    curves: tuple[str, ...] = ()  # metrics to draw over the steps
    config: str = "ppo.py"
    # What the runs have shown, once they are complete. Files of studies use this name.
    found: str = ""


def fields_of(arm: dict[str, Any] | BestOf) -> dict[str, Any]:
    """Return what makes an arm, as JSON takes it."""
    return {"best_of": arm.n} if isinstance(arm, BestOf) else arm


def check(study: Any, where: str) -> Study:
    """Return what a file calls its study, once it has the form of one.

    Raises:
      UserError: it begins with `where`, and names the field.
    """
    if not isinstance(study, Study):
        raise UserError(f"{where} has no `study`, an alignjax.claims.Study")
    for name in ("title", "claim", "config", "found"):
        value = getattr(study, name)
        expect(isinstance(value, str), where, name, "a text", value)
    expect(is_table(study.arms), where, "arms", "a dict that is not empty", study.arms)
    first_arm = next(iter(study.arms))
    is_trained = not isinstance(study.arms[first_arm], BestOf)
    expect(is_trained, where, f"arms[{first_arm!r}]", "{dotted field: value}", study.arms)
    for arm, fields in study.arms.items():
        if isinstance(fields, BestOf):
            continue
        is_right = isinstance(fields, dict) and all(isinstance(name, str) for name in fields)
        expect(is_right, where, f"arms[{arm!r}]", "{dotted field: value}", fields)
        spec = fields.get("config", study.config)
        expect(isinstance(spec, str), where, f"arms[{arm!r}]['config']", "a text", spec)
    expect(is_table(study.figures), where, "figures", "a dict that is not empty", study.figures)
    for label, figure in study.figures.items():
        is_right = isinstance(figure, str) or callable(figure)
        expect(is_right, where, f"figures[{label!r}]", "a name or a function", figure)
    is_names = isinstance(study.curves, tuple | list)
    expect(
        is_names and all(isinstance(name, str) for name in study.curves),
        where,
        "curves",
        "a tuple of names",
        study.curves,
    )
    return study


def is_table(value: Any) -> bool:
    """Return whether a value is a dict with names, and not empty."""
    return isinstance(value, dict) and bool(value) and all(isinstance(key, str) for key in value)


def expect(holds: bool, where: str, field: str, expected: str, value: Any) -> None:
    """Raise UserError unless a field of a study has the expected form."""
    if not holds:
        raise UserError(f"{where}: study.{field} must be {expected}, not {short(repr(value))}")


def mean(name: str, first: int = 0, last: int | None = None) -> Callable[[Records], float]:
    """Return a figure: the mean of a metric over the steps from `first` on, before `last`.

    Steps without the metric do not count.
    """
    return functools.partial(mean_of_run, name=name, first=first, last=last)


def mean_of_run(run: Records, name: str, first: int, last: int | None) -> float:
    return float(np.mean([row[name] for row in run.metrics[first:last] if name in row]))
