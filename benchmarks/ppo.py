"""Seconds of a PPO iteration, by phase: 32 prompts of 32 tokens, 64 response tokens, 4 minibatches, 1 epoch, AdamW.

python benchmarks/ppo.py [tiny|small] [--iterations N] [--mean-length L]   with L, responses end at random, L tokens on average
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np
import shapes

from alignjax import config as configs
from alignjax.algorithms import optimisation, ppo
from alignjax.algorithms.advantages import RunningStats
from alignjax.machine import sharding
from alignjax.machine.profile import Compilations
from alignjax.models import transformer

PROMPTS, PROMPT, RESPONSE, MINIBATCHES, END = 32, 32, 64, 4, 1


def settings(size: str, slots: int, budget: int) -> configs.Config:
    c = configs.Config(
        stage="ppo", name="benchmark", model=shapes.MODELS[size], microbatch_tokens=budget
    )
    c.data.batch, c.data.max_length = PROMPTS, PROMPT
    c.ppo = configs.PPO(
        samples_per_prompt=1,
        response_length=RESPONSE,
        top_p=1.0,
        minibatches=MINIBATCHES,
        value_warmup_steps=0,
        slots=slots,
    )
    c.optimiser = c.value_optimiser = configs.Optimiser(learning_rate=3e-6)
    return c


def end_at_random(mean_length: float, vocabulary: int) -> None:
    """Have the sampler give the end token a chance of (about) 1 / mean_length at every place, whatever came before."""
    plain, odds = transformer.logits, np.log(vocabulary / (mean_length - 1))
    transformer.logits = lambda *a: plain(*a).at[..., END].add(odds)


class Iteration:
    """One iteration as `stages.ppo` makes it, with the time of each phase."""

    def __init__(self, config: configs.Config):
        self.config, self.mesh = config, sharding.make_mesh(config.mesh)
        optimisers = {
            role: optimisation.make_optimiser(config.optimiser, 10**6)
            for role in ("policy", "value")
        }
        self.programs = ppo.compiled(config, optimisers, END)
        make = functools.partial(shapes.parameters, config.model)
        self.state = {
            "policy": optimisation.init_state(make("lm", 0), optimisers["policy"]),
            "value": optimisation.init_state(make("scalar", 1), optimisers["value"]),
            "stats": RunningStats.zero(),
        }
        self.frozen = {"reference": make("lm", 0), "reward": make("scalar", 2)}
        self.rng, self.step = np.random.default_rng(1), 0

    def run(self) -> dict[str, float]:
        c, marks = self.config, [time.perf_counter()]

        def mark(arrays):
            jax.block_until_ready(arrays)
            marks.append(time.perf_counter())

        prompts = self.rng.integers(2, c.model.vocab_size, (PROMPTS, PROMPT)).astype(np.int32)
        batch = sharding.shard_batch(
            {
                "prompts": prompts,
                "lengths": np.full(PROMPTS, PROMPT, np.int32),
                "index": np.arange(PROMPTS, dtype=np.int32),
            },
            self.mesh,
        )
        params = {role: self.state[role].params for role in ("policy", "value")} | self.frozen
        sampled = self.programs.sample(
            params["policy"], batch, jax.random.fold_in(jax.random.key(0), self.step)
        )
        mark(sampled)
        experience, stats, _, _, first, cut = ppo.score(
            c,
            self.programs,
            params,
            self.state["stats"],
            sampled,
            np.full(PROMPTS, PROMPT),
            self.mesh,
        )
        mark(experience)
        self.state, _ = ppo.learn(
            c,
            self.programs,
            lambda n: 0.0,
            {**self.state, "stats": stats},
            experience,
            self.step,
            first,
            cut,
            lambda number: [],
        )
        mark(self.state)
        self.step += 1
        self.tokens = int(sampled.lengths.sum())
        return dict(zip(("rollout", "score", "update"), np.diff(marks).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", nargs="?", default="tiny", choices=shapes.MODELS)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--mean-length", type=float, default=0)
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--microbatch-tokens", type=int, default=4096)
    a = parser.parse_args()
    if a.mean_length:
        end_at_random(a.mean_length, shapes.MODELS[a.size].vocab_size)
    iteration = Iteration(settings(a.size, a.slots, a.microbatch_tokens))
    with jax.set_mesh(iteration.mesh):
        start = time.perf_counter()
        times, compiling, before = [], 0, 0
        with Compilations() as compilations:
            while len(times) < a.iterations:
                found, count = iteration.run(), compilations.end_step(0)
                if (
                    count > before
                ):  # for a shape that packing had not given yet: a run meets the last of them early
                    compiling, before = compiling + 1, count
                else:
                    times.append(found)
        first = time.perf_counter() - start - sum(sum(t.values()) for t in times)
    total = [sum(t.values()) for t in times]
    phases = {name: statistics.median(t[name] for t in times) for name in times[0]}
    print(
        "ours ppo",
        a.size,
        "iterations_that_compiled",
        compiling,
        "seconds_of_them",
        round(first, 1),
        "seconds_per_iteration",
        [round(t, 2) for t in total],
        "median",
        round(statistics.median(total), 3),
        {k: round(v, 3) for k, v in phases.items()},
        "tokens",
        iteration.tokens,
    )


if __name__ == "__main__":
    main()
