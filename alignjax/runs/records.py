"""Read what a run wrote to its work directory: its config, its summary, and its JSON lines."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignjax.config import UserError, stored_config
from alignjax.machine import jsonl
from alignjax.machine import workdir as workdirs
from alignjax.runs import record_checks


@dataclass(frozen=True, kw_only=True)
class Records:
    """The files of a run, read. docs/metrics.md describes the rows."""

    workdir: Path
    config: dict[str, Any]  # {dotted field: value}, as `config.to_json` wrote it
    summary: dict[str, Any]  # the figures at the end of the run; {} until it is complete
    metrics: list[dict]  # one row for each step
    samples: list[dict]
    evaluations: list[dict]  # PPO on held-out data; [] without ppo.eval_every
    timing: list[dict]
    # PPO at its end: the answers of the reference and of the policy to held-out prompts.
    responses: list[dict]


def read(workdir: Path) -> Records:
    """Read the records of a run, complete or not.

    Raises UserError if the directory holds no run, or if a file does not have its form.
    """
    workdirs.check_files(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir}: no config.json there, so this is not a run")
    return Records(
        workdir=workdir,
        config=read_config(workdir / "config.json"),
        summary=read_summary(workdir / "summary.json"),
        metrics=read_lines(workdir / "metrics.jsonl", record_checks.check_figures),
        samples=read_lines(workdir / "samples.jsonl", record_checks.check_sample),
        evaluations=read_lines(workdir / "evaluations.jsonl", record_checks.check_evaluation),
        timing=read_lines(workdir / "timing.jsonl", record_checks.check_figures),
        responses=read_lines(workdir / "responses.jsonl", record_checks.check_pair),
    )


def read_result(workdir: Path) -> Records:
    """Read the records of a run, or of an evaluation, which has nothing but a summary."""
    if (workdir / "config.json").exists():
        return read(workdir)
    return Records(
        workdir=workdir,
        config={},
        summary=read_summary(workdir / "summary.json"),
        metrics=[],
        samples=[],
        evaluations=[],
        timing=[],
        responses=[],
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's config as {dotted field: value}."""
    return stored_config(read_object(path), str(path))


def read_summary(path: Path) -> dict[str, Any]:
    """Return the contents of summary.json, {} if there is no such file."""
    if not path.exists():
        return {}
    summary = read_object(path)
    record_checks.check_summary(summary, str(path))
    return summary


def read_object(path: Path) -> Any:
    """Return the contents of a JSON file, {} if there is no such file.

    A number that is not finite becomes None, as in JSON lines.
    """
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected JSON in UTF-8: {error}") from None
    return jsonl.null(jsonl.parse(text, str(path)))


def read_lines(
    path: Path, check: Callable[[Any, str], None] = record_checks.check_step
) -> list[dict]:
    """Return the rows of a JSON-lines file, none if there is no such file.

    An incomplete last line, which a running command is still writing, is left out.

    Args:
      path: the file.
      check: raises UserError for (row, where it is) if the row does not have its form.
    """
    rows = []
    if not path.exists():
        return rows
    for line in jsonl.lines(path):
        if line.text.endswith("\n"):
            row = jsonl.null(jsonl.parse(line.text, line.where))
            check(row, line.where)
            rows.append(row)
    return rows
