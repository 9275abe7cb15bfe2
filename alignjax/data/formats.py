r"""Row formats: how a row of a user's file becomes an example of the kind that a stage takes.

A row format is one function, registered by `row_format`, here or in a config file:

    @row_format("comparisons", "question", "good", "bad")
    def good_and_bad(row: dict) -> dict:
        return {"prompt": row["question"], "chosen": row["good"], "rejected": row["bad"]}

It takes the rows that have these fields. The examples of each kind are:

    text           text: a document
    conversations  messages: a list of {"role": ..., "content": ...}, see `messages`
    comparisons    prompt: messages, or a text, which is one message of the user;
                   chosen and rejected: texts; margin: a number, 0 by default
    prompts        prompt: the same; columns: what else the reward function can read, {} by default
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignjax.config import UserError, nearest
from alignjax.data import messages, transcripts, values
from alignjax.machine import jsonl

KINDS = ("text", "conversations", "comparisons", "prompts")


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """A registered reader and the rows that it takes."""

    kind: str
    fields: tuple[str, ...]  # a row must have all of them
    optional: tuple[str, ...]  # what else the reader reads
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
    kind: str,
    *fields: str,
    optional: Sequence[str] = (),
    condition: Callable[[dict], bool] | None = None,
) -> Callable[[Callable[[dict], dict]], Callable[[dict], dict]]:
    """Register a function as the reader of rows that have these fields, and meet the condition.

    The function takes a row and returns an example of the kind. If it raises UserError, the row is
    bad: the text should name the field, and the caller puts the file and the line before it.
    Of several formats that take a row, the one with the most fields reads it; among equals one
    with a condition, then the one that was registered last. `data.columns` can give names of
    their own to the fields, and to those that are `optional`.
    """
    if kind not in KINDS:
        raise UserError(f"row_format({kind!r}): there is no such kind{nearest(kind, KINDS)}")

    def register(read: Callable[[dict], dict]) -> Callable[[dict], dict]:
        new = RowFormat(
            kind=kind, fields=fields, optional=tuple(optional), condition=condition, read=read
        )
        FORMATS[:] = [known for known in FORMATS if known.identity != new.identity]
        FORMATS.append(new)
        return read

    return register


def example_of(row: Any, kind: str, columns: Mapping[str, str] | None = None) -> dict:
    """Return the example in a row, with exactly the fields of its kind, checked.

    The text of a UserError names the field, but not the file.

    Args:
      row: the row.
      kind: one of KINDS.
      columns: {field: the name that it has in the row}, for the fields with a name of their own.
    """
    if not isinstance(row, dict):
        raise UserError(f"expected an object, found {jsonl.describe(row)}")
    renamed = rename(row, columns) if columns else row
    example = format_of(renamed, kind).read(renamed)
    if not isinstance(example, dict):
        raise UserError(f"the row format returned no example: {jsonl.describe(example)}")
    return complete(example, kind)


def rename(row: dict, columns: Mapping[str, str]) -> dict:
    """Return a row with fields under their usual names; each of these columns must be there."""
    for field, column in columns.items():
        if column not in row:
            raise UserError(
                f"data.columns says that {field} is in the column {column!r}, which the row lacks"
                f"{nearest(column, row)}"
            )
    others = {
        name: value
        for name, value in row.items()
        if name not in columns and name not in columns.values()
    }
    return others | {field: row[column] for field, column in columns.items()}


def check_columns(columns: Mapping[str, str], kind: str) -> None:
    """Raise UserError if a field is given a name that no format of the kind reads.

    A reward function may read any column of a prompt.
    """
    formats = [entry for entry in FORMATS if entry.kind == kind]
    known = dict.fromkeys(name for entry in formats for name in (*entry.fields, *entry.optional))
    for field in columns:
        if field not in known and kind != "prompts":
            raise UserError(
                f"data.columns: rows of {kind} have no field {field!r}{nearest(field, known)}"
            )


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
        names = ", ".join(name if name.isprintable() else repr(name) for name in row)
        raise UserError(f"{kind}: no row format takes a row with the fields {names}")
    hint = nearest(missing[0], sorted(row)) if row else "; there are none"
    raise UserError(f"a row of {kind} needs a field {missing[0]!r}{hint}")


def specificity(entry: RowFormat) -> tuple[int, bool]:
    return len(entry.fields), entry.condition is not None


def complete(example: dict, kind: str) -> dict:
    """Check an example that a reader returned, and fill in what may be left out."""
    if kind == "text":
        return {"text": values.checked_text(example.get("text"), "text")}
    if kind == "conversations":
        return {"messages": messages.conversation(example.get("messages"))}
    prompt = messages.prompt(example.get("prompt"), "prompt")
    if kind == "prompts":
        return {"prompt": prompt, "columns": checked_columns(example.get("columns", {}))}
    return {
        "prompt": prompt,
        "chosen": values.checked_text(example.get("chosen"), "chosen"),
        "rejected": values.checked_text(example.get("rejected"), "rejected"),
        "margin": values.checked_number(example.get("margin", 0.0), "margin"),
    }


def checked_columns(columns: Any) -> dict:
    """Return the columns of a prompt in JSON's types."""
    if not isinstance(columns, dict):
        raise UserError(f"columns: expected an object, found {jsonl.describe(columns)}")
    return values.checked_object(columns)


# --------------------------------------------------------------------------- the built-in formats


@row_format("text", "text")
def document(row: dict) -> dict:
    """Read {"text": ...}."""
    return {"text": row["text"]}


@row_format("conversations", "messages")
def messages_alone(row: dict) -> dict:
    """Read {"messages": [...]}."""
    return {"messages": row["messages"]}


def has_no_messages(row: dict) -> bool:
    return "messages" not in row


@row_format("conversations", "conversations", optional=["system"], condition=has_no_messages)
def sharegpt(row: dict) -> dict:
    """Read {"conversations": [{"from": ..., "value": ...}]}, and a system message beside it."""
    return {"messages": sharegpt_turns(row)}


@row_format("conversations", "prompt", "completion", condition=has_no_messages)
def prompt_and_completion(row: dict) -> dict:
    """Read a prompt and the reply to it, each text or messages."""
    prompt = messages.prompt(row["prompt"], "prompt")
    answer = reply_message(row["completion"], prompt, "completion")
    return {"messages": [*prompt, answer]}


@row_format("prompts", "prompt")
def prompt_and_columns(row: dict) -> dict:
    """Read {"prompt": ..., any other field: what the reward function can read}."""
    columns = {name: value for name, value in row.items() if name != "prompt"}
    return {"prompt": row["prompt"], "columns": columns}


@row_format("comparisons", "prompt", "chosen", "rejected", optional=["margin"])
def prompt_and_replies(row: dict) -> dict:
    """Read an explicit prompt with two replies, each text or messages, as TRL takes them."""
    return comparison(messages.prompt(row["prompt"], "prompt"), row)


def has_no_prompt(row: dict) -> bool:
    return "prompt" not in row


@row_format(
    "comparisons",
    "conversations",
    "chosen",
    "rejected",
    optional=["margin", "system"],
    condition=has_no_prompt,
)
def sharegpt_and_replies(row: dict) -> dict:
    """Read a prompt in ShareGPT's form with two replies, each a turn or text."""
    return comparison(sharegpt_turns(row), row)


def sharegpt_turns(row: dict) -> list[dict]:
    """Return the messages in a row of ShareGPT's form."""
    turns = messages.from_value(row["conversations"], "conversations")
    system = row.get("system")
    if system is None or system == "":
        return turns
    if turns[0]["role"] == "system":
        raise UserError("system: expected one system message, but conversations begins with one")
    return [{"role": "system", "content": values.checked_text(system, "system")}, *turns]


def comparison(prompt: list[dict], row: dict) -> dict:
    """Return the comparison of the two replies in a row."""
    return {
        "prompt": prompt,
        "chosen": reply(row["chosen"], prompt, "chosen"),
        "rejected": reply(row["rejected"], prompt, "rejected"),
        "margin": row.get("margin", 0.0),
    }


def reply(value: Any, prompt: list[dict], field: str) -> str:
    """Return the text of a reply."""
    return messages.text_alone(reply_message(value, prompt, field), field)


def reply_message(value: Any, prompt: list[dict], field: str) -> dict:
    """Return a reply: a text, or one message, which may repeat the prompt before it."""
    if isinstance(value, str):
        return {"role": "assistant", "content": values.checked_text(value, field)}
    if isinstance(value, dict):
        turns = [messages.message_of(value, field)]
    else:
        turns = messages.from_prompt(value, field)
    repeats_prompt = turns[: len(prompt)] == prompt
    answer = turns[len(prompt) :] if repeats_prompt else turns
    if [message["role"] for message in answer] != ["assistant"]:
        raise UserError(
            f"{field}: expected one message with the role assistant after the prompt, "
            f"found the roles {messages.roles_of(turns)}"
        )
    return answer[0]


@row_format("comparisons", "chosen", "rejected", optional=["margin"])
def two_conversations(row: dict) -> dict:
    """Read two conversations that differ only in their last messages, as TRL takes them."""
    return last_messages(
        messages.from_value(row["chosen"], "chosen"),
        messages.from_value(row["rejected"], "rejected"),
        row.get("margin", 0.0),
    )


def are_texts(row: dict) -> bool:
    return isinstance(row["chosen"], str) and isinstance(row["rejected"], str)


@row_format("comparisons", "chosen", "rejected", optional=["margin"], condition=are_texts)
def two_transcripts(row: dict) -> dict:
    """Read two conversations as text, in the form of Anthropic's HH."""
    chosen = transcripts.parse(values.checked_text(row["chosen"], "chosen"))
    rejected = transcripts.parse(values.checked_text(row["rejected"], "rejected"))
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
        "chosen": messages.text_alone(chosen[-1], "chosen"),
        "rejected": messages.text_alone(rejected[-1], "rejected"),
        "margin": margin,
    }
