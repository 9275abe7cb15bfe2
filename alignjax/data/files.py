"""A user's own examples: JSON lines, plain or gzipped, or Parquet. A bad row is named by file and line (or row).

Comparisons come in the forms that TRL takes: an explicit prompt (text or messages) with two replies (text or messages),
or two whole conversations (messages, or a transcript as text) that share their prompt.
"""

import glob
import json
import math
from collections.abc import Iterator

import jax
import pyarrow
import pyarrow.parquet

from alignjax.config import UserError, nearest
from alignjax.data import shares, transcripts
from alignjax.machine import jsonl

FIELDS = {
    "text": ("text",),
    "conversations": ("messages",),
    "comparisons": ("chosen", "rejected"),
    "prompts": ("prompt",),
}


def read(pattern: str, kind: str, skip: bool = False, say=print) -> list[dict]:
    """The rows of all files that match `pattern`, each with the fields of its kind and `where` it stands.

    text: text; conversations: messages; comparisons: prompt (messages), chosen, rejected (text), margin (0 unless
    given); prompts: prompt (messages), and `columns`, whatever else the row has, in JSON's types: a time is text. Raises
    UserError naming file, line, field, and what was found and wanted; with `skip`, bad rows are left out instead, and
    their number and the first are said. A file that can't be read, or has no good row, is an error in any case. Of
    several processes each reads its share, and all come to the same.
    """
    paths = sorted(glob.glob(str(pattern)))
    if not paths:
        raise UserError(f"{pattern}: no such file")
    for i, theirs in enumerate(shares.exchange(paths)):
        if theirs != paths:
            raise UserError(
                f"{pattern}: process {i} finds {theirs}, process {jax.process_index()} {paths}; all processes "
                "must see the same files"
            )
    out = []
    for path in paths:
        found = zip(*shares.exchange(share(path, kind, skip)), strict=True)
        rows, bad, fatal = ([x for part in parts for x in part] for parts in found)
        if fatal:
            raise UserError(min(fatal)[1])
        if bad:
            say(
                f"{path}: {len(bad)} bad rows skipped of {len(bad) + len(rows)}; the first: {min(bad)[1]}"
            )
        if not rows:
            raise UserError(f"{path}: empty, there are no {kind} in it")
        out += [row for _, row in sorted(rows, key=lambda numbered: numbered[0])]
    return out


def share(path: str, kind: str, skip: bool) -> tuple[list, list, list]:
    """This process's share of a file: good rows, what is wrong with bad ones, and what it stopped at, all numbered."""
    rows, bad = [], []
    try:
        for number, where, value in (parquet if path.endswith(".parquet") else lines)(path):
            try:
                rows.append((number, row(value, where, kind)))
            except UserError as error:
                bad.append((number, str(error)))
                if not skip:
                    return (
                        rows,
                        bad,
                        [(number, f'{error}; data.on_bad_row="skip" leaves such rows out')],
                    )
    except Unreadable as error:
        return rows, bad, [error.args]
    return rows, bad, []


class Unreadable(Exception):
    """(number of the row, message): from there on a file can't be read."""


def lines(path: str) -> Iterator[tuple[int, str, str]]:
    """(number, where, text) of this process's share of the lines; of those that are not empty."""
    count, index = jax.process_count(), jax.process_index()
    try:
        yield from jsonl.lines(path, process=index, processes=count)
    except jsonl.Unreadable as error:
        raise Unreadable(error.line, str(error)) from None


def parquet(path: str) -> Iterator[tuple[int, str, dict]]:
    """(number, where, row) of this process's share of the rows, columns that are null left out."""
    before, count, index = 0, jax.process_count(), jax.process_index()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                numbers = range(
                    before + (index - before - 1) % count + 1, before + len(batch) + 1, count
                )
                mine = batch.take(
                    pyarrow.array([number - before - 1 for number in numbers], pyarrow.int32())
                )
                for number, value in zip(
                    numbers, (mine if count > 1 else batch).to_pylist(), strict=True
                ):
                    yield (
                        number,
                        f"{path}: row {number}",
                        {k: v for k, v in value.items() if v is not None},
                    )
                before += len(batch)
    except (OSError, pyarrow.ArrowException) as error:
        raise Unreadable(before + 1, f"{path}: Parquet wanted, {error}") from None


def row(value, where: str, kind: str) -> dict:
    """One checked row, from JSON text or an object: the kind's fields, and where it stands."""
    if isinstance(value, str):
        value = jsonl.parse(value, where)
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
        columns = json.dumps(
            {k: v for k, v in value.items() if k != "prompt"}, default=str
        )  # Parquet has more types
        return out | {"prompt": prompt, "columns": json.loads(columns)}
    if kind == "conversations":
        turns = messages(value["messages"], f"{where}: messages", text=False)
        if not any(m["role"] == "assistant" for m in turns):
            roles = ", ".join(m["role"] for m in turns)
            raise UserError(
                f"{where}: messages: a message of the role assistant wanted, the roles found are {roles}"
            )
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
                raise UserError(
                    f"{where}: comparisons without a prompt need whole conversations as chosen and rejected: "
                    "messages, or a transcript with '\\n\\nHuman: ' and '\\n\\nAssistant: ' before its turns"
                )
        both = [
            messages(side, f"{where}: {name}", text=False)
            for side, name in zip(sides, ("chosen", "rejected"), strict=True)
        ]
        parts = transcripts.split(*both)
        if isinstance(parts, str):
            raise UserError(
                f"{where}: chosen and rejected must be one conversation but for the assistant's last turn: {parts}"
            )
        return dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))
    prompt = messages(value["prompt"], f"{where}: prompt", text=True)
    replies = [
        reply(side, prompt, f"{where}: {name}")
        for side, name in zip(sides, ("chosen", "rejected"), strict=True)
    ]
    return {"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}


def reply(value, prompt: list[dict], where: str) -> str:
    """The text of a reply: text, or the assistant's one message, with the prompt's before it or without."""
    if isinstance(value, str):
        return value
    turns = messages(value, where, text=True)
    rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if [m["role"] for m in rest] != ["assistant"]:
        roles = ", ".join(m["role"] for m in turns)
        raise UserError(
            f"{where}: one message of the role assistant wanted after the prompt, the roles are {roles}"
        )
    return rest[0]["content"]


def messages(value, where: str, text: bool) -> list[dict]:
    """Checked messages; plain text, where it is allowed, is one user turn."""
    if text and isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: {'text or ' if text else ''}a list of messages wanted, {found(value)}"
        )
    for i, message in enumerate(value):
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                raise UserError(
                    f"{where}[{i}]: an object with {field} as text wanted, {found(message)}"
                )
    return value


def found(value) -> str:
    text = json.dumps(value, default=str)
    return f"{type(value).__name__} found: {text[:80]}{'...' if len(text) > 80 else ''}"
