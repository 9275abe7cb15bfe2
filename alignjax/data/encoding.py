"""From examples to arrays of tokens. An example over the length limit is dropped, never cut.

A row that the chat template refuses, or that cannot be encoded, is an error that names its place,
or is skipped and counted.

In shapes, n is the number of examples and t the number of tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.config import UserError
from alignjax.data import chat, packing
from alignjax.data.tokenising import DEFAULT_RULES, IdColumns, RowRules, tokenise


class Ragged:
    """Sequences of ids of different lengths, which behave as one padded array [n t] int32.

    Rows are padded with 0 only when they are asked for: most real text is far shorter than t.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], width: int, left: bool = False):
        """Take the sequences and t; with `left`, the padding is in front."""
        arrays = [np.asarray(ids, np.int32) for ids in sequences]
        self.ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        self.ends = np.cumsum(lengths_of(arrays), dtype=np.int64)  # of each sequence, in `ids`
        self.width = width
        self.left = left

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Index as an array: return [t] for one number, [m t] for a slice or several numbers."""
        numbers = np.arange(len(self))[rows]
        sequences = [self.sequence(number) for number in np.atleast_1d(numbers)]
        padded = pad(sequences, self.width, self.left)
        return padded if np.ndim(numbers) else padded[0]

    def sequence(self, number: int) -> np.ndarray:
        """Return the ids of one sequence, without padding."""
        start = self.ends[number - 1] if number else 0
        return self.ids[start : self.ends[number]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.int32)


Arrays = dict[str, np.ndarray | Ragged]


class Encoded(NamedTuple):
    """Examples as arrays, and the number of examples that were dropped as too long."""

    arrays: Arrays
    dropped: int


class Fitting(NamedTuple):
    """The indices of the examples within the limit, and the number of the others."""

    kept: np.ndarray
    dropped: int


def pad(sequences: Sequence[Sequence[int]], length: int, left: bool = False) -> np.ndarray:
    """Return ids as [n length] int32, padded with 0.

    Nothing reads the padding: lengths and segments say what is real.
    """
    padded = np.zeros((len(sequences), length), np.int32)
    for row, ids in zip(padded, sequences, strict=True):
        if left:
            row[length - len(ids) :] = ids
        else:
            row[: len(ids)] = ids
    return padded


def join(parts: list[Arrays]) -> Arrays:
    """Return the arrays of several sources, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    return {name: concatenate([part[name] for part in parts]) for name in parts[0]}


def concatenate(arrays: list[np.ndarray] | list[Ragged]) -> np.ndarray | Ragged:
    first = arrays[0]
    if not isinstance(first, Ragged):
        return np.concatenate(arrays)
    joined = Ragged([], first.width, first.left)
    joined.ids = np.concatenate([ragged.ids for ragged in arrays])
    lengths = [np.diff(ragged.ends, prepend=0) for ragged in arrays]
    joined.ends = np.cumsum(np.concatenate(lengths))
    return joined


def fitting(lengths: Sequence[int], limit: int, kind: str) -> Fitting:
    """Find the examples within the limit; UserError if there are none."""
    kept = np.flatnonzero(np.array(lengths) <= limit)
    if not len(kept):
        shortest = min(lengths, default=0)
        raise UserError(
            f"data.max_length={limit}: all {len(lengths)} {kind} are longer, "
            f"the shortest has {shortest} tokens"
        )
    return Fitting(kept, len(lengths) - len(kept))


def lengths_of(sequences: Iterable[Sequence[int]]) -> np.ndarray:
    """Return the length of each sequence, [n] int32."""
    return np.array([len(ids) for ids in sequences], np.int32)


def closing(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a document of plain text."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(
        f"{tokenizer.name_or_path}: the tokenizer has neither a pad_token nor an eos_token, which "
        "ends documents"
    )


def document_columns(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> IdColumns:
    ids = chat.encode_texts(tokenizer, [row["text"] for row in rows])
    end = closing(tokenizer)
    return {"document": [[*tokens, end] for tokens in ids]}


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    length: int,
    rules: RowRules = DEFAULT_RULES,
) -> Encoded:
    """Return tokens, mask and segments, each [n length]: documents cut into windows.

    The documents are joined end to end, each closed by the pad token. Segments number the documents
    of a window from 1. The mask is 1 where a token is a target: where it follows another of its
    document in the window, because the first token has no context. The few tokens after the
    last whole window are left out; no document is dropped.
    """
    closing(tokenizer)
    tokenised = tokenise(document_columns, ("document",), tokenizer, rows, "text", rules)
    documents = tokenised.columns["document"]
    stream = np.concatenate(documents)
    document_numbers = np.arange(len(documents), dtype=np.int32)
    document_of_token = np.repeat(document_numbers, lengths_of(documents))
    windows = len(stream) // length
    if not windows:
        raise UserError(f"data.max_length={length}: the text has only {len(stream)} tokens in all")
    tokens = stream[: windows * length].reshape(windows, length)
    document = document_of_token[: windows * length].reshape(windows, length)
    follows = document[:, 1:] == document[:, :-1]
    mask = np.pad(follows, ((0, 0), (1, 0))).astype(np.int32)
    segments = document - document[:, :1] + 1
    return Encoded({"tokens": tokens, "mask": mask, "segments": segments}, 0)


def conversation_columns(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> IdColumns:
    """Return the sequences of each row, one behind the other, and their lengths."""
    messages = [row["messages"] for row in rows]
    columns: IdColumns = {"tokens": [], "mask": [], "lengths": []}
    for sequences in chat.conversation_sequences(tokenizer, messages):
        columns["tokens"].append([token for one in sequences for token in one.tokens])
        columns["mask"].append([flag for one in sequences for flag in one.trained])
        columns["lengths"].append([len(one.tokens) for one in sequences])
    return columns


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    length: int,
    rules: RowRules = DEFAULT_RULES,
) -> Encoded:
    """Return tokens, mask (1 on the targets: the assistant's tokens) and segments, [n length].

    A conversation may take several sequences, see `chat.conversation_sequences`; each is an
    example of its own.
    """
    names = ("tokens", "mask", "lengths")
    columns = tokenise(conversation_columns, names, tokenizer, rows, "conversations", rules).columns
    tokens = split_sequences(columns["tokens"], columns["lengths"])
    mask = split_sequences(columns["mask"], columns["lengths"])
    if len(tokens) > len(columns["tokens"]):
        rules.say(
            f"{len(columns['tokens'])} conversations take {len(tokens)} sequences, because the "
            "chat template writes earlier turns otherwise than the last one"
        )
    kept, dropped = fitting(lengths_of(tokens), length, "conversations")
    kept_tokens = [tokens[i] for i in kept]
    arrays = {
        "tokens": Ragged(kept_tokens, length),
        "mask": Ragged([mask[i] for i in kept], length),
        "segments": Ragged(map(np.ones_like, kept_tokens), length),
    }
    return Encoded(arrays, dropped)


def split_sequences(rows: list[np.ndarray], lengths: list[np.ndarray]) -> list[np.ndarray]:
    """Return the sequences of all rows, each row's one behind the other in an array."""
    return [
        sequence
        for row, row_lengths in zip(rows, lengths, strict=True)
        for sequence in np.split(row, np.cumsum(row_lengths)[:-1])
    ]


def comparison_columns(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> IdColumns:
    turns = chat.comparison_turns(tokenizer, rows)
    sequences = [turn.prompt + turn.response for turn in turns]
    return {
        "chosen": sequences[::2],
        "rejected": sequences[1::2],
        "prompt_length": [[len(turn.prompt)] for turn in turns[::2]],
    }


def encode_comparisons(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    length: int,
    rules: RowRules = DEFAULT_RULES,
) -> Encoded:
    """Return chosen and rejected [n length], each a prompt with a response, as arrays by name.

    Beside them are their lengths, the prompt's length, and the margin (float32), each [n].
    """
    names = ("chosen", "rejected", "prompt_length")
    columns, numbers = tokenise(comparison_columns, names, tokenizer, rows, "comparisons", rules)
    prompt_lengths = np.array([count for (count,) in columns["prompt_length"]], np.int32)
    sides = {side: columns[side] for side in ("chosen", "rejected")}
    longer = np.maximum(lengths_of(sides["chosen"]), lengths_of(sides["rejected"]))
    kept, dropped = fitting(longer, length, "comparisons")
    margins = [rows[number].get("margin", 0.0) for number in numbers[kept]]
    arrays: Arrays = {
        "margin": np.array(margins, np.float32),
        "prompt_length": prompt_lengths[kept],
    }
    for side, sequences in sides.items():
        ids = [sequences[i] for i in kept]
        arrays[side] = Ragged(ids, length)
        arrays[f"{side}_length"] = lengths_of(ids)
    return Encoded(arrays, dropped)


def prompt_columns(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> IdColumns:
    return {"prompt": chat.encode_prompts(tokenizer, [row["prompt"] for row in rows])}


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    length: int,
    rules: RowRules = DEFAULT_RULES,
) -> Encoded:
    """Return prompts [n length], left-padded, lengths [n], and index [n], the row's number."""
    columns, numbers = tokenise(prompt_columns, ("prompt",), tokenizer, rows, "prompts", rules)
    prompts = columns["prompt"]
    kept, dropped = fitting(lengths_of(prompts), length, "prompts")
    ids = [prompts[i] for i in kept]
    arrays = {
        "prompts": Ragged(ids, length, left=True),
        "lengths": lengths_of(ids),
        "index": numbers[kept].astype(np.int32),
    }
    return Encoded(arrays, dropped)


def narrowed(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a batch of prompts without needless padding in front.

    Prompts [b p] become as wide as the longest needs, of the widths of `packing`.
    """
    width = packing.width_of(rows["lengths"].max(), rows["prompts"].shape[1])
    return rows | {"prompts": rows["prompts"][:, -width:]}


ENCODERS = {
    "text": encode_text,
    "conversations": encode_conversations,
    "comparisons": encode_comparisons,
    "prompts": encode_prompts,
}


def encode(
    rows: list[dict],
    kind: str,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
    skip: bool = False,
) -> Arrays:
    """Return examples as arrays of one width; prints how many were dropped as too long, if any.

    With `skip`, rows that cannot be encoded are left out and counted too.
    """
    rules = RowRules(skip=skip, say=say)
    encoded = ENCODERS[kind](tokenizer, rows, length, rules)
    if encoded.dropped:
        say(f"{encoded.dropped} of {len(rows)} {kind} dropped: over {length} tokens")
    return encoded.arrays
