"""Which tokens end a response, and what a response says without them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.config import UserError
from alignjax.data import chat, encoding


def end_tokens(
    tokenizer: PreTrainedTokenizerBase,
    declared: Mapping[str, Any],
    vocab_size: int,
    *,
    plain_text: bool = False,
) -> tuple[int, ...]:
    """Return all tokens that end a response of a language model, each once.

    These are the end of the assistant's turn if there is a chat template, the tokenizer's end of
    text, and what the model's files declare. Sampling, evaluation and exports all use this set;
    SFT trains on the end of the turn alone.

    Args:
      tokenizer: of the model.
      declared: file and field -> its value: an id, a list of ids, or None. See
        `weights.imported`.
      vocab_size: of the model.
      plain_text: the model was trained on documents, so the token between them is an end too.

    Raises:
      UserError: for a declared end that is not a token, and if there is no end at all.
    """
    candidates = [chat.end_token(tokenizer)] if tokenizer.chat_template else []
    candidates.append(tokenizer.eos_token_id)
    if plain_text:
        candidates.append(encoding.closing(tokenizer))
    for where, value in declared.items():
        candidates += declared_ids(where, value, vocab_size)
    tokens = tuple(token for token in dict.fromkeys(candidates) if token is not None)
    if not tokens:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has neither an eos_token nor a chat template"
        )
    return tokens


def declared_ids(where: str, value: Any, vocab_size: int) -> list[int]:
    """Return the ids of a field `eos_token_id`: an id, a list of ids, or None.

    Raises:
      UserError: for anything else, and for an id that is not in the vocabulary.
    """
    ids = as_list(value)
    for token in ids:
        if type(token) is not int:  # a bool is an int too
            raise UserError(f"{where}={value!r}: {token!r} is not the id of a token")
        if not 0 <= token < vocab_size:
            raise UserError(
                f"{where}={value!r}: {token} is not among the {vocab_size} tokens of the model"
            )
    return ids


def as_list(value: Any) -> list:
    """Return the values of a field that holds one, several or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def without_end(tokens: Sequence[int] | np.ndarray, ends: Sequence[int]) -> Sequence[int]:
    """Return the tokens of a response without the end token, if it has one."""
    has_end = len(tokens) > 0 and int(tokens[-1]) in ends
    return tokens[:-1] if has_end else tokens


def replace_end(tokens: Sequence[int], ending: Sequence[int]) -> list[int]:
    """Return a sequence with other tokens in the place of its end token, its last one."""
    return [*tokens[:-1], *ending]
