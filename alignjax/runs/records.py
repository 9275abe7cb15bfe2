"""Read what a run wrote to its work directory: its config, its summary, and its JSON lines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignjax.config import UserError
from alignjax.machine import jsonl


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

    Raises UserError if the directory holds no run, or if a line contains invalid JSON.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir}: no config.json there, so this is not a run")
    return Records(
        workdir=workdir,
        config=read_object(workdir / "config.json"),
        summary=read_object(workdir / "summary.json"),
        metrics=read_lines(workdir / "metrics.jsonl"),
        samples=read_lines(workdir / "samples.jsonl"),
        evaluations=read_lines(workdir / "evaluations.jsonl"),
        timing=read_lines(workdir / "timing.jsonl"),
        responses=read_lines(workdir / "responses.jsonl"),
    )


def read_object(path: Path) -> Any:
    """Return the contents of a JSON file, {} if there is no such file."""
    return jsonl.parse(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}


def read_lines(path: Path) -> list[dict]:
    """Return the rows of a JSON-lines file, none if there is no such file.

    An incomplete last line, which a running command is still writing, is left out.
    """
    return jsonl.read(path, unfinished=True) if path.exists() else []
