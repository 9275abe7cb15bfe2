"""A user's own examples: JSON lines, plain or gzipped. A bad row is named by file and line."""

import glob
import gzip
import json
import math
import zlib

from alignjax.config import UserError, nearest

FIELDS = {"text": ("text",), "conversations": ("messages",), "comparisons": ("prompt", "chosen", "rejected"),
          "prompts": ("prompt",)}  # fmt: skip


def read(pattern: str, kind: str) -> list[dict]:
    """The rows of all files that match `pattern`, prompts as messages.

    text: {"text"}; conversations: {"messages"}; comparisons: {"prompt", "chosen", "rejected", "margin"?}; prompts:
    {"prompt"}. A prompt is text or messages. Raises UserError naming file, line, field, and what was found and wanted.
    """
    paths = sorted(glob.glob(str(pattern)))
    if not paths:
        raise UserError(f"{pattern}: no such file")
    rows = []
    for path in paths:
        before, number = len(rows), 0
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        rows.append(row(line, f"{path}:{number}", kind))
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{number + 1}: JSON lines in UTF-8 wanted, {error}") from None
        if len(rows) == before:
            raise UserError(f"{path}: empty, there are no {kind} in it")
    return rows


def row(line: str, where: str, kind: str) -> dict:
    """One checked row: the kind's fields, a margin for comparisons (0 unless given), and where it stands."""
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: an object wanted, {found(value)}")
    out = {}
    for name in FIELDS[kind]:
        if name not in value:
            raise UserError(f"{where}: {kind} need a field {name!r}{nearest(name, sorted(value))}")
        if name in ("prompt", "messages"):
            out[name] = messages(value[name], f"{where}: {name}", text=name == "prompt")
        elif not isinstance(value[name], str):
            raise UserError(f"{where}: {name}: text wanted, {found(value[name])}")
        else:
            out[name] = value[name]
    if kind == "conversations" and not any(m["role"] == "assistant" for m in out["messages"]):
        roles = ", ".join(m["role"] for m in out["messages"])
        raise UserError(f"{where}: messages: a message of the role assistant wanted, the roles found are {roles}")
    if kind == "comparisons":
        margin = value.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise UserError(f"{where}: margin: a number wanted, {found(margin)}")
        out["margin"] = float(margin)
    return out | {"where": where}


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
    text = json.dumps(value)
    return f"{type(value).__name__} found: {text[:80]}{'...' if len(text) > 80 else ''}"
