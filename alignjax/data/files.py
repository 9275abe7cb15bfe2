"""A user's own examples: JSON lines, plain or gzipped, or Parquet. A bad row is named by file and line (or row).

Comparisons come in the forms that TRL takes: an explicit prompt (text or messages) with two replies (text or messages),
or two whole conversations (messages, or a transcript as text) that share their prompt.
"""

import glob
import gzip
import json
import math
import zlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from alignjax.config import UserError, nearest
from alignjax.data import transcripts

FIELDS = {"text": ("text",), "conversations": ("messages",), "comparisons": ("chosen", "rejected"),
          "prompts": ("prompt",)}  # fmt: skip


def read(pattern: str, kind: str, skip: bool = False, say=print) -> list[dict]:
    """The rows of all files that match `pattern`, each with the fields of its kind and `where` it stands.

    text: text; conversations: messages; comparisons: prompt (messages), chosen, rejected (text), margin (0 unless
    given); prompts: prompt (messages), and `columns`, whatever else the row has. Raises UserError naming file, line,
    field, and what was found and wanted; with `skip`, bad rows are left out instead, and their number and the first are
    said. A file that can't be read, or has no good row, is an error in any case.
    """
    paths = sorted(glob.glob(str(pattern)))
    if not paths:
        raise UserError(f"{pattern}: no such file")
    rows = []
    for path in paths:
        before, bad = len(rows), []
        for where, value in (parquet if path.endswith(".parquet") else lines)(path):
            try:
                rows.append(row(value, where, kind))
            except UserError as error:
                if not skip:
                    raise UserError(f'{error}; data.on_bad_row="skip" leaves such rows out') from None
                bad.append(error)
        if bad:
            say(f"{path}: {len(bad)} bad rows skipped of {len(bad) + len(rows) - before}; the first: {bad[0]}")
        if len(rows) == before:
            raise UserError(f"{path}: empty, there are no {kind} in it")
    return rows


def lines(path: str) -> Iterator[tuple[str, str]]:
    """(where, text) of each line that is not empty."""
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}:{number + 1}: JSON lines in UTF-8 wanted, {error}") from None


def parquet(path: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of each row, columns that are null left out."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            values = (value for batch in file.iter_batches() for value in batch.to_pylist())
            for number, value in enumerate(values, 1):
                yield f"{path}: row {number}", {k: v for k, v in value.items() if v is not None}
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: Parquet wanted, {error}") from None


def row(value, where: str, kind: str) -> dict:
    """One checked row, from JSON text or an object: the kind's fields, and where it stands."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: an object wanted, {found(value)}")
    for name in FIELDS[kind]:
        if name not in value:
            raise UserError(f"{where}: {kind} need a field {name!r}{nearest(name, sorted(value))}")
    out = {"where": where}
    if kind == "text":
        if not isinstance(value["text"], str):
            raise UserError(f"{where}: text: text wanted, {found(value['text'])}")
        return out | {"text": value["text"]}
    if kind == "prompts":
        prompt = messages(value["prompt"], f"{where}: prompt", text=True)
        return out | {"prompt": prompt, "columns": {k: v for k, v in value.items() if k != "prompt"}}
    if kind == "conversations":
        turns = messages(value["messages"], f"{where}: messages", text=False)
        if not any(m["role"] == "assistant" for m in turns):
            roles = ", ".join(m["role"] for m in turns)
            raise UserError(f"{where}: messages: a message of the role assistant wanted, the roles found are {roles}")
        return out | {"messages": turns}
    margin = value.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f"{where}: margin: a number wanted, {found(margin)}")
    return out | comparison(value, where) | {"margin": float(margin)}


def comparison(value: dict, where: str) -> dict:
    """prompt as messages, chosen and rejected as text, from any of the forms."""
    sides = [value[name] for name in ("chosen", "rejected")]
    if "prompt" not in value:
        if all(isinstance(side, str) for side in sides):
            sides = [transcripts.transcript(side) for side in sides]
            if None in sides:
                raise UserError(f"{where}: comparisons without a prompt need whole conversations as chosen and rejected: "
                                "messages, or a transcript with '\\n\\nHuman: ' and '\\n\\nAssistant: ' before its turns")  # fmt: skip
        both = [messages(side, f"{where}: {name}", text=False)
                for side, name in zip(sides, ("chosen", "rejected"), strict=True)]  # fmt: skip
        parts = transcripts.split(*both)
        if isinstance(parts, str):
            raise UserError(
                f"{where}: chosen and rejected must be one conversation but for the assistant's last turn: {parts}"
            )
        return dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))
    prompt = messages(value["prompt"], f"{where}: prompt", text=True)
    replies = [reply(side, prompt, f"{where}: {name}")
               for side, name in zip(sides, ("chosen", "rejected"), strict=True)]  # fmt: skip
    return {"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}


def reply(value, prompt: list[dict], where: str) -> str:
    """The text of a reply: text, or the assistant's one message, with the prompt's before it or without."""
    if isinstance(value, str):
        return value
    turns = messages(value, where, text=True)
    rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if [m["role"] for m in rest] != ["assistant"]:
        roles = ", ".join(m["role"] for m in turns)
        raise UserError(f"{where}: one message of the role assistant wanted after the prompt, the roles are {roles}")
    return rest[0]["content"]


def messages(value, where: str, text: bool) -> list[dict]:
    """Checked messages; plain text, where it is allowed, is one user turn."""
    if text and isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {'text or ' if text else ''}a list of messages wanted, {found(value)}")
    for i, message in enumerate(value):
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                raise UserError(f"{where}[{i}]: an object with {field} as text wanted, {found(message)}")
    return value


def found(value) -> str:
    text = json.dumps(value, default=str)
    return f"{type(value).__name__} found: {text[:80]}{'...' if len(text) > 80 else ''}"
