"""The marker that says who made a directory: alignjax.json, a small JSON object.

It is written before anything else, so that a directory that was left half-made is known to be
ours, and any other directory is known not to be. Its entry "made_by" names the command.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

NAME = "alignjax.json"
TRAIN = "alignjax.train"  # "made_by" of a run
# What a run writes in its directory. No other command writes there.
RUN_NAMES = frozenset(
    {
        NAME,
        "config.json",
        "summary.json",
        "environment.json",
        "lock",
        "metrics.jsonl",
        "samples.jsonl",
        "timing.jsonl",
        "evaluations.jsonl",
        "responses.jsonl",
        "checkpoints",
        "damaged",
        "skipped",
        "tensorboard",
        "tokenizer",
        "profile",
        "imported.json",
        "wandb-id",
        "wandb",
    }
)


def dumps(entries: dict[str, Any]) -> str:
    """Return a marker's text, without a newline at its end."""
    return json.dumps(entries, indent=1)


def read(directory: Path) -> dict[str, Any]:
    """Return the entries of a directory's marker, {} if it has none that can be read."""
    return read_object(directory / NAME)


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, {} if there is none, whatever the reason."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def is_run(directory: Path) -> bool:
    """Return whether a run has claimed a directory, with a marker or, in old versions, without."""
    if read(directory).get("made_by") == TRAIN:
        return True
    return "stage" in read_object(directory / "config.json")
