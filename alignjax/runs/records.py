"""What a run has left in its work directory, read again: its config, its summary, and its JSON lines."""

import json
from pathlib import Path
from typing import NamedTuple

from alignjax.config import UserError


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
    return parsed(path, path.read_text(encoding="utf-8"), "") if path.exists() else {}


def lines(path: Path) -> list[dict]:
    """The rows of a file of JSON lines, none if it isn't there; a torn last line, of a run that goes on, is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [
        parsed(path, line, f" line {i}") for i, line in enumerate(whole.splitlines(), 1) if line
    ]


def parsed(path: Path, text: str, where: str) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}{where}: {error}") from None
