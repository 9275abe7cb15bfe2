"""Measure the seconds of a PPO iteration, by phase.

python benchmarks/ppo.py [tiny|small] [--iterations N] [--mean-length L]

An iteration has 32 prompts of 32 tokens, 64 response tokens, 4 minibatches and 1 epoch with AdamW.
With L, responses end at random, after L tokens on average.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import shapes

from alignjax import config as configs
from alignjax.algorithms import optimisation
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.ppo import PPO
from alignjax.algorithms.ppo_data import PretrainingText, choose_ladder
from alignjax.config import Config
from alignjax.machine import sharding
from alignjax.machine.profile import Compilations
from alignjax.models import transformer

PROMPTS = 32
PROMPT_TOKENS = 32
RESPONSE_TOKENS = 64
MINIBATCHES = 4
END = 1
PHASES = ("rollout", "score", "update")

Seconds = dict[str, float]  # phase -> seconds


def make_config(size: str, slots: int, microbatch_tokens: int) -> Config:
    config = Config(
        stage="ppo",
        name="benchmark",
        model=shapes.MODELS[size],
        microbatch_tokens=microbatch_tokens,
    )
    config.data.batch = PROMPTS
    config.data.max_length = PROMPT_TOKENS
    config.ppo = configs.PPO(
        samples_per_prompt=1,
        response_length=RESPONSE_TOKENS,
        top_p=1.0,
        minibatches=MINIBATCHES,
        value_warmup_steps=0,
        pretrain_coef=0.0,
        slots=slots,
    )
    config.optimiser = configs.Optimiser(learning_rate=3e-6)
    config.value_optimiser = configs.Optimiser(learning_rate=3e-6)
    return config


def end_at_random(mean_length: float, vocabulary: int) -> None:
    """Make the sampler draw the end token with a chance of (about) 1 / mean_length.

    The chance is the same at every place, whatever came before.
    """
    plain_logits = transformer.logits
    odds = np.log(vocabulary / (mean_length - 1))

    def logits(*arguments):
        return plain_logits(*arguments).at[..., END].add(odds)

    transformer.logits = logits


class Iterations:
    """Runs iterations of the PPO stage on random prompts, and takes the time of each phase."""

    def __init__(self, config: Config):
        self.config = config
        self.mesh = sharding.make_mesh(config.mesh)
        self.stage = PPO(config, self.mesh, end_tokens=(END,))
        self.stage.frozen = {
            "reference": shapes.parameters(config.model, "lm", 0),
            "reward": shapes.parameters(config.model, "scalar", 2),
        }
        self.stage.text = PretrainingText()
        self.stage.ladder = choose_ladder(
            config,
            lambda step: np.full(config.data.batch, config.data.max_length),
            sharding.row_shards(self.mesh),
            behind=0,
        )
        policy = shapes.parameters(config.model, "lm", 0)
        value = shapes.parameters(config.model, "scalar", 1)
        trained = self.stage.trained
        self.state = {
            "policy": optimisation.init_state(policy, trained.policy_optimiser),
            "value": optimisation.init_state(value, trained.value_optimiser),
            "stats": RunningStats.zero(),
        }
        self.random = np.random.default_rng(1)
        self.step = 0
        self.tokens = 0  # of the last iteration's responses

    def run(self) -> Seconds:
        """Run an iteration, and return the seconds of its phases."""
        marks = [time.perf_counter()]
        batch = self.random_prompts()
        params = self.stage.role_params(self.state)
        rollout = self.stage.compiled.responder.respond(params["policy"], batch, self.step)
        marks.append(time_after(rollout))
        minibatches = self.stage.pack(batch, rollout)
        scored = self.stage.score(params, self.state, rollout, minibatches)
        marks.append(time_after(scored.experience))
        state = {**self.state, "stats": scored.stats}
        self.state, _ = self.stage.learn(state, scored.experience, minibatches, self.step)
        marks.append(time_after(self.state))
        self.step += 1
        self.tokens = int(rollout.lengths.sum())
        return dict(zip(PHASES, np.diff(marks).tolist(), strict=True))

    def random_prompts(self) -> dict[str, np.ndarray]:
        data = self.config.data
        shape = (data.batch, data.max_length)
        tokens = self.random.integers(2, self.config.model.vocab_size, shape)
        return {
            "prompts": tokens.astype(np.int32),
            "lengths": np.full(data.batch, data.max_length, np.int32),
            "index": np.arange(data.batch, dtype=np.int32),
        }


def time_after(arrays) -> float:
    """Return the time at which these arrays are ready."""
    jax.block_until_ready(arrays)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", nargs="?", default="tiny", choices=shapes.MODELS)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--mean-length", type=float, default=0)
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--microbatch-tokens", type=int, default=4096)
    arguments = parser.parse_args()
    if arguments.mean_length:
        end_at_random(arguments.mean_length, shapes.MODELS[arguments.size].vocab_size)
    config = make_config(arguments.size, arguments.slots, arguments.microbatch_tokens)
    iterations = Iterations(config)
    timed = []
    compiling = 0  # iterations with a shape that packing had not given before: a run's first ones
    programs = 0
    start = time.perf_counter()
    with jax.set_mesh(iterations.mesh), Compilations() as compilations:
        while len(timed) < arguments.iterations:
            seconds = iterations.run()
            count = compilations.end_step(0)
            if count > programs:
                compiling += 1
                programs = count
            else:
                timed.append(seconds)
    totals = [sum(seconds.values()) for seconds in timed]
    compiling_seconds = time.perf_counter() - start - sum(totals)
    medians = {phase: statistics.median(seconds[phase] for seconds in timed) for phase in PHASES}
    print(
        "ours ppo",
        arguments.size,
        "iterations_that_compiled",
        compiling,
        "seconds_of_them",
        round(compiling_seconds, 1),
        "seconds_per_iteration",
        [round(total, 2) for total in totals],
        "median",
        round(statistics.median(totals), 3),
        {phase: round(seconds, 3) for phase, seconds in medians.items()},
        "tokens",
        iterations.tokens,
    )


if __name__ == "__main__":
    main()
