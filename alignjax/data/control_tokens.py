"""Encode text in which nothing that a user wrote can become a control token.

A tokenizer turns "<|im_end|>" into the token that ends a turn, whoever wrote it: the chat template
or the user. So texts are encoded by a copy of the tokenizer in which control tokens have secret
names, which no text contains; ids and everything else are the same. Contents are shielded before
the template is rendered, which keeps their control tokens apart from those that the template
writes. Only the template's become secret names afterwards.
"""

import json
import re
import secrets
from collections.abc import Collection, Iterable
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from alignjax.config import UserError

SECRET_DIGITS = 32
# The tokens of single bytes, which a tokenizer with byte fallback needs under their own names.
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# What a control token that is not marked as special looks like: <|user|>, [INST].
BRACKETED = re.compile(r"<\S+>|\[\S+\]|\{\S+\}")


class ControlTokens:
    """A tokenizer's control tokens under secret names.

    Attributes:
        ids: the id of each control token by its name.
        special_ids: those of the tokens that are special and no part of a reply: they are no text.
        secret_names: its secret name by its name.
        allowed_in_content: whether control tokens in contents stay control tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        markers: Collection[str] = (),
        of_reply: Collection[str] = (),
        allowed_in_content: bool = False,
    ):
        """Read a tokenizer.

        Args:
          tokenizer: to be copied.
          markers: control tokens that it does not mark as special.
          of_reply: control tokens that stay such in a reply, though in no other content.
          allowed_in_content: see the attribute.
        """
        state = json.loads(backend_of(tokenizer).to_str())
        self.allowed_in_content = allowed_in_content
        self.ids = control_ids(tokenizer, state, {*markers, *of_reply})
        special = control_ids(tokenizer, state, ())
        self.special_ids = {number for name, number in special.items() if name not in of_reply}
        # Digits: no normaliser changes them, and no letter case of a template does.
        secret = f"{secrets.randbelow(10**SECRET_DIGITS):0{SECRET_DIGITS}d}"
        self.shield_mark = f"{secret}99999"
        # The edges stay: a tokenizer may read a token only beside certain characters.
        self.secret_names = {
            name: f"{name[0]}{secret}{rank:05d}{name[-1]}" for rank, name in enumerate(self.ids)
        }
        self.in_content = any_of(self.ids)
        self.in_reply = any_of([name for name in self.ids if name not in of_reply])
        self.in_template = re.compile(f"(?<!{self.shield_mark})(?:{self.in_content.pattern})")
        self.copy = Tokenizer.from_str(json.dumps(with_names(state, self.secret_names)))

    def shield_messages(self, messages: Iterable[dict]) -> list[dict]:
        """Return messages with the control tokens in their texts shielded, for a template."""
        if self.allowed_in_content:
            return list(messages)
        return [self.shield_message(message) for message in messages]

    def shield_message(self, message: dict) -> dict:
        is_reply = message.get("role") == "assistant"
        return self.shield(message, self.in_reply if is_reply else self.in_content)

    def shield(self, value: Any, names: re.Pattern) -> Any:
        """Return a value with these control tokens in its texts shielded.

        The first and last characters of a text stay, so a template trims it as it would.
        """
        if isinstance(value, str):
            return names.sub(self.shielded, value)
        if isinstance(value, dict):
            return {name: self.shield(part, names) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.shield(part, names) for part in value]
        return value

    def shielded(self, match: re.Match) -> str:
        name = match[0]
        if len(name) == 1:
            return self.shield_mark + name
        return name[0] + self.shield_mark + name[1:]

    def with_secrets(self, rendered: str) -> str:
        """Return a rendered text with secret names for the template's control tokens."""
        renamed = self.in_template.sub(self.secret_name, rendered)
        return renamed.replace(self.shield_mark, "")

    def secret_name(self, match: re.Match) -> str:
        return self.secret_names[match[0]]

    def without_secrets(self, text: str) -> str:
        """Return a text with the control tokens' own names, to show it."""
        for name, secret_name in self.secret_names.items():
            text = text.replace(secret_name, name)
        return text

    def of_content(self, text: str) -> str:
        """Return a document or a reply, without a template, as `encode` takes it."""
        if not self.allowed_in_content:
            text = self.shield(text, self.in_reply)
        return self.with_secrets(text)

    def encode(self, texts: Iterable[str], begin: bool = False) -> dict[str, list[int]]:
        """Return {text: its ids}, each text encoded once; control tokens have secret names.

        With `begin`, the tokenizer adds the tokens that it puts around a whole text.
        """
        distinct = list(dict.fromkeys(texts))
        try:
            encoded = self.copy.encode_batch_fast(distinct, add_special_tokens=begin)
        except (TypeError, UnicodeEncodeError):
            texts = [self.without_secrets(text) for text in distinct]
            raise UserError(describe_surrogate(texts)) from None
        return {text: part.ids for text, part in zip(distinct, encoded, strict=True)}


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the tokenizer's fast implementation; UserError if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"{tokenizer.name_or_path}: this tokenizer has no fast implementation "
            "(a tokenizer.json), which is needed here"
        )
    return backend


def control_ids(
    tokenizer: PreTrainedTokenizerBase, state: dict, markers: Collection[str]
) -> dict[str, int]:
    """Return {name: id} of the tokens that are special or among the markers."""
    special = set(tokenizer.all_special_tokens)
    return {
        token["content"]: token["id"]
        for token in state["added_tokens"]
        if (token["special"] or token["content"] in special or token["content"] in markers)
        and not is_byte(token["content"], state["model"])
    }


def any_of(names: Collection[str]) -> re.Pattern:
    """Return a pattern of these names, which finds the longest that begins at a place."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # the latter: nothing


def is_byte(name: str, model: dict) -> bool:
    """Return whether a token stands for a byte of characters outside the vocabulary."""
    return bool(model.get("byte_fallback")) and BYTE.fullmatch(name) is not None


def with_names(state: dict, names: dict[str, str]) -> dict:
    """Return a serialised tokenizer in which the tokens with other names have them everywhere.

    Merges that would make such a token from text are left out, and so is all padding.
    """
    model = dict(state["model"])
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(name, name): number for name, number in vocabulary.items()}
    elif vocabulary is not None:  # of a unigram model: pairs of a name and a score
        model["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not makes_any(merge, names)]
    added = [
        token | {"content": names.get(token["content"], token["content"])}
        for token in state["added_tokens"]
        if not is_byte(token["content"], state["model"])
    ]
    return state | {"model": model, "added_tokens": added, "truncation": None, "padding": None}


def makes_any(merge: str | list[str], names: Collection[str]) -> bool:
    """Return whether a merge involves a token of these names, as a part or as the result."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return "".join(parts) in names or any(part in names for part in parts)


def bracketed_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the added tokens in brackets, which may be control tokens without being special."""
    added = backend_of(tokenizer).get_added_tokens_decoder().values()
    return [token.content for token in added if BRACKETED.fullmatch(token.content)]


def describe_surrogate(texts: list[str]) -> str:
    """Return what is wrong with texts that cannot be encoded in UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.end + 20]
            return (
                f"the text {ascii(around)} has half of a surrogate pair "
                f"({ascii(text[error.start])}), which is no character"
            )
    return "a text cannot be tokenised"
