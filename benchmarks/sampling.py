"""Measure the new tokens a second of rollouts: 64 prompts of 64 tokens, 128 new tokens each.

python benchmarks/sampling.py [tiny|small] [--repeats N] [--slots S]

With S, that many responses decode at once; 0, the default, decodes all at once. Sampling is top-p
0.9 without an end token. Then come two samples of each of 32 prompts.

A rollout is the one that PPO runs: the prefill, every decode step and the draws. The call that
compiles does not count. The shapes are those of peers/hf_generate.py.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import shapes

from alignjax import config as configs
from alignjax.algorithms import responding
from alignjax.config import Config, Model
from alignjax.machine import sharding
from alignjax.sampling.types import Prompts, Rollout

PROMPTS = 64
PROMPT_TOKENS = 64
NEW_TOKENS = 128
NO_END = (-1,)  # a token that is never drawn


@dataclass(frozen=True)
class RolloutProgram:
    """A compiled rollout with its prompts and its key: a function of the policy's parameters."""

    sample: Callable[[dict, Prompts, jax.Array], Rollout]
    prompts: Prompts
    key: jax.Array

    def __call__(self, params: dict) -> Rollout:
        return self.sample(params, self.prompts, self.key)


def rollout_program(
    model: Model,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    samples: int = 1,
    slots: int = 0,
) -> RolloutProgram:
    """Return a rollout of `samples` responses of `new_tokens` tokens to each prompt."""
    ppo = configs.PPO(
        samples_per_prompt=samples, response_length=new_tokens, top_p=0.9, slots=slots
    )
    config = Config(stage="ppo", name="benchmark", model=model, ppo=ppo)
    settings = responding.sampling_settings(config, NO_END)
    sample = responding.make_sampler(config, sharding.make_mesh(config.mesh), settings)
    random = np.random.default_rng(1)
    tokens = random.integers(2, model.vocab_size, (prompts, prompt_tokens))
    batch = Prompts(
        tokens=tokens.astype(np.int32),
        lengths=np.full(prompts, prompt_tokens, np.int32),
        index=np.arange(prompts, dtype=np.int32),
    )
    return RolloutProgram(sample, batch, jax.random.key(0))


def best_and_median(
    size: str, samples: int, slots: int, repeats: int, mesh: jax.sharding.Mesh
) -> tuple[float, float]:
    """Return the new tokens a second of the best and of the median rollout."""
    model = shapes.MODELS[size]
    program = rollout_program(
        model, PROMPTS // samples, PROMPT_TOKENS, NEW_TOKENS, samples=samples, slots=slots
    )
    program = dataclasses.replace(program, prompts=sharding.shard_batch(program.prompts, mesh))
    params = shapes.parameters(model, "lm", 0)
    seconds = shapes.seconds(lambda: program(params), repeats)
    rates = [PROMPTS * NEW_TOKENS / value for value in seconds]
    return round(max(rates), 1), round(statistics.median(rates), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", nargs="?", default="tiny", choices=shapes.MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slots", type=int, default=0)
    arguments = parser.parse_args()
    size = arguments.size
    mesh = sharding.make_mesh(configs.Mesh())
    with jax.set_mesh(mesh):
        one_sample = best_and_median(size, 1, arguments.slots, arguments.repeats, mesh)
        two_samples = best_and_median(size, 2, arguments.slots, arguments.repeats, mesh)
    print(
        "ours sampling",
        size,
        "slots",
        arguments.slots,
        "new_tokens_per_s best/median",
        *one_sample,
        "two_samples_per_prompt best/median",
        *two_samples,
    )


if __name__ == "__main__":
    main()
