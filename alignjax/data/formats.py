r"""Row formats: how a row of a user's file becomes an example of the kind that a stage takes.

A row format is one function, registered by `row_format`, here or in a config file:

    @row_format("comparisons", "question", "good", "bad")
    def good_and_bad(row: dict) -> dict:
        return {"prompt": row["question"], "chosen": row["good"], "rejected": row["bad"]}

It takes the rows that have these fields. The examples of each kind are:

    text           text: a document
    conversations  messages: a list of {"role": ..., "content": ...}
    comparisons    prompt: messages, or a text, which is one message of the user;
                   chosen and rejected: texts; margin: a number, 0 by default
    prompts        prompt: the same; columns: what else the reward function can read, {} by default
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignjax.config import UserError, nearest
from alignjax.data import transcripts
from alignjax.machine import jsonl

KINDS = ("text", "conversations", "comparisons", "prompts")


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """A registered reader and the rows that it takes."""

    kind: str
    fields: tuple[str, ...]  # a row must have all of them
    condition: Callable[[dict], bool] | None  # what else must hold of a row
    read: Callable[[dict], dict]

    @property
    def identity(self) -> tuple[str, str]:
        """Return what stays the same when the file that registers the format is run again."""
        code = self.read.__code__
        return self.kind, f"{code.co_filename}:{code.co_qualname}"

    def takes(self, row: dict) -> bool:
        """Return whether the format reads a row."""
        if not all(field in row for field in self.fields):
            return False
        return self.condition is None or self.condition(row)

    def missing(self, row: dict) -> list[str]:
        """Return the fields that a row lacks, in order."""
        return [field for field in self.fields if field not in row]


FORMATS: list[RowFormat] = []


def row_format(
    kind: str, *fields: str, condition: Callable[[dict], bool] | None = None
) -> Callable[[Callable[[dict], dict]], Callable[[dict], dict]]:
    """Register a function as the reader of rows that have these fields, and meet the condition.

    The function takes a row and returns an example of the kind. If it raises UserError, the row is
    bad: the text should name the field, and the caller puts the file and the line before it.
    Of several formats that take a row, the one with the most fields reads it; among equals one
    with a condition, then the one that was registered last.
    """
    if kind not in KINDS:
        raise UserError(f"row_format({kind!r}): there is no such kind{nearest(kind, KINDS)}")

    def register(read: Callable[[dict], dict]) -> Callable[[dict], dict]:
        new = RowFormat(kind=kind, fields=fields, condition=condition, read=read)
        FORMATS[:] = [known for known in FORMATS if known.identity != new.identity]
        FORMATS.append(new)
        return read

    return register


def example_of(row: Any, kind: str) -> dict:
    """Return the example in a row, with exactly the fields of its kind, checked.

    The text of a UserError names the field, but not the file.
    """
    if not isinstance(row, dict):
        raise UserError(f"expected an object, found {jsonl.describe(row)}")
    return complete(format_of(row, kind).read(row), kind)


def format_of(row: dict, kind: str) -> RowFormat:
    """Return the format that reads a row; without one, the error names the first missing field."""
    known = [entry for entry in FORMATS if entry.kind == kind]
    suitable = [entry for entry in known if entry.takes(row)]
    if suitable:
        # `max` returns the first of equals, so the last registered comes first.
        return max(reversed(suitable), key=specificity)
    closest = min(known, key=lambda entry: len(entry.missing(row)))
    missing = closest.missing(row)
    if not missing:
        raise UserError(f"{kind}: no row format takes a row with the fields {', '.join(row)}")
    raise UserError(
        f"a row of {kind} needs a field {missing[0]!r}{nearest(missing[0], sorted(row))}"
    )


def specificity(entry: RowFormat) -> tuple[int, bool]:
    return len(entry.fields), entry.condition is not None


# ------------------------------------------------------------------------- examples of each kind


def complete(example: dict, kind: str) -> dict:
    """Check an example that a reader returned, and fill in what may be left out."""
    if kind == "text":
        return {"text": checked_text(example.get("text"), "text")}
    if kind == "conversations":
        return {"messages": conversation(example.get("messages"))}
    prompt = to_messages(example.get("prompt"), "prompt")
    if kind == "prompts":
        return {"prompt": prompt, "columns": json_values(example.get("columns", {}))}
    return {
        "prompt": prompt,
        "chosen": checked_text(example.get("chosen"), "chosen"),
        "rejected": checked_text(example.get("rejected"), "rejected"),
        "margin": checked_number(example.get("margin", 0.0), "margin"),
    }


def checked_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{field}: expected text, found {jsonl.describe(value)}")
    return value


def checked_number(value: Any, field: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise UserError(f"{field}: expected a number, found {jsonl.describe(value)}")
    return float(value)


def checked_messages(value: Any, field: str, expected: str = "a list of messages") -> list[dict]:
    """Return a list of messages, each with a role and a content."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{field}: expected {expected}, found {jsonl.describe(value)}")
    for index, message in enumerate(value):
        for part in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(part), str):
                raise UserError(
                    f"{field}[{index}]: expected an object with {part} as text, "
                    f"found {jsonl.describe(message)}"
                )
    return value


def to_messages(value: Any, field: str) -> list[dict]:
    """Return checked messages; a text is one message of the user."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return checked_messages(value, field, expected="text or a list of messages")


def conversation(value: Any) -> list[dict]:
    """Return checked messages, of which the assistant says at least one."""
    messages = checked_messages(value, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            "messages: expected a message with the role assistant, "
            f"found the roles {roles_of(messages)}"
        )
    return messages


def roles_of(messages: list[dict]) -> str:
    return ", ".join(message["role"] for message in messages)


def json_values(columns: dict) -> dict:
    """Return columns in JSON's types: Parquet has more, and a time, say, becomes text."""
    return json.loads(json.dumps(columns, default=str))


# --------------------------------------------------------------------------- the built-in formats


@row_format("text", "text")
def document(row: dict) -> dict:
    """Read {"text": ...}."""
    return {"text": row["text"]}


@row_format("conversations", "messages")
def messages_alone(row: dict) -> dict:
    """Read {"messages": [...]}."""
    return {"messages": row["messages"]}


@row_format("prompts", "prompt")
def prompt_and_columns(row: dict) -> dict:
    """Read {"prompt": ..., any other field: what the reward function can read}."""
    columns = {name: value for name, value in row.items() if name != "prompt"}
    return {"prompt": row["prompt"], "columns": columns}


@row_format("comparisons", "prompt", "chosen", "rejected")
def prompt_and_replies(row: dict) -> dict:
    """Read an explicit prompt with two replies, each text or messages, as TRL takes them."""
    prompt = to_messages(row["prompt"], "prompt")
    return {
        "prompt": prompt,
        "chosen": reply(row["chosen"], prompt, "chosen"),
        "rejected": reply(row["rejected"], prompt, "rejected"),
        "margin": row.get("margin", 0.0),
    }


def reply(value: Any, prompt: list[dict], field: str) -> str:
    """Return the text of a reply: a text, or one message, which may repeat the prompt before it."""
    if isinstance(value, str):
        return value
    messages = to_messages(value, field)
    repeats_prompt = messages[: len(prompt)] == prompt
    answer = messages[len(prompt) :] if repeats_prompt else messages
    if [message["role"] for message in answer] != ["assistant"]:
        raise UserError(
            f"{field}: expected one message with the role assistant after the prompt, "
            f"found the roles {roles_of(messages)}"
        )
    return answer[0]["content"]


@row_format("comparisons", "chosen", "rejected")
def two_conversations(row: dict) -> dict:
    """Read two conversations that differ only in their last messages, as TRL takes them."""
    return last_messages(
        checked_messages(row["chosen"], "chosen"),
        checked_messages(row["rejected"], "rejected"),
        row.get("margin", 0.0),
    )


def are_texts(row: dict) -> bool:
    return isinstance(row["chosen"], str) and isinstance(row["rejected"], str)


@row_format("comparisons", "chosen", "rejected", condition=are_texts)
def two_transcripts(row: dict) -> dict:
    """Read two conversations as text, in the form of Anthropic's HH."""
    chosen = transcripts.parse(row["chosen"])
    rejected = transcripts.parse(row["rejected"])
    if chosen is None or rejected is None:
        raise UserError(
            "comparisons without a prompt need whole conversations as chosen and rejected: "
            "messages, or a transcript with '\\n\\nHuman: ' and '\\n\\nAssistant: ' before "
            "its turns"
        )
    return last_messages(chosen, rejected, row.get("margin", 0.0))


def last_messages(chosen: list[dict], rejected: list[dict], margin: Any) -> dict:
    """Return the comparison of the last messages of two conversations."""
    reason = transcripts.difference_fault(chosen, rejected)
    if reason:
        raise UserError(
            "chosen and rejected must be the same conversation up to the assistant's last turn: "
            + reason
        )
    return {
        "prompt": chosen[:-1],
        "chosen": chosen[-1]["content"],
        "rejected": rejected[-1]["content"],
        "margin": margin,
    }
