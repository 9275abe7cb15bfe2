"""Comparisons, as the stages read them that learn from pairs of responses: ranking and DPO.

In shapes, `pairs` counts the pairs of a batch, `all_pairs` those of a data set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms import intervals
from alignjax.algorithms.stage import RunInputs
from alignjax.config import Config
from alignjax.data import ladders, mixture, packing
from alignjax.machine import sharding

Mesh = jax.sharding.Mesh
# chosen, rejected, their lengths, prompt_length, margin, as `encoding.encode` makes them
Rows = dict[str, Any]
# (parameters, microbatch) -> a figure of each response, [pairs 2]
ReadPairs = Callable[[dict, Any], jax.Array]
# (rows, tokens of a microbatch, devices that its rows lie over, the shapes of microbatches, for how
# many pairs) -> microbatches, each with `pair`
PackPairs = Callable[[Rows, int, int, packing.Ladder, int], list[Any]]

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class ComparisonData:
    """Comparisons as arrays: those to train on, in batches, and those that are held out."""

    batches: mixture.Batches
    heldout: dict[str, Rows]  # by source


def load(config: Config, inputs: RunInputs) -> ComparisonData:
    """Read and tokenise the comparisons that a config trains on and holds out."""
    data = config.data
    sets = mixture.sets(config, "comparisons", data.train, data.heldout, inputs.say)
    heldout = {
        source: mixture.encoded(
            config, rows, "comparisons", data.max_length, inputs.tokenizer, inputs.say
        )
        for source, rows in sets.heldout.items()
    }
    batches = mixture.batches(
        config, sets, "comparisons", data.max_length, data.batch, inputs.tokenizer, inputs.say
    )
    return ComparisonData(batches=batches, heldout=heldout)


def interleave(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and lengths of all sequences; the two of a pair are neighbours."""
    tokens = np.stack([rows[side] for side in SIDES], axis=1)
    lengths = np.stack([rows[f"{side}_length"] for side in SIDES], axis=1)
    return tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)


def lay_out(
    lengths: np.ndarray,
    longest: int,
    microbatch_tokens: int,
    row_shards: int,
    ladder: packing.Ladder,
    counts: np.ndarray | None = None,
) -> list[packing.Layout]:
    """Pack interleaved sequences into microbatches; both of a pair are in the same one."""
    pairs = [[first, first + 1] for first in range(0, len(lengths), 2)]
    return packing.pack(
        lengths, pairs, longest, microbatch_tokens, row_shards, ladder, counts=counts
    )


def read_rows(
    read: ReadPairs,
    pack: PackPairs,
    params: dict,
    rows: Rows,
    microbatch_tokens: int,
    mesh: Mesh,
    ladder: packing.Ladder = packing.fine,
    room: int = 0,
) -> np.ndarray:
    """Return what a compiled function makes of comparisons, [pairs 2], in their order."""
    figures = np.zeros((len(rows["margin"]) + 1, 2), np.float32)
    row_shards = sharding.row_shards(mesh)
    for microbatch in pack(rows, microbatch_tokens, row_shards, ladder, room):
        batch_figures = read(params, sharding.shard_batch(microbatch, mesh))
        figures[microbatch.pair] = sharding.on_host(batch_figures)
    return figures[:-1]  # the last row took the padding


def read_all(
    read: ReadPairs,
    pack: PackPairs,
    params: dict,
    rows: Rows,
    batch_size: int,
    microbatch_tokens: int,
    mesh: Mesh,
    ladder: packing.Ladder = packing.fine,
) -> np.ndarray:
    """Read all rows by a compiled function, in batches; return its figures, [all_pairs 2]."""
    parts = [
        read_rows(read, pack, params, part, microbatch_tokens, mesh, ladder, batch_size)
        for part in mixture.in_order(rows, batch_size)
    ]
    return np.concatenate(parts)


def choose_ladder(
    config: Config, data: ComparisonData, head: str, pack: PackPairs, row_shards: int
) -> packing.Ladder:
    """Return the shapes for the comparisons that a run trains on and holds out.

    `head` is the role's, "lm" or "scalar".
    """
    return ladders.for_minibatches(
        ladders.samples(data.batches, data.heldout.values(), config.data.batch),
        lambda rows, ladder: pack(rows, config.microbatch_tokens, row_shards, ladder, 0),
        ladders.costs_of(config.model, head, config.microbatch_tokens),
        row_shards,
    )


def agreement(difference: np.ndarray) -> dict[str, float]:
    """Return the accuracy, the ends of its 95 % interval, and the share of ties.

    `difference` [all_pairs] is positive where the chosen response is preferred. A tie is not
    correct.
    """
    right = difference > 0
    low, high = intervals.wilson_interval(int(right.sum()), len(right))
    return {
        "accuracy": right.mean(),
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": (difference == 0).mean(),
    }


def describe(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, number: int, name: str, figures: np.ndarray
) -> dict[str, Any]:
    """Return a comparison as text, with a figure of each of its responses by name."""
    sample = {}
    for side, figure in zip(SIDES, figures, strict=True):
        length = rows[f"{side}_length"][number]
        sample[side] = tokenizer.decode(rows[side][number][:length])
        sample[f"{side}_{name}"] = float(figure)
    return sample


def accuracy_line(figures: dict[str, float], source: str, label: str) -> tuple[str, str]:
    """Return the accuracy on a held-out source as a line of a run's table: (label, text)."""
    accuracy = f"{100 * figures[f'accuracy/{source}']:.1f} %"
    low = f"{100 * figures[f'accuracy_low/{source}']:.1f}"
    high = f"{100 * figures[f'accuracy_high/{source}']:.1f}"
    ties = f"{100 * figures[f'ties/{source}']:.1f} % ties"
    count = figures[f"comparisons/{source}"]
    return f"{label}, {source}", f"{accuracy} [{low}, {high}] ({ties}) of {count}"


def longest_rows(count: int, length: int) -> Rows:
    """Return comparisons that are as long as they may be, for planning."""
    rows: Rows = {
        "margin": np.zeros(count, np.float32),
        "prompt_length": np.ones(count, np.int32),
    }
    for side in SIDES:
        rows[side] = np.ones((count, length), np.int32)
        rows[f"{side}_length"] = np.full(count, length, np.int32)
    return rows
