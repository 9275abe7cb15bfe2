"""All that the report page shows of a set of runs, as JSON takes it."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alignjax import config as configs
from alignjax.config import Config, kind_of_source
from alignjax.reports.charts import page_charts
from alignjax.reports.samples import sample_sources
from alignjax.runs import advice, records
from alignjax.runs.records import Records

POINTS = 2000  # of a curve; a longer one is thinned

Point = tuple[int, float]  # (step, value)


def page_content(runs: list[Records]) -> dict:
    """Return the data of the page: runs, charts, samples, and the defaults of the config."""
    described = [describe(run) for run in runs]
    for run, title in zip(described, distinct_titles(runs), strict=True):
        run["title"] = title
    return {
        "runs": described,
        "charts": page_charts(described),
        "sources": [
            {"run": number, **source}
            for number, run in enumerate(runs)
            for source in sample_sources(run)
        ],
        "defaults": config_texts(dict(configs.flatten(Config()))),
    }


def run_title(run: Records) -> str:
    return str(run.config.get("name", run.workdir.name))


def distinct_titles(runs: list[Records]) -> list[str]:
    """Return titles that differ: names, or else directories; seeds of a config share a name."""
    names = [run_title(run) for run in runs]
    directories = [run.workdir.name for run in runs]
    for titles in (names, directories):
        if len(set(titles)) == len(titles):
            return titles
    return [str(run.workdir) for run in runs]


def describe(run: Records) -> dict:
    """Return what the page shows of a run, except its samples."""
    steps = run.summary.get("steps") or run.config.get("steps") or None
    seconds = round(sum(row.get("seconds") or 0 for row in run.timing), 1)
    table = run.summary.get("table", [])
    warnings = advice.advise(run.config, run.metrics, run.evaluations)
    return {
        "title": run_title(run),
        "directory": str(run.workdir),
        "stage": run.config.get("stage"),
        "steps": steps,  # None: one pass over data whose length is not known here
        "done": run.metrics[-1]["step"] + 1 if run.metrics else 0,
        "seed": run.config.get("seed"),
        "complete": bool(run.summary),
        "seconds": run.summary.get("training_seconds") or seconds,
        "table": [[label, " ".join(text.split())] for label, text in table],
        "parents": [parent(run, spec, roles) for spec, roles in roles_of_parents(run).items()],
        "config": config_texts(run.config),
        "environments": environments(run),
        "summary": numbers(run.summary),
        "warnings": [dataclasses.asdict(warning) for warning in warnings],
        "series": training_curves(run),
        "heldout": heldout_curves(run, steps),
    }


def numbers(summary: dict) -> dict[str, float]:
    return {name: value for name, value in summary.items() if isinstance(value, int | float)}


def environments(run: Records) -> list[dict]:
    recorded = records.read_object(run.workdir / "environment.json")
    return recorded if isinstance(recorded, list) else []


def config_texts(config: dict) -> dict[str, str]:
    """Return the values of a config as text, each entry of a dictionary by itself."""
    texts = {}
    for name, value in config.items():
        fields = {name: value}
        if isinstance(value, dict):
            fields = {f"{name}.{key}": entry for key, entry in value.items()}
        texts |= {field: json.dumps(text, ensure_ascii=False) for field, text in fields.items()}
    return texts


def roles_of_parents(run: Records) -> dict[str, list[str]]:
    """Return, for each parent of a run, the roles that begin with it."""
    specs = dict(run.config.get("parents", {}))
    for name, entry in run.config.get("ppo.rewards", {}).items():
        if kind_of_source(entry.get("source", "")) == "model":
            specs[f"reward {name}"] = entry["source"]
    roles = {}
    for role, spec in specs.items():
        roles.setdefault(spec, []).append(role)
    return roles


def parent(run: Records, spec: str, roles: list[str]) -> dict:
    """Return what the page shows of a parent; its results are empty if its run is not here."""
    directory = parent_directory(run, spec)
    summary = records.read_summary(directory / "summary.json") if directory else {}
    return {
        "roles": roles,
        "spec": spec,
        "table": summary.get("table", []),
        "summary": numbers(summary),
    }


def parent_directory(run: Records, spec: str) -> Path | None:
    """Return where a parent's run would be, or None if its config cannot be loaded."""
    if not spec.partition(":")[0].endswith(".py"):
        return Path(spec)
    try:
        return run.workdir.parent / configs.load(spec).name
    except Exception:  # whatever the code of a config raises that is gone or of another version
        return None


def training_curves(run: Records) -> dict[str, dict]:
    """Return {metric: curve} of a run's metrics and, under "timing/", of its times."""
    timing = [timing_row(row) for row in run.timing]
    curves = {name: curve(run.metrics, name) for name in names_in(run.metrics)}
    curves |= {name: curve(timing, name) for name in names_in(timing) - {"step"}}
    return dict(sorted(curves.items()))


def timing_row(row: dict) -> dict:
    return {"step": row["step"]} | {f"timing/{name}": value for name, value in row.items()}


def heldout_curves(run: Records, steps: int | None) -> dict[str, dict]:
    """Return {figure: curve} on held-out data: the evaluations midway, then those at the end."""
    ends = {
        name.removesuffix("/after"): value
        for name, value in run.summary.items()
        if name.endswith("/after")
    }
    rows = run.evaluations + ([{"step": steps} | ends] if ends else [])
    figures = names_in(rows) - {"step", "prompts", "samples"}
    return {name: curve(rows, name) for name in sorted(figures)}


def names_in(rows: list[dict]) -> set[str]:
    return {name for row in rows for name in row}


def curve(rows: list[dict], name: str) -> dict:
    """Return {"steps": [...], "values": [...]} of a figure, in the rows that have a finite one.

    A long curve is thinned, and each value has six digits.
    """
    points = thin(list(finite_points(rows, name)))
    return {
        "steps": [step for step, _ in points],
        "values": [float(f"{value:.6g}") for _, value in points],
    }


def finite_points(rows: list[dict], name: str) -> Iterator[Point]:
    for row in rows:
        value = row.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            yield row["step"], value


def thin(points: list[Point]) -> list[Point]:
    """Return the points of a curve, at most `POINTS` of them.

    Of a longer curve they are the first, the last, and the lowest and the highest of each of
    `POINTS` / 2 stretches, so that no spike is lost.
    """
    if len(points) <= POINTS:
        return points
    values = np.array([value for _, value in points])
    kept = {0, len(points) - 1}
    for places in np.array_split(np.arange(len(points)), POINTS // 2 - 1):
        kept.add(places[values[places].argmin()])
        kept.add(places[values[places].argmax()])
    return [points[place] for place in sorted(kept)]
