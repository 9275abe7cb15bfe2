"""What a run has left in its work directory, read again: its config, its summary, and its JSON lines."""

from pathlib import Path
from typing import NamedTuple

from alignjax.config import UserError
from alignjax.machine import jsonl


class Records(NamedTuple):
    workdir: Path
    config: dict  # {dotted field: value}, as `config.to_json` wrote it
    summary: dict  # the figures of its end; {} while it isn't complete
    metrics: list[dict]  # a row a step, see docs/metrics.md
    samples: list[dict]
    evaluations: list[dict]  # of PPO, on what is held out; [] without ppo.eval_every
    timing: list[dict]
    responses: list[
        dict
    ]  # of PPO at its end: prompts that are held out, answered by the reference and by the policy


def read(workdir: Path) -> Records:
    """The records of a run, complete or not; UserError where there is none, or a line of its files is no JSON."""
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir}: no config.json there, so this is not a run")
    rows = (lines(workdir / f"{name}.jsonl") for name in Records._fields[3:])
    return Records(workdir, one(workdir / "config.json"), one(workdir / "summary.json"), *rows)


def one(path: Path) -> dict:
    return jsonl.parse(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}


def lines(path: Path) -> list[dict]:
    """The rows of a file of JSON lines, none if it isn't there; a torn last line, of a run that goes on, is left out."""
    return jsonl.read(path, unfinished=True) if path.exists() else []
