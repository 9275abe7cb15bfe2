"""From rows to arrays: examples as tokens within a length limit. A longer one is dropped and counted, never cut.

Letters: n examples, t tokens.
"""

import numpy as np

from alignjax.config import UserError
from alignjax.data import chat, packing, shares

CHUNK = 4096  # rows that are tokenised at a time: lists of ids take many times the memory of arrays


class Ragged:
    """Sequences of ids, padded to [n t] with 0 only as rows of them are asked for: real text is mostly far below t."""

    def __init__(self, sequences, width: int, left: bool = False):
        arrays = [np.asarray(ids, np.int32) for ids in sequences]
        self.ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        self.ends = np.cumsum(lengths_of(arrays), dtype=np.int64)
        self.width, self.left = width, left

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows) -> np.ndarray:
        """As of an array: [t] for a number, [m t] for a slice or several."""
        numbers = np.arange(len(self))[rows]
        found = pad(
            [self.ids[self.ends[i - 1] if i else 0 : self.ends[i]] for i in np.atleast_1d(numbers)],
            self.width,
            self.left,
        )
        return found if np.ndim(numbers) else found[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.int32)


def pad(sequences, length: int, left: bool = False) -> np.ndarray:
    """Ids -> [n length] int32, padded with 0, which nothing reads: lengths and segments say what is real."""
    out = np.zeros((len(sequences), length), np.int32)
    for row, ids in zip(out, sequences, strict=True):
        row[length - len(ids) if left else 0 : None if left else len(ids)] = ids
    return out


def join(parts: list[dict]) -> dict:
    """The arrays of several data sets one behind the other."""
    if len(parts) == 1:
        return parts[0]
    out = {}
    for name, first in parts[0].items():
        each = [part[name] for part in parts]
        if isinstance(first, Ragged):
            out[name] = Ragged([], first.width, first.left)
            out[name].ids = np.concatenate([x.ids for x in each])
            out[name].ends = np.cumsum(np.concatenate([np.diff(x.ends, prepend=0) for x in each]))
        else:
            out[name] = np.concatenate(each)
    return out


def fitting(lengths, limit: int, what: str) -> tuple[np.ndarray, int]:
    """Indices of the examples within the limit, and how many are not; none left is a UserError."""
    kept = np.flatnonzero(np.array(lengths) <= limit)
    if not len(kept):
        shortest = min(lengths, default=0)
        raise UserError(
            f"data.max_length={limit}: all {len(lengths)} {what} are longer, the shortest has {shortest} tokens"
        )
    return kept, len(lengths) - len(kept)


def lengths_of(sequences) -> np.ndarray:
    return np.array([len(x) for x in sequences], np.int32)


def by_chunks(encode, rows: list) -> list:
    """encode(rows), a list of tuples of ids, CHUNK rows at a time, as arrays; of several processes each has its share."""
    out, mine = [], shares.mine(rows)
    for first in range(0, len(mine), CHUNK):
        out += [
            tuple(np.asarray(ids, np.int32) for ids in found)
            for found in encode(mine[first : first + CHUNK])
        ]
    return shares.whole(shares.exchange_ids(out))


def closing(tokenizer) -> int:
    """The token that ends a document of plain text."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode_text(tokenizer, rows: list[dict], length: int) -> tuple[dict, int]:
    """tokens, mask, segments, each [n length]: documents end to end, each closed by the pad token, cut in windows.

    Segments number a window's documents from 1. The mask is 1 where a token is a target: it follows another of its
    document in the window, for of a document's first token nothing can be known. The few tokens after the last whole
    window are left; nothing is dropped (0).
    """
    close = closing(tokenizer)
    tokens = lambda some: tokenizer([row["text"] for row in some], add_special_tokens=False)[
        "input_ids"
    ]
    ids = [
        ids for (ids,) in by_chunks(lambda some: [([*ids, close],) for ids in tokens(some)], rows)
    ]
    stream = np.concatenate(ids)
    document = np.repeat(np.arange(len(ids), dtype=np.int32), lengths_of(ids))
    n = len(stream) // length
    if not n:
        raise UserError(f"data.max_length={length}: the text has only {len(stream)} tokens in all")
    tokens, document = (x[: n * length].reshape(n, length) for x in (stream, document))
    mask = np.pad(document[:, 1:] == document[:, :-1], ((0, 0), (1, 0))).astype(np.int32)
    return {"tokens": tokens, "mask": mask, "segments": document - document[:, :1] + 1}, 0


def encode_conversations(tokenizer, rows: list[dict], length: int) -> tuple[dict, int]:
    """tokens, mask (1 on the assistant's tokens: the targets), segments, each [n length]; and the number dropped."""
    encoded = by_chunks(
        lambda some: chat.encode_conversations(tokenizer, [row["messages"] for row in some]), rows
    )
    kept, dropped = fitting([len(tokens) for tokens, _ in encoded], length, "conversations")
    tokens, trained = zip(*(encoded[i] for i in kept), strict=True)
    return {
        "tokens": Ragged(tokens, length),
        "mask": Ragged(trained, length),
        "segments": Ragged(map(np.ones_like, tokens), length),
    }, dropped


def encode_comparisons(tokenizer, rows: list[dict], length: int) -> tuple[dict, int]:
    """chosen, rejected, each [n length], their lengths [n], and margin[n]; and the number dropped as too long."""
    encoded = by_chunks(lambda some: chat.encode_comparisons(tokenizer, some), rows)
    kept, dropped = fitting([max(map(len, pair)) for pair in encoded], length, "comparisons")
    out = {"margin": np.array([rows[i].get("margin", 0.0) for i in kept], np.float32)}
    for side, ids in zip(
        ("chosen", "rejected"), zip(*(encoded[i] for i in kept), strict=True), strict=True
    ):
        out[side], out[f"{side}_length"] = Ragged(ids, length), lengths_of(ids)
    return out, dropped


def encode_prompts(tokenizer, rows: list[dict], length: int) -> tuple[dict, int]:
    """prompts[n length], left-padded, lengths[n] and index[n] (the row's number); and the number dropped as too long."""
    encoded = by_chunks(
        lambda some: [
            (ids,) for ids in chat.encode_prompts(tokenizer, [row["prompt"] for row in some])
        ],
        rows,
    )
    kept, dropped = fitting([len(ids) for (ids,) in encoded], length, "prompts")
    ids, index = [encoded[i][0] for i in kept], kept.astype(np.int32)
    return {
        "prompts": Ragged(ids, length, left=True),
        "lengths": lengths_of(ids),
        "index": index,
    }, dropped


def narrowed(rows: dict) -> dict:
    """A batch of prompts, prompts[b p] as wide as the longest asks (of the widths of `packing`)."""
    width = packing.width_of(rows["lengths"].max(), rows["prompts"].shape[1])
    return rows | {"prompts": rows["prompts"][:, -width:]}


ENCODERS = {
    "text": encode_text,
    "conversations": encode_conversations,
    "comparisons": encode_comparisons,
    "prompts": encode_prompts,
}


def encode(rows: list[dict], kind: str, length: int, tokenizer, say) -> dict:
    """Rows as arrays of one width; says how many were dropped as longer than that, if any."""
    arrays, dropped = ENCODERS[kind](tokenizer, rows, length)
    if dropped:
        say(f"{dropped} of {len(rows)} {kind} dropped: over {length} tokens")
    return arrays
