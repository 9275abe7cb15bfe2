"""The form of what a run writes, checked when it is read.

A damaged file is then one error with the file and the line, and readers rely on the form.
"""

from typing import Any

from alignjax.config import UserError
from alignjax.machine import jsonl

EXAMPLE_OF_SUMMARY = {
    "name": "run",
    "stage": "lm",
    "steps": 1,
    "training_seconds": 1.0,
    "table": [["figure", "1.0"]],
}
LARGEST = 2**63  # of a number that a run writes
# Lists of a sample with a figure for each response.
FIGURES = ("score", "true_score", "kl", "length", "truncated", "entropy")
OWN_SCORE = "score/"  # begins the list of the scores by one of several rewards


def expect(holds: bool, where: str, expected: str, value: Any) -> None:
    """Raise UserError unless a value has the expected form."""
    if not holds:
        raise UserError(f"{where}: expected {expected}, found {jsonl.describe(value)}")


def is_number(value: Any) -> bool:
    """Return whether a value is a number, or null, which stands for one that is not finite."""
    if value is None:
        return True
    return isinstance(value, int | float) and abs(value) < LARGEST


def is_whole(value: Any) -> bool:
    """Return whether a value counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def check_object(value: Any, where: str) -> None:
    expect(isinstance(value, dict), where, "an object", value)


def check_step(row: Any, where: str) -> None:
    """Check that a row is an object with a step."""
    check_object(row, where)
    step = row.get("step")
    expect(is_whole(step), f"{where}: step", "a whole number", step)


def check_figures(row: Any, where: str) -> None:
    """Check a row of metrics.jsonl or timing.jsonl: a step, and numbers."""
    check_step(row, where)
    for name, value in row.items():
        expect(is_number(value), f"{where}: {name}", "a number", value)


def check_evaluation(row: Any, where: str) -> None:
    """Check a row of evaluations.jsonl: a step, numbers, and samples."""
    check_step(row, where)
    samples = row.get("samples", [])
    expect(isinstance(samples, list), f"{where}: samples", "a list", samples)
    for sample in samples:
        check_responses(sample, f"{where}: samples")
    check_figures({name: value for name, value in row.items() if name != "samples"}, where)


def check_sample(row: Any, where: str) -> None:
    """Check a row of samples.jsonl, of any stage."""
    check_step(row, where)
    if "responses" in row:
        check_responses(row, where)
        return
    for name, value in row.items():
        if name.endswith(("_score", "_reward")):
            expect(is_number(value), f"{where}: {name}", "a number", value)
        elif name != "step":
            expect(isinstance(value, str), f"{where}: {name}", "a text", value)
    if "chosen" in row:
        expect("rejected" in row, where, "a rejected response", row)


def check_pair(row: Any, where: str) -> None:
    """Check a row of responses.jsonl: responses before and after training."""
    check_object(row, where)
    for side in ("before", "after"):
        check_responses(row.get(side), f"{where}: {side}")


def check_responses(column: Any, where: str) -> None:
    """Check responses to a prompt, and their figures and tokens, of which each has as many."""
    check_object(column, where)
    responses = column.get("responses")
    is_texts = isinstance(responses, list) and all(isinstance(text, str) for text in responses)
    expect(is_texts, f"{where}: responses", "a list of texts", responses)
    for name in column:
        if name in FIGURES or name.startswith(OWN_SCORE):
            values = column[name]
            holds = isinstance(values, list) and len(values) == len(responses)
            expected = f"a list of {len(responses)} numbers"
            expect(holds and all(map(is_number, values)), f"{where}: {name}", expected, values)
    if "tokens" in column:
        check_tokens(column, where)


def check_tokens(column: dict, where: str) -> None:
    """Check that each response has a list of tokens, and as many log-ratios."""
    for name in ("tokens", "log_ratio"):
        values = column.get(name)
        holds = isinstance(values, list) and len(values) == len(column["responses"])
        expect(
            holds and all(isinstance(value, list) for value in values),
            f"{where}: {name}",
            f"{len(column['responses'])} lists",
            values,
        )
    for tokens, log_ratios in zip(column["tokens"], column["log_ratio"], strict=True):
        is_texts = all(isinstance(token, str) for token in tokens)
        expect(is_texts, f"{where}: tokens", "texts", tokens)
        holds = len(log_ratios) == len(tokens) and all(map(is_number, log_ratios))
        expect(holds, f"{where}: log_ratio", f"{len(tokens)} numbers", log_ratios)


def check_summary(summary: Any, where: str) -> None:
    """Check summary.json: the types of what every stage writes, as far as it is there."""
    check_object(summary, where)
    check_result(EXAMPLE_OF_SUMMARY | summary, where)


def check_result(summary: dict, where: str) -> None:
    """Check that a summary has what every stage writes, and a table of two columns of texts."""
    for name in ("name", "stage"):
        expect(isinstance(summary.get(name), str), f"{where}: {name}", "a text", summary.get(name))
    steps = summary.get("steps")
    expect(is_whole(steps), f"{where}: steps", "a whole number", steps)
    seconds = summary.get("training_seconds")
    is_time = is_number(seconds) and seconds is not None
    expect(is_time, f"{where}: training_seconds", "a number", seconds)
    table = summary.get("table")
    holds = isinstance(table, list) and all(map(is_row_of_texts, table))
    expect(holds and table, f"{where}: table", "rows of two texts", table)


def is_row_of_texts(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 2 and all(isinstance(cell, str) for cell in row)
