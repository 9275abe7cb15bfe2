"""New tokens a second of sampling: 64 prompts of 64 tokens, 128 new ones each, top-p 0.9, and no end token; then 32 prompts
with two samples each.

python benchmarks/sampling.py [tiny|small] [--repeats N] [--slots S]    with S, so many responses at once (0: all of them)

A rollout is what `stages.ppo` runs: prefill, every step of decoding and the draws; the call that compiles is not counted.
"""

import argparse
import statistics

import jax
import numpy as np
import shapes

from alignjax import config as configs
from alignjax import sharding, update
from alignjax.stages import ppo

BATCH, PROMPT, NEW = 64, 64, 128


def rates(size: str, prompts: int, samples: int, slots: int, repeats: int, mesh) -> tuple[float, float]:
    """New tokens a second, the best and the median of `repeats` rollouts."""
    c = configs.Config(stage="ppo", name="benchmark", model=shapes.MODELS[size])
    c.ppo = configs.PPO(samples_per_prompt=samples, response_length=NEW, top_p=0.9, slots=slots)
    optimisers = {role: update.make_optimiser(c.optimiser, 1) for role in ("policy", "value")}
    sample = ppo.compiled(c, optimisers, end=-1).sample
    tokens = np.random.default_rng(1).integers(2, c.model.vocab_size, (prompts, PROMPT)).astype(np.int32)
    batch = sharding.shard_batch({"prompts": tokens, "lengths": np.full(prompts, PROMPT, np.int32),
                                  "index": np.arange(prompts, dtype=np.int32)}, mesh)  # fmt: skip
    params, key = shapes.parameters(c.model, "lm", 0), jax.random.key(0)
    found = shapes.seconds(lambda: sample(params, batch, key), repeats)
    assert (sharding.on_host(sample(params, batch, key).lengths) == NEW).all()
    every = [prompts * samples * NEW / s for s in found]
    return round(max(every), 1), round(statistics.median(every), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", nargs="?", default="tiny", choices=shapes.MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slots", type=int, default=0)
    a = parser.parse_args()
    mesh = sharding.make_mesh(configs.Mesh())
    with jax.set_mesh(mesh):
        one, two = (rates(a.size, BATCH // n, n, a.slots, a.repeats, mesh) for n in (1, 2))
    print("ours sampling", a.size, "slots", a.slots, "new_tokens_per_s best/median", *one,
          "two_samples_per_prompt best/median", *two)  # fmt: skip


if __name__ == "__main__":
    main()
