"""From examples to batches. A batch is a pure function of its step, so an exact resume needs the step alone."""

from concurrent.futures import ThreadPoolExecutor

import grain.python as grain
import numpy as np

from alignjax.config import Config, UserError
from alignjax.data import chat, files, toy


def load(source: str, kind: str, split: str, seed: int, limit: int = 0) -> list[dict]:
    """All examples (or at most `limit`) of a kind (text, conversations, comparisons, prompts): of the embedded world, or from JSON lines.

    The world's comparisons are toy/comparisons-noisy and toy/comparisons-clean. A file has no splits: name two files.
    """
    if not source.startswith("toy/"):
        return files.read(source, kind)[: limit or None]
    rows = toy.examples(source.removeprefix("toy/"), split, seed, limit)
    if not source.startswith(f"toy/{kind}"):
        names = " or ".join(f"toy/{name}" for name in toy.SIZES if name.startswith(kind))
        raise UserError(f"data {source}: this stage takes {kind}, that is {names} or a path")
    return rows


class Batches:
    """Endless reshuffled epochs over `rows` (a dict of arrays [n ...]); the same in every process."""

    def __init__(self, rows: dict, batch: int, seed: int):
        self.rows, self.batch = rows, batch
        n = len(next(iter(rows.values())))
        self.index = grain.MapDataset.source(range(n)).seed(seed).shuffle().repeat()

    def order(self, step: int) -> np.ndarray:
        """The numbers of the rows in a step's batch."""
        return np.array([self.index[i] for i in range(step * self.batch, (step + 1) * self.batch)])

    def get(self, step: int) -> dict:
        chosen = self.order(step)
        return {k: v[chosen] for k, v in self.rows.items()}


class Ahead:
    """make(step), begun on another thread as soon as the step before has been fetched, while the device works."""

    def __init__(self, make):
        self.make, self.thread, self.begun = make, ThreadPoolExecutor(1), {}

    def get(self, step: int):
        found = self.begun.pop(step, None) or self.thread.submit(self.make, step)
        self.begun = {step + 1: self.thread.submit(self.make, step + 1)}
        return found.result()


def in_order(rows: dict, batch: int):
    """Every row once, in order, `batch` at a time; the last batch may be smaller."""
    n = len(next(iter(rows.values())))
    for start in range(0, n, batch):
        yield {k: v[start : start + batch] for k, v in rows.items()}


def pad(sequences, length: int, left: bool = False) -> np.ndarray:
    """Lists of ids -> [n length] int32, padded with 0, which nothing reads: lengths and segments say what is real."""
    out = np.zeros((len(sequences), length), np.int32)
    for row, ids in zip(out, sequences, strict=True):
        row[length - len(ids) if left else 0 : None if left else len(ids)] = ids
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


def encode_text(tokenizer, rows: list[dict], length: int) -> tuple[dict, int]:
    """tokens, mask, segments, each [n length]: documents end to end, each closed by the pad token, cut in windows.

    Segments number a window's documents from 1. The mask is 1 where a token is a target: it follows another of its
    document in the window, for of a document's first token nothing can be known. The few tokens after the last whole
    window are left; nothing is dropped (0).
    """
    close = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = [x + [close] for x in tokenizer([r["text"] for r in rows], add_special_tokens=False)["input_ids"]]
    stream = np.concatenate([np.array(x, np.int32) for x in ids])
    document = np.repeat(np.arange(len(ids), dtype=np.int32), lengths_of(ids))
    n = len(stream) // length
    if not n:
        raise UserError(f"data.max_length={length}: the text has only {len(stream)} tokens in all")
    tokens, document = (x[: n * length].reshape(n, length) for x in (stream, document))
    mask = np.pad(document[:, 1:] == document[:, :-1], ((0, 0), (1, 0))).astype(np.int32)
    return {"tokens": tokens, "mask": mask, "segments": document - document[:, :1] + 1}, 0


def encode_conversations(tokenizer, rows: list[dict], length: int) -> tuple[dict, int]:
    """tokens, mask (1 on the assistant's tokens: the targets), segments, each [n length]; and the number dropped."""
    encoded = chat.encode_conversations(tokenizer, [row["messages"] for row in rows])
    kept, dropped = fitting([len(tokens) for tokens, _ in encoded], length, "conversations")
    tokens, trained = zip(*(encoded[i] for i in kept), strict=True)
    segments = (np.arange(length) < lengths_of(tokens)[:, None]).astype(np.int32)
    return {"tokens": pad(tokens, length), "mask": pad(trained, length), "segments": segments}, dropped


def encode_comparisons(tokenizer, rows: list[dict], length: int) -> tuple[dict, int]:
    """chosen, rejected, each [n length], their lengths [n], and margin[n]; and the number dropped as too long."""
    encoded = chat.encode_comparisons(tokenizer, rows)
    kept, dropped = fitting([max(map(len, pair)) for pair in encoded], length, "comparisons")
    out = {"margin": np.array([rows[i].get("margin", 0.0) for i in kept], np.float32)}
    for side, ids in zip(("chosen", "rejected"), zip(*(encoded[i] for i in kept), strict=True), strict=True):
        out[side], out[f"{side}_length"] = pad(ids, length), lengths_of(ids)
    return out, dropped


def encode_prompts(tokenizer, rows: list[dict], length: int) -> tuple[dict, int]:
    """prompts[n length], left-padded, lengths[n] and index[n] (the row's number). One that is too long is a UserError."""
    ids = chat.encode_prompts(tokenizer, [row["prompt"] for row in rows])
    lengths = lengths_of(ids)
    for i in np.flatnonzero(lengths > length)[:1]:
        raise UserError(f"{rows[i].get('where', f'prompt {i}')}: {lengths[i]} tokens, data.max_length={length}")
    index = np.arange(len(ids), dtype=np.int32)
    return {"prompts": pad(ids, length, left=True), "lengths": lengths, "index": index}, 0


ENCODERS = {"text": encode_text, "conversations": encode_conversations, "comparisons": encode_comparisons,
            "prompts": encode_prompts}  # fmt: skip


def encode(rows: list[dict], kind: str, length: int, tokenizer, say) -> dict:
    """Rows as arrays of one width; says how many were dropped as longer than that, if any."""
    arrays, dropped = ENCODERS[kind](tokenizer, rows, length)
    if dropped:
        say(f"{dropped} of {len(rows)} {kind} dropped: over {length} tokens")
    return arrays


def dataset(config: Config, source: str, kind: str, split: str, tokenizer, say) -> dict:
    """The arrays of a data set: `load`, then `encode`."""
    rows = load(source, kind, split, config.seed, config.data.examples)
    return encode(rows, kind, config.data.max_length, tokenizer, say)
