"""New tokens a second of rollouts: 64 prompts of 64 tokens, 128 new tokens each, top-p 0.9, no end token; then two
samples of each of 32 prompts.

python benchmarks/sampling.py [tiny|small] [--repeats N] [--slots S]    S responses at once; 0, the default: all

A rollout is what `stages.ppo` runs: the prefill, every step of decoding, the draws. The call that compiles does not
count. The shapes are those of peers/hf_generate.py.
"""

import argparse
import functools
import statistics

import jax
import numpy as np
import shapes

from alignjax import config as configs
from alignjax.algorithms import optimisation, ppo
from alignjax.machine import sharding

PROMPTS, PROMPT, NEW = 64, 64, 128


def programs(config: configs.Config):
    """Those of the PPO stage; their end token is none."""
    optimiser = optimisation.make_optimiser(config.optimiser, 1)
    return ppo.compiled(config, {"policy": optimiser, "value": optimiser}, end=-1)


def rollout(model, prompts: int, prompt: int, new: int, samples: int = 1, slots: int = 0):
    """run(params) -> Rollout of `samples` responses of `new` tokens to each of so many prompts of `prompt` tokens."""
    c = configs.Config(stage="ppo", name="benchmark", model=model)
    c.ppo = configs.PPO(samples_per_prompt=samples, response_length=new, top_p=0.9, slots=slots)
    tokens = (
        np.random.default_rng(1).integers(2, model.vocab_size, (prompts, prompt)).astype(np.int32)
    )
    batch = {
        "prompts": tokens,
        "lengths": np.full(prompts, prompt, np.int32),
        "index": np.arange(prompts, dtype=np.int32),
    }
    return functools.partial(programs(c).sample, batch=batch, key=jax.random.key(0))


def rates(size: str, samples: int, slots: int, repeats: int, mesh) -> tuple[float, float]:
    """New tokens a second, the best and the median of `repeats` rollouts."""
    model = shapes.MODELS[size]
    run, params = (
        rollout(model, PROMPTS // samples, PROMPT, NEW, samples, slots),
        shapes.parameters(model, "lm", 0),
    )
    batch = sharding.shard_batch(run.keywords["batch"], mesh)
    found = [PROMPTS * NEW / s for s in shapes.seconds(lambda: run(params, batch=batch), repeats)]
    return round(max(found), 1), round(statistics.median(found), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", nargs="?", default="tiny", choices=shapes.MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slots", type=int, default=0)
    a = parser.parse_args()
    mesh = sharding.make_mesh(configs.Mesh())
    with jax.set_mesh(mesh):
        one, two = (rates(a.size, samples, a.slots, a.repeats, mesh) for samples in (1, 2))
    print(
        "ours sampling",
        a.size,
        "slots",
        a.slots,
        "new_tokens_per_s best/median",
        *one,
        "two_samples_per_prompt best/median",
        *two,
    )


if __name__ == "__main__":
    main()
