"""Measure the real tokens a second of reward-model training.

python benchmarks/ranking.py [tiny|small] [--steps N] [--microbatch-tokens N] [--padded]

A batch has 16 pairs. Their lengths are log-normal: median 96, sigma 0.6, 8 to 512. The optimiser is
AdamW. With --padded, each sequence has a row of its own.
"""

import argparse
import functools
import time

import jax
import numpy as np
import shapes

from alignjax import config as configs
from alignjax.algorithms import optimisation, ranking
from alignjax.algorithms.optimisation import MinibatchUpdate, TrainState
from alignjax.algorithms.ranking import PairMicrobatch
from alignjax.config import Model
from alignjax.data import ladders, mixture, packing
from alignjax.machine import sharding

PAIRS = 16
SHORTEST = 8
LONGEST = 512
MEDIAN = 96
SIGMA = 0.6
WARM_UP = 5  # steps


def pad(
    lengths: np.ndarray, groups: list[list[int]], longest: int, budget: int, *_: object
) -> list[packing.Layout]:
    """Lay out as `packing.pack`, but each sequence alone in a row of the longest width."""
    groups_per_part = max(budget // longest // len(groups[0]), 1)
    layouts = []
    for start in range(0, len(groups), groups_per_part):
        part = sum(groups[start : start + groups_per_part], [])
        spots = [packing.Spot(sequence, row, 0) for row, sequence in enumerate(part)]
        layouts.append(packing.layout(spots, lengths, packing.Shape(len(part), longest, 0)))
    return layouts


class RandomPairs:
    """Random comparisons, a batch for each step."""

    def __init__(self, model: Model, steps: int, microbatch_tokens: int):
        random = np.random.default_rng(0)
        pairs = steps * PAIRS
        self.steps = steps
        self.microbatch_tokens = microbatch_tokens
        self.mesh = sharding.make_mesh(configs.Mesh())
        lengths = np.exp(random.normal(np.log(MEDIAN), SIGMA, (pairs, 2))).round()
        self.lengths = np.clip(lengths.astype(np.int32), SHORTEST, LONGEST)
        self.rows = {"margin": np.zeros(pairs, np.float32)}
        for place, side in enumerate(ranking.SIDES):
            tokens = random.integers(2, model.vocab_size, (pairs, LONGEST))
            self.rows[side] = tokens.astype(np.int32)
            self.rows[f"{side}_length"] = self.lengths[:, place]
        batches = [self.get(step) for step in range(steps)]
        shards = sharding.row_shards(self.mesh)
        self.ladder = ladders.for_minibatches(
            batches,
            lambda rows, ladder: ranking.pack_minibatch(rows, microbatch_tokens, shards, ladder),
            ladders.costs_of(model, "scalar", microbatch_tokens),
            shards,
        )

    def get(self, step: int) -> ranking.Rows:
        """Return the comparisons of a step; after the last one come the first again."""
        start = step % self.steps * PAIRS
        return {name: array[start : start + PAIRS] for name, array in self.rows.items()}

    def pack(self, step: int) -> list[PairMicrobatch]:
        """Return the microbatches of a step."""
        rows = self.get(step)
        shards = sharding.row_shards(self.mesh)
        return ranking.pack_minibatch(rows, self.microbatch_tokens, shards, self.ladder)

    def on_mesh(self, microbatches: list[PairMicrobatch]) -> list[PairMicrobatch]:
        return [sharding.shard_batch(microbatch, self.mesh) for microbatch in microbatches]


class Training:
    """The updates of a reward model, from fresh parameters."""

    def __init__(self, model: Model, steps: int):
        self.model = model
        self.optimiser = optimisation.make_optimiser(configs.Optimiser(learning_rate=1e-5), steps)
        loss = functools.partial(ranking.loss_fn, model, configs.Ranking())
        self.update = MinibatchUpdate(loss, self.optimiser)

    def init_state(self) -> TrainState:
        init = functools.partial(optimisation.init_state, optimiser=self.optimiser)
        return jax.jit(init)(shapes.parameters(self.model, "scalar", 0))

    def compile_all(self, pairs: RandomPairs, batches: list[list[PairMicrobatch]]) -> float:
        """Run one batch of each combination of shapes, and return the seconds."""
        by_shapes = {shapes_of(batch): batch for batch in batches}
        state = self.init_state()
        start = time.perf_counter()
        for batch in by_shapes.values():
            state, _ = self.update(state, pairs.on_mesh(batch))
        jax.block_until_ready(state)
        return time.perf_counter() - start

    def time_steps(self, pairs: RandomPairs) -> float:
        """Return the seconds of the steps after the warm-up, packing on another thread."""
        ahead = mixture.Ahead(pairs.pack)
        state = self.init_state()
        for step in range(pairs.steps):
            if step == WARM_UP:
                jax.block_until_ready(state)
                start = time.perf_counter()
            state, _ = self.update(state, pairs.on_mesh(ahead.get(step)))
        jax.block_until_ready(state)
        return time.perf_counter() - start


def shapes_of(batch: list[PairMicrobatch]) -> tuple:
    return tuple(microbatch.packed.tokens.shape for microbatch in batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", nargs="?", default="tiny", choices=shapes.MODELS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--microbatch-tokens", type=int, default=2048)
    parser.add_argument("--padded", action="store_true")
    arguments = parser.parse_args()
    if arguments.padded:
        packing.pack = pad
    model = shapes.MODELS[arguments.size]
    pairs = RandomPairs(model, arguments.steps, arguments.microbatch_tokens)
    batches = [pairs.pack(step) for step in range(arguments.steps)]
    training = Training(model, arguments.steps)
    with jax.set_mesh(pairs.mesh):
        first_pass = training.compile_all(pairs, batches)
        seconds = training.time_steps(pairs)
    tokens = pairs.lengths[WARM_UP * PAIRS :].sum()
    timed = [microbatch for batch in batches[WARM_UP:] for microbatch in batch]
    places = sum(microbatch.packed.tokens.size for microbatch in timed)
    print(
        "ours rm",
        arguments.size,
        "padded" if arguments.padded else "packed",
        "microbatch_tokens",
        arguments.microbatch_tokens,
        "seconds",
        round(seconds, 2),
        "real_tokens_per_s",
        round(tokens / seconds, 1),
        "real_share_of_slots",
        round(tokens / places, 3),
        "first pass",
        round(first_pass, 1),
    )


if __name__ == "__main__":
    main()
