"""Real tokens a second of reward-model training: pairs of log-normal lengths (median 96, sigma 0.6, 8 to 512), 16 a batch, AdamW.

python benchmarks/ranking.py [tiny|small] [--steps N] [--microbatch-tokens N] [--padded]   the last: each in a row of its own
"""

import argparse
import functools
import time

import jax
import numpy as np
import shapes

from alignjax import config as configs
from alignjax.algorithms import optimisation, ranking
from alignjax.data import mixture, packing
from alignjax.machine import sharding

PAIRS, LONGEST, WARM = 16, 512, 5


def pad(lengths, groups, longest: int, budget: int, shards: int = 1) -> list[packing.Layout]:
    """As `packing.pack`, but each sequence alone in a row as wide as the longest may be."""
    each = max(budget // longest // len(groups[0]), 1)
    parts = [sum(groups[i : i + each], []) for i in range(0, len(groups), each)]
    return [
        packing.layout(
            [packing.Spot(i, row, 0) for row, i in enumerate(part)], lengths, len(part), longest
        )
        for part in parts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", nargs="?", default="tiny", choices=shapes.MODELS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--microbatch-tokens", type=int, default=2048)
    parser.add_argument("--padded", action="store_true")
    a = parser.parse_args()
    if a.padded:
        packing.pack = pad
    model, mesh, rng = (
        shapes.MODELS[a.size],
        sharding.make_mesh(configs.Mesh()),
        np.random.default_rng(0),
    )
    n = a.steps * PAIRS
    lengths = np.clip(
        np.exp(rng.normal(np.log(96), 0.6, (n, 2))).round().astype(np.int32), 8, LONGEST
    )
    rows = {"margin": np.zeros(n, np.float32)}
    for i, side in enumerate(ranking.SIDES):
        rows[side], rows[f"{side}_length"] = (
            rng.integers(2, model.vocab_size, (n, LONGEST)).astype(np.int32),
            lengths[:, i],
        )
    cut = lambda i: ranking.microbatches(
        {k: v[i * PAIRS : (i + 1) * PAIRS] for k, v in rows.items()},
        a.microbatch_tokens,
        sharding.row_shards(mesh),
    )
    every = [cut(i) for i in range(a.steps)]
    optimiser = optimisation.make_optimiser(configs.Optimiser(learning_rate=1e-5), a.steps)
    step = optimisation.compiled(
        functools.partial(ranking.loss_fn, model, configs.Ranking()), optimiser
    )
    with jax.set_mesh(mesh):
        fresh = lambda: jax.jit(functools.partial(optimisation.init_state, optimiser=optimiser))(
            shapes.parameters(model, "scalar", 0)
        )
        state, start = fresh(), time.perf_counter()
        for part in {
            tuple(x["tokens"].shape for x in parts): parts for parts in every
        }.values():  # every program
            state, _ = step(state, [sharding.shard_batch(x, mesh) for x in part])
        jax.block_until_ready(state)
        compiling, ahead, state = (
            time.perf_counter() - start,
            mixture.Ahead(lambda i: cut(i % a.steps)),
            fresh(),
        )
        for i in range(a.steps):
            if i == WARM:
                jax.block_until_ready(state)
                start = time.perf_counter()
            state, _ = step(state, [sharding.shard_batch(x, mesh) for x in ahead.get(i)])
        jax.block_until_ready(state)
        took = time.perf_counter() - start
    real = lengths[WARM * PAIRS :].sum()
    slots = sum(x["tokens"].size for parts in every[WARM:] for x in parts)
    layout = "padded" if a.padded else "packed"
    print(
        "ours rm",
        a.size,
        layout,
        "microbatch_tokens",
        a.microbatch_tokens,
        "seconds",
        round(took, 2),
        "real_tokens_per_s",
        round(real / took, 1),
        "real_share_of_slots",
        round(real / slots, 3),
        "first pass",
        round(compiling, 1),
    )


if __name__ == "__main__":
    main()
