"""Which examples are trained on, which are held out, and in which order batches take them.

A batch is a pure function of its step, so an exact resume needs the step alone.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.config import Config, UserError
from alignjax.data import encoding
from alignjax.data import sources as data_sources
from alignjax.data.sources import is_held_out, prompt_of


class Sets(NamedTuple):
    """Examples to train on and to hold out; no prompt is on both sides."""

    train: list[list[dict]]  # of each source
    weights: list[float] | None  # of the sources; None: each example comes once in an epoch
    heldout: dict[str, list[dict]]  # by the name of the source

    @property
    def heldout_rows(self) -> list[dict]:
        """Return the held-out examples of all sources, one source after the other."""
        return [row for rows in self.heldout.values() for row in rows]


def sets(config: Config, kind: str, train: str, heldout: str, say: Callable[[str], None]) -> Sets:
    """Read the sources to train on and to hold out.

    A file that is named in both is split: `data.heldout_share` of its prompts are held out. Any
    other example of `train` whose prompt is held out is dropped, and counted. Of what is held out,
    the first `data.heldout_examples` of each source are returned.
    """
    train_sources = data_sources.parse(train)
    heldout_names = []
    for source in data_sources.parse(heldout):
        if source.weight is not None:
            raise UserError(f"{heldout}: weights are for training; a held-out source has none")
        heldout_names.append(source.name)
    split_files = {
        source.name
        for source in train_sources
        if source.name in heldout_names and data_sources.is_file(source.name)
    }
    if split_files and not config.data.heldout_share:
        raise UserError(
            f"{min(split_files)} is to be trained on and held out: name another file, or set "
            "data.heldout_share (0 now) to the share of its prompts that is held out"
        )
    options = data_sources.read_options(config, kind, say)
    share = config.data.heldout_share

    heldout_examples = {}
    for name in heldout_names:
        examples = data_sources.load(name, kind, "heldout", options)
        if name in split_files:
            examples = [example for example in examples if is_held_out(example, share)]
        check_not_empty(examples, f"{kind} to hold out", name, share)
        heldout_examples[name] = examples
    heldout_prompts = {
        prompt_of(example) for examples in heldout_examples.values() for example in examples
    }

    train_examples = []
    for source in train_sources:
        examples = data_sources.load(source.name, kind, "train", options)
        if source.name in split_files:
            examples = [example for example in examples if not is_held_out(example, share)]
        check_not_empty(examples, f"{kind} to train on", source.name, share)
        kept = [example for example in examples if prompt_of(example) not in heldout_prompts]
        if len(kept) < len(examples):
            dropped = len(examples) - len(kept)
            say(
                f"{source.name}: {dropped} of {len(examples)} {kind} dropped: "
                "their prompt is held out"
            )
        if not kept:
            raise UserError(f"{source.name}: every prompt of it is held out, by {heldout}")
        train_examples.append(kept)
    weights = [source.weight for source in train_sources if source.weight]
    limit = config.data.heldout_examples or None
    evaluated = {name: examples[:limit] for name, examples in heldout_examples.items()}
    return Sets(train_examples, weights or None, evaluated)


def check_not_empty(examples: list[dict], purpose: str, source: str, share: float) -> None:
    if not examples:
        raise UserError(f"{source}: there are no {purpose}; data.heldout_share={share}")


class Batches:
    """Endless reshuffled epochs over arrays; the same in every process.

    With weights, the arrays are those of several sources, one behind the other. Each source is
    reshuffled by itself, and each example is drawn from one of them by weight.
    """

    rows: dict[str, np.ndarray | encoding.Ragged]  # arrays of [n ...]
    epoch: int  # steps in which as many examples go by as there are

    def __init__(
        self,
        rows: dict[str, np.ndarray | encoding.Ragged],
        batch: int,
        seed: int,
        sizes: list[int] | None = None,
        weights: list[float] | None = None,
    ):
        """Take arrays, the batch's size, and with weights the number of examples of each source."""
        self.rows = rows
        self.batch = batch
        count = count_of(rows)
        self.epoch = -(-count // batch)
        if weights is None:
            self.positions = shuffled_epochs(0, count, seed)
            return
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        epochs = [
            shuffled_epochs(start, size, seed + number)
            for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
        ]
        self.positions = grain.MapDataset.mix(epochs, weights)

    def order(self, step: int) -> np.ndarray:
        """Return the numbers of the rows in a step's batch."""
        first = step * self.batch
        return np.array([self.positions[i] for i in range(first, first + self.batch)])

    def get(self, step: int) -> dict[str, np.ndarray]:
        """Return the batch of a step, arrays of [batch ...]."""
        order = self.order(step)
        return {name: array[order] for name, array in self.rows.items()}


def shuffled_epochs(start: int, size: int, seed: int) -> grain.MapDataset:
    """Return the numbers from `start`, `size` of them, in one shuffled epoch after another."""
    return grain.MapDataset.source(range(start, start + size)).seed(seed).shuffle().repeat()


def count_of(rows: dict[str, np.ndarray | encoding.Ragged]) -> int:
    """Return the number of examples in arrays of [n ...]."""
    return len(next(iter(rows.values())))


def encoded(
    config: Config,
    examples: list[dict],
    kind: str,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> dict[str, np.ndarray | encoding.Ragged]:
    """Return examples as arrays of at most `length` tokens each, see `encoding.encode`.

    The config says what happens to a row that cannot be encoded.
    """
    skip = config.data.on_bad_row == "skip"
    return encoding.encode(examples, kind, length, tokenizer, say, skip)


def batches(
    config: Config,
    examples: Sets,
    kind: str,
    length: int,
    batch: int,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> Batches:
    """Encode the examples to train on, at most `length` tokens each, as batches of `batch` rows.

    The `index` of prompts numbers the examples of all sources as one list.
    """
    parts = []
    examples_before = 0
    for source_examples in examples.train:
        part = encoded(config, source_examples, kind, length, tokenizer, say)
        if "index" in part:
            part["index"] += examples_before
        parts.append(part)
        examples_before += len(source_examples)
    sizes = [count_of(part) for part in parts]
    return Batches(encoding.join(parts), batch, config.seed, sizes, examples.weights)


class Ahead:
    """Makes what each step needs on another thread, one step ahead, while the device works.

    The next step's begins as soon as a step's is fetched. An error is raised when the step that
    it belongs to is fetched.
    """

    def __init__(self, make: Callable[[int], Any]):
        self.make = make
        self.thread = ThreadPoolExecutor(1)
        self.begun: dict[int, Future] = {}

    def get(self, step: int) -> Any:
        """Return make(step), and begin make(step + 1)."""
        future = self.begun.pop(step, None) or self.thread.submit(self.make, step)
        self.begun = {step + 1: self.thread.submit(self.make, step + 1)}
        return future.result()


def in_order(
    rows: dict[str, np.ndarray | encoding.Ragged], batch: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every row once, in order, `batch` at a time; the last batch may be smaller."""
    for start in range(0, count_of(rows), batch):
        yield {name: array[start : start + batch] for name, array in rows.items()}
