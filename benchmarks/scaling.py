"""Measure cost against size: one size doubles while the others stay those of a tiny model.

python benchmarks/scaling.py [--axes batch length vocabulary depth scanned] [--doublings N]

update     the policy's gradient of one packed microbatch of batch x length tokens.
rollout    of as many prompts, half the length each, with responses of the other half; no end token.
seconds    the best of --repeats, which a shared machine disturbs the least.
MB         the compiler's temporaries, in 10^6 bytes; a rollout's include its cache.
compile    seconds to trace, lower and compile the program, once.
x          the ratio to the line above.
depth, scanned     the same models, with layers written out one by one, as on a CPU, and in a scan,
                   as elsewhere; on an accelerator both are the scan.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from sampling import rollout_program

from alignjax.algorithms import experience, ppo_programs
from alignjax.algorithms.experience import Experience
from alignjax.algorithms.ppo_programs import LearningPart
from alignjax.config import Config, Model
from alignjax.models import transformer
from alignjax.sampling.types import Rollout

ROWS = 8
LENGTH = 64
# Where each axis begins.
AXES = {
    "batch": ROWS,
    "length": LENGTH,
    "vocabulary": 4096,
    "depth": 2,
    "scanned": 2,
}
PARTS = ("update", "rollout")
FIGURES = ("seconds", "MB", "compile")
ALWAYS = 10**6  # layers: more than any model has


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a program costs."""

    seconds: float
    megabytes: float  # of temporaries
    compile_seconds: float

    def figures(self) -> list[float]:
        return [self.seconds, self.megabytes, self.compile_seconds]


def learning_config(model: Model, rows: int, length: int) -> Config:
    """Return the config of a microbatch of so many rows."""
    config = Config(stage="ppo", name="benchmark", model=model, microbatch_tokens=rows * length)
    config.data.max_length = length // 2
    config.ppo.response_length = length // 2
    return config


def learning_part(config: Config, rows: int, length: int) -> LearningPart:
    """Return a microbatch of experience whose rows are filled by two responses each.

    The responses take a half and a quarter of a row, and their prompts an eighth each.
    """
    responses = 2 * rows
    random = np.random.default_rng(1)
    prompt_lengths = np.full(responses, length // 8, np.int32)
    lengths = np.tile(np.int32([length // 2, length // 4]), rows)
    (microbatch,) = experience.pack_minibatch(
        config, prompt_lengths, lengths, np.arange(responses), 1
    )
    assert microbatch.sequence.shape == (rows, length)
    assert microbatch.sequence.min() == 0  # no row has a pad

    def random_figures() -> np.ndarray:
        return random.normal(size=(responses, length // 2)).astype(np.float32)

    rollout_logprobs = random_figures()
    old_logprobs = random_figures()
    old_values = random_figures()
    advantages = random_figures()
    returns = random_figures()
    tokens = random.integers(2, config.model.vocab_size, (responses, length)).astype(np.int32)
    rollout = Rollout(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        logprobs=rollout_logprobs,
        truncated=np.zeros(responses, bool),
    )
    made = Experience(
        rollout=rollout,
        old_logprobs=old_logprobs,
        old_values=old_values,
        advantages=advantages,
        returns=returns,
    )
    return jax.tree.map(jnp.asarray, (made, microbatch))


def policy_gradient(config: Config) -> Callable[[dict, LearningPart], tuple[dict, dict]]:
    """Return the compiled gradient of the policy's loss, with its metrics."""
    loss = functools.partial(ppo_programs.policy_loss_fn, config)
    return jax.jit(jax.grad(loss, has_aux=True))


def cost_of(program: Callable, arguments: tuple, repeats: int) -> Cost:
    """Compile a program and run it."""
    start = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    return Cost(
        seconds=min(shapes.seconds(lambda: compiled(*arguments), repeats)),
        megabytes=compiled.memory_analysis().temp_size_in_bytes / 1e6,
        compile_seconds=compile_seconds,
    )


def costs_at(axis: str, size: int, repeats: int) -> list[float]:
    """Return the figures of the gradient, then those of the rollout."""
    transformer.UNROLLED = 0 if axis == "scanned" else ALWAYS
    model = shapes.MODELS["tiny"]
    rows = size if axis == "batch" else ROWS
    length = size if axis == "length" else LENGTH
    if axis == "vocabulary":
        model = dataclasses.replace(model, vocab_size=size)
    elif axis in ("depth", "scanned"):
        model = dataclasses.replace(model, layers=size)
    params = shapes.parameters(model, "lm", 0)
    config = learning_config(model, rows, length)
    part = learning_part(config, rows, length)
    rollout = rollout_program(model, rows, length // 2, length // 2)
    gradient_cost = cost_of(policy_gradient(config), (params, part), repeats)
    rollout_cost = cost_of(rollout.sample, (params, rollout.prompts, rollout.key), repeats)
    return gradient_cost.figures() + rollout_cost.figures()


def print_axis(axis: str, doublings: int, repeats: int) -> None:
    """Print a line for each size of an axis, with the ratios to the line above."""
    before = None
    for doubling in range(doublings + 1):
        size = AXES[axis] * 2**doubling
        costs = costs_at(axis, size, repeats)
        ratios = [""] * len(costs)
        if before:
            ratios = [f"{new / old:5.2f}" for new, old in zip(costs, before, strict=True)]
        cells = [f"{cost:15.4g} {ratio:>5}" for cost, ratio in zip(costs, ratios, strict=True)]
        print(f"{axis + ' ' + str(size):16}", *cells, flush=True)
        before = costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--doublings", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    titles = [f"{part} {figure}" for part in PARTS for figure in FIGURES]
    print(f"{'':16}", *(f"{title:>15}     x" for title in titles), flush=True)
    for axis in arguments.axes:
        print_axis(axis, arguments.doublings, arguments.repeats)
    device = jax.devices()[0].device_kind
    print(f"tiny model, batch {ROWS}, length {LENGTH}, on {device}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
