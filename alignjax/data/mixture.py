"""Where examples come from, and in which order they go: sources, mixtures, what is held out, batches.

A source is "toy/NAME" (the embedded world), "tfds/NAME" (a public set that `alignjax.data.prepare` has prepared, with its
options if any: "tfds/shp:min_score_ratio=3", and a split of its own if wanted: "tfds/shp/validation"), or a path of a
user's files. Several are joined by commas; with weights, "0.7*tfds/shp,0.3*mine.jsonl", each example is drawn from one of
them with that chance. A batch is a pure function of its step, so an exact resume needs the step alone.
"""

import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grain.python as grain
import numpy as np

from alignjax.config import Config, UserError
from alignjax.data import encoding, files, preferences, toy


def sources(text: str) -> list[tuple[str, float | None]]:
    """(source, weight or None) of each that is named; all have a weight or none has."""
    out = []
    for part in (
        re.split(r",(?![a-z_]+=)", text) if text else []
    ):  # a comma before OPTION= is of a set's options
        weight, source = re.fullmatch(r"(?:(\d+\.?\d*|\.\d+)\*)?(.*)", part.strip()).groups()
        if not source or (weight is not None and float(weight) <= 0):
            raise UserError(
                f"data {text!r}: sources wanted, with commas between, and WEIGHT* before each or before none"
            )
        out.append((source, None if weight is None else float(weight)))
    if len({weight is None for _, weight in out}) > 1:
        raise UserError(f"data {text!r}: WEIGHT* is wanted before each source or before none")
    return out


def load(
    source: str,
    kind: str,
    split: str,
    seed: int,
    limit: int = 0,
    data_dir: str = "",
    skip: bool = False,
    say=print,
) -> list[dict]:
    """All examples (or at most `limit`) of a kind (text, conversations, comparisons, prompts) and a split (train, heldout).

    The world's comparisons are toy/comparisons-noisy and toy/comparisons-clean. A public set gives comparisons; or their
    prompts; or these with the chosen reply, as conversations or as text. A file has no splits: see `sets`.
    """
    if source.startswith("tfds/"):
        spec, _, own = source.removeprefix("tfds/").partition("/")
        rows = preferences.read(spec, own or split, data_dir, 0 if kind == "prompts" else limit)
        if kind == "comparisons":
            return rows
        if kind == "prompts":
            distinct = {
                prompt_of(row): {"prompt": row["prompt"], "where": row["where"]}
                for row in reversed(rows)
            }
            return list(distinct.values())[::-1][: limit or None]
        said = [[*row["prompt"], {"role": "assistant", "content": row["chosen"]}] for row in rows]
        if kind == "conversations":
            return [
                {"messages": turns, "where": row["where"]}
                for turns, row in zip(said, rows, strict=True)
            ]
        return [{"text": "\n\n".join(m["content"] for m in turns)} for turns in said]
    if not source.startswith("toy/"):
        return files.read(source, kind, skip, say)[: limit or None]
    rows = toy.examples(source.removeprefix("toy/"), split, seed, limit)
    if not source.startswith(f"toy/{kind}"):
        names = " or ".join(f"toy/{name}" for name in toy.SIZES if name.startswith(kind))
        raise UserError(f"data {source}: this stage takes {kind}, that is {names} or a path")
    return rows


def prompt_of(row: dict) -> str:
    """What makes two examples one prompt's: the messages before the assistant's last turn, or a document's text."""
    if "text" in row:
        return row["text"].strip()
    messages = row.get("prompt")
    if messages is None:
        last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
        messages = row["messages"][:last]
    return json.dumps([[m["role"], m["content"].strip()] for m in messages])


def is_held_out(row: dict, share: float) -> bool:
    """By a hash of the prompt: the same whatever the seed, the order and the other rows."""
    return zlib.crc32(prompt_of(row).encode()) < share * 2**32


class Sets(NamedTuple):
    """Examples as rows: what is learnt from, source by source, and what is held out. No prompt is on both sides."""

    train: list[list[dict]]
    weights: list[float] | None  # of the sources; None: each example comes once in an epoch
    heldout: dict[str, list[dict]]


def sets(config: Config, kind: str, train: str, heldout: str, say) -> Sets:
    """The rows of sources to train on and to hold out.

    A file that is named in both is split: `data.heldout_share` of its prompts are held out. Whatever else of `train` has
    a prompt that is held out is dropped, and counted.
    """
    d = config.data
    learn, held = sources(train), [source for source, _ in sources(heldout)]
    shared = {
        source for source, _ in learn if source in held and not source.startswith(("toy/", "tfds/"))
    }
    if shared and not d.heldout_share:
        raise UserError(
            f"{min(shared)} is to be trained on and held out: name another file, or set data.heldout_share "
            "(0 now) to the share of its prompts that is held out"
        )

    def get(source: str, split: str) -> list[dict]:
        rows = load(
            source, kind, split, config.seed, d.examples, d.data_dir, d.on_bad_row == "skip", say
        )
        if source in shared:
            rows = [
                row for row in rows if is_held_out(row, d.heldout_share) == (split == "heldout")
            ]
        if not rows:
            raise UserError(
                f"{source}: there are no {kind} to {'hold out' if split == 'heldout' else 'train on'}; "
                f"data.heldout_share={d.heldout_share}"
            )
        return rows

    held_out = {source: get(source, "heldout") for source in held}
    known, found = {prompt_of(row) for rows in held_out.values() for row in rows}, []
    for source, _ in learn:
        rows = get(source, "train")
        found.append([row for row in rows if prompt_of(row) not in known])
        if len(found[-1]) < len(rows):
            say(
                f"{source}: {len(rows) - len(found[-1])} of {len(rows)} {kind} dropped: their prompt is held out"
            )
        if not found[-1]:
            raise UserError(f"{source}: every prompt of it is held out, by {heldout}")
    weights = [weight for _, weight in learn if weight]
    return Sets(found, weights or None, held_out)


class Batches:
    """Endless reshuffled epochs over `rows` (a dict of arrays [n ...]); the same in every process.

    With weights, rows are those of several data sets of `sizes`, each reshuffled by itself, and drawn from by weight.
    """

    def __init__(self, rows: dict, batch: int, seed: int, sizes=None, weights=None):
        self.rows, self.batch = rows, batch
        n = len(next(iter(rows.values())))
        self.epoch = -(-n // batch)  # steps in which as many examples go by as there are
        shuffled = lambda first, n, seed: (
            grain.MapDataset.source(range(first, first + n)).seed(seed).shuffle().repeat()
        )
        if weights is None:
            self.index = shuffled(0, n, seed)
        else:
            starts = np.cumsum([0, *sizes[:-1]]).tolist()
            each = [
                shuffled(first, size, seed + i)
                for i, (first, size) in enumerate(zip(starts, sizes, strict=True))
            ]
            self.index = grain.MapDataset.mix(each, weights)

    def order(self, step: int) -> np.ndarray:
        """The numbers of the rows in a step's batch."""
        return np.array([self.index[i] for i in range(step * self.batch, (step + 1) * self.batch)])

    def get(self, step: int) -> dict:
        chosen = self.order(step)
        return {k: v[chosen] for k, v in self.rows.items()}


def batches(
    config: Config, found: Sets, kind: str, length: int, batch: int, tokenizer, say
) -> Batches:
    """Batches of what is learnt from, as arrays; `index`, of prompts, numbers the rows of all sources as one list."""
    parts, before = [], 0
    for rows in found.train:
        parts.append(encoding.encode(rows, kind, length, tokenizer, say))
        if "index" in parts[-1]:
            parts[-1]["index"] += before
        before += len(rows)
    sizes = [len(next(iter(part.values()))) for part in parts]
    return Batches(encoding.join(parts), batch, config.seed, sizes, found.weights)


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
