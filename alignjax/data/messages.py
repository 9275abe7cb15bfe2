"""Messages of a conversation: the forms in which users have them become one.

A message is {"role": text, "content": text, ...}. The forms that are read:

    {"role": "user", "content": "..."}                                    as chat templates take it
    {"role": "user", "content": [{"type": "text", "text": "..."}, ...]}   content in parts
    {"from": "human", "value": "..."}                                     ShareGPT

Other fields of a message (tool_calls, reasoning_content, name) are kept, because a template may
use them in a prompt; null is the same as absent. A reply that is trained on or scored is its
content alone.
"""

import difflib
from typing import Any

from alignjax.config import UserError
from alignjax.data import values
from alignjax.machine import jsonl

# A role that is none of these is the template's affair, unless it looks like one of them.
ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "observation",
)
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
NOT_IN_CONTENT = ("tool_calls", "reasoning_content")  # what else a reply may say
SIMILAR = 0.8  # from which a role counts as misspelt
TEXT_OR_PARTS = "text or a list of parts"


def from_value(value: Any, field: str, expected: str = "a list of messages") -> list[dict]:
    """Return a list of messages, checked; `field` is its name in the row."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{field}: expected {expected}, found {jsonl.describe(value)}")
    return [message_of(item, f"{field}[{index}]") for index, item in enumerate(value)]


def from_prompt(value: Any, field: str) -> list[dict]:
    """Return the messages of a prompt; a text is one message of the user."""
    if isinstance(value, str):
        return [{"role": "user", "content": values.checked_text(value, field)}]
    return from_value(value, field, expected="text or a list of messages")


def message_of(value: Any, field: str) -> dict:
    """Return one message, in the form that templates take."""
    if is_sharegpt(value):
        return sharegpt_message(value, field)
    for part in ("role", "content"):
        if not isinstance(value, dict) or (part not in value and not is_call(value)):
            raise UserError(
                f"{field}: expected an object with {part} as text, found {jsonl.describe(value)}"
            )
    role = checked_role(value.get("role"), f"{field}: role")
    content = value.get("content")
    # Programs that call tools write null where nothing is said.
    if content is None and is_call(value):
        content = ""
    others = {
        name: item
        for name, item in value.items()
        if name not in ("role", "content") and item is not None
    }
    return {
        "role": role,
        "content": content_text(content, f"{field}: content"),
        **values.checked_object(others, f"{field}: "),
    }


def is_call(message: dict) -> bool:
    """Return whether a message of the assistant calls tools."""
    return message.get("role") == "assistant" and bool(message.get("tool_calls"))


def checked_role(role: Any, field: str) -> str:
    """Return a role; UserError if it is no text, empty, or a misspelt one of ROLES."""
    values.checked_text(role, field)
    if role in ROLES:
        return role
    name = role.strip().lower()
    if not name:
        raise UserError(f"{field}: expected text, found {jsonl.describe(role)}")
    similar = [SHAREGPT_ROLES[name]] if name in SHAREGPT_ROLES else []
    similar = similar or difflib.get_close_matches(name, ROLES, 1, SIMILAR)
    if similar:
        raise UserError(f"{field}: there is no role {role!r}; did you mean {similar[0]!r}?")
    return role


def content_text(content: Any, field: str) -> str:
    """Return a content as text; parts are joined, without anything between them."""
    if not isinstance(content, list) or not content:
        return values.checked_text(content, field, TEXT_OR_PARTS)
    return "".join(part_text(part, f"{field}[{index}]") for index, part in enumerate(content))


def part_text(part: Any, field: str) -> str:
    """Return the text of a part of a content; UserError if it is a part of another type."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise UserError(
            f'{field}: expected a part like {{"type": "text", "text": ...}}, '
            f"found {jsonl.describe(part)}"
        )
    if part["type"] != "text":
        raise UserError(f"{field}: a part of type {part['type']!r}, but only text parts are read")
    return values.checked_text(part.get("text"), f"{field}: text")


def is_sharegpt(value: Any) -> bool:
    return isinstance(value, dict) and "from" in value and not {"role", "content"} & set(value)


def sharegpt_message(value: dict, field: str) -> dict:
    """Return a turn in ShareGPT's form as a message; fields of its own are not kept."""
    speaker = values.checked_text(value["from"], f"{field}: from")
    if speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise UserError(f"{field}: from: expected one of {known}, found {jsonl.describe(speaker)}")
    content = content_text(value.get("value"), f"{field}: value")
    return {"role": SHAREGPT_ROLES[speaker], "content": content}


def conversation(value: Any, field: str = "messages") -> list[dict]:
    """Return checked messages, of which the assistant says at least one."""
    messages = from_value(value, field)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            text_alone(message, f"{field}[{index}]")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{field}: expected a message with the role assistant, "
            f"found the roles {roles_of(messages)}"
        )
    return messages


def text_alone(message: dict, field: str) -> str:
    """Return the content of a reply; UserError if it says more than its content.

    Of the assistant's messages before a prompt, the template may use the other fields.
    """
    for name in NOT_IN_CONTENT:
        if message.get(name):
            raise UserError(
                f"{field}: {name}: of a reply only the content is trained on and scored; write "
                "this into the content, as the model writes it"
            )
    return message["content"]


def prompt(value: Any, field: str) -> list[dict]:
    """Return the messages of a prompt, which the assistant is to answer."""
    messages = from_prompt(value, field)
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{field}: expected messages that the assistant is to answer, "
            f"found the roles {roles_of(messages)}"
        )
    return messages


def roles_of(messages: list[dict]) -> str:
    return ", ".join(message["role"] for message in messages)
