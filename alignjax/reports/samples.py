"""The samples of the report page: prompts with the responses to them, side by side."""

from collections.abc import Iterator

import numpy as np

from alignjax.runs.record_checks import OWN_SCORE
from alignjax.runs.records import Records

ROWS = 400  # of a kind of samples, taken evenly from all of them
# Figure of a response -> its label on the page.
FIGURES = {
    "score": "score",
    "reward": "implicit reward",
    "true_score": "true score",
    "kl": "KL",
    "length": "length",
    "truncated": "cut off",
}
SORTED_BY = ("score", "implicit reward", "true score", "KL", "length")
# A row of a file, and {title of a column: responses with lists of their figures}.
Sample = tuple[dict, dict[str, dict]]
BEFORE = "reference, before training"
AFTER = "policy, after training"


def sample_sources(run: Records) -> list[dict]:
    """Return the kinds of samples that a run has.

    Each is {"kind": its title, "total": how many rows there are, "rows": at most `ROWS` of them}.
    """
    kinds = {
        "held-out prompts, at the end": list(samples_at_the_end(run)),
        "held-out prompts, during training": list(samples_midway(run)),
        "training": [(row, training_columns(row)) for row in run.samples],
    }
    return [
        {
            "kind": kind,
            "total": len(samples),
            "rows": [page_row(row, columns) for row, columns in evenly(samples)],
        }
        for kind, samples in kinds.items()
        if samples
    ]


def samples_at_the_end(run: Records) -> Iterator[Sample]:
    for row in run.responses:
        yield row, {BEFORE: row["before"], AFTER: row["after"]}


def samples_midway(run: Records) -> Iterator[Sample]:
    for evaluation in run.evaluations:
        for entry in evaluation.get("samples", []):
            yield entry | {"step": evaluation["step"]}, {"policy": entry}


def evenly(rows: list[Sample]) -> list[Sample]:
    """Return at most `ROWS` of these rows, spread evenly."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), ROWS)).astype(int)
    return [rows[place] for place in np.unique(places)]


def training_columns(row: dict) -> dict[str, dict]:
    """Return {title: column} of a row of samples.jsonl, of any stage."""
    if "responses" in row:
        return {"policy": row}
    if "chosen" in row:
        return {side: comparison_column(row, side) for side in ("chosen", "rejected")}
    return {name: {"responses": [row[name]]} for name in ("text", "targets") if name in row}


def comparison_column(row: dict, side: str) -> dict:
    """Return a side of a comparison as a column, with the reward model's score or DPO's reward."""
    column = {"responses": [row[side]]}
    for name in ("score", "reward"):
        if f"{side}_{name}" in row:
            column[name] = [row[f"{side}_{name}"]]
    return column


def page_row(row: dict, columns: dict[str, dict]) -> dict:
    """Return a row as the page's script reads it.

    A column holds "responses" and lists of their figures. The row has "prompt" and "step", if
    they are known, "sides" as {title: responses}, and "sort": {what it can be sorted by: value}.
    """
    shown = {name: row[name] for name in ("prompt", "step") if name in row}
    shown["sides"] = {title: page_responses(column) for title, column in columns.items()}
    return shown | {"sort": sort_keys(shown)}


def page_responses(column: dict) -> list[dict]:
    """Return each response of a column with its figures and, if they are known, its tokens."""
    labels = {name: label for name, label in FIGURES.items() if name in column}
    # The scores by each of several rewards are labelled by its name.
    labels |= {name: name.removeprefix(OWN_SCORE) for name in column if name.startswith(OWN_SCORE)}
    responses = []
    for place, text in enumerate(column["responses"]):
        figures = {label: column[name][place] for name, label in labels.items()}
        response = {"text": text, "figures": figures}
        if "tokens" in column:
            response["tokens"] = column["tokens"][place]
            response["log_ratio"] = column["log_ratio"][place]
        responses.append(response)
    return responses


def sort_keys(row: dict) -> dict[str, float]:
    """Return what a row can be sorted by.

    That is its step, the mean figures of its last column (of a comparison, the chosen one), and
    the difference of the scores or rewards of two columns.
    """
    columns = list(row["sides"].values())
    if "chosen" in row["sides"]:
        columns.reverse()
    *others, own = columns
    keys = {name: mean_figure(own, name) for name in SORTED_BY}
    keys["step"] = row.get("step")
    for name in ("score", "implicit reward", "true score"):
        other = mean_figure(others[0], name) if others else None
        if keys[name] is not None and other is not None:
            keys[f"difference of {name}s"] = keys[name] - other
    return {name: value for name, value in keys.items() if value is not None}


def mean_figure(responses: list[dict], name: str) -> float | None:
    """Return the mean of a figure, or None if a response lacks it."""
    values = [response["figures"].get(name) for response in responses]
    return float(np.mean(values)) if values and None not in values else None
