"""Cost against size: an update's gradient and a rollout, as one size doubles and the others stay those of a tiny model.

python benchmarks/scaling.py [--axes batch length vocabulary depth scanned] [--doublings N] [--repeats N]

update     the policy's gradient of one packed microbatch of batch x length tokens (`microbatch`).
rollout    of as many prompts, of half the length each, and responses of the other half, with no end token.
seconds    the best of --repeats: what a shared machine disturbs least.
MB         the compiler's temporaries, in 10^6 bytes (`memory_analysis`); a rollout's include its cache.
compile    seconds to trace, lower and compile the program, once.
x          the ratio to the line above.
depth, scanned     the same models, layers written out one by one, as a CPU runs them, and in a scan, as others
                   run them; on an accelerator both are the scan.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from sampling import programs, rollout

from alignjax import config as configs
from alignjax.algorithms import experience
from alignjax.models import transformer
from alignjax.sampling.types import Rollout

ROWS, LENGTH = 8, 64
AXES = {
    "batch": ROWS,
    "length": LENGTH,
    "vocabulary": 4096,
    "depth": 2,
    "scanned": 2,
}  # where each begins


def microbatch(model, rows: int, length: int):
    """(config, (Experience, part)): each row filled by two responses, of a half and a quarter of it, behind prompts of
    an eighth."""
    c = configs.Config(stage="ppo", name="benchmark", model=model, microbatch_tokens=rows * length)
    c.data.max_length = c.ppo.response_length = length // 2
    n, rng = 2 * rows, np.random.default_rng(1)
    prompts, lengths = (
        np.full(n, length // 8, np.int32),
        np.tile(np.int32([length // 2, length // 4]), rows),
    )
    (part,) = experience.microbatches(c, prompts, lengths, np.arange(n), 1)
    assert part["sequence"].shape == (rows, length) and part["sequence"].min() == 0
    fixed = [rng.normal(size=(n, length // 2)).astype(np.float32) for _ in range(5)]
    tokens = rng.integers(2, model.vocab_size, (n, length)).astype(np.int32)
    sampled = Rollout(
        tokens=tokens,
        prompt_lengths=prompts,
        lengths=lengths,
        logprobs=fixed[0],
        truncated=np.zeros(n, bool),
    )
    return c, jax.tree.map(jnp.asarray, (experience.Experience(sampled, *fixed[1:]), part))


def cost(program, arguments, repeats: int) -> tuple[float, float, float]:
    """Seconds, megabytes of temporaries, seconds to compile."""
    start = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    took = time.perf_counter() - start
    best = min(shapes.seconds(lambda: compiled(*arguments), repeats))
    return best, compiled.memory_analysis().temp_size_in_bytes / 1e6, took


def costs(axis: str, size: int, repeats: int) -> list[float]:
    """Those of the gradient, then those of the rollout."""
    model, rows, length = shapes.MODELS["tiny"], ROWS, LENGTH
    transformer.UNROLLED = 0 if axis == "scanned" else 10**6
    if axis == "batch":
        rows = size
    elif axis == "length":
        length = size
    else:
        model = dataclasses.replace(
            model, **{"vocab_size" if axis == "vocabulary" else "layers": size}
        )
    params = shapes.parameters(model, "lm", 0)
    config, pair = microbatch(model, rows, length)
    run = rollout(model, rows, length // 2, length // 2)
    gradient = cost(programs(config).policy_add, (None, params, pair), repeats)
    return [*gradient, *cost(run.func, (params, *run.keywords.values()), repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--doublings", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    names = [
        f"{what} {of}" for what in ("update", "rollout") for of in ("seconds", "MB", "compile")
    ]
    print(f"{'':16}", *(f"{name:>15}     x" for name in names), flush=True)
    for axis in a.axes:
        before = None
        for size in (AXES[axis] * 2**i for i in range(a.doublings + 1)):
            found = costs(axis, size, a.repeats)
            ratios = (
                [f"{new / old:5.2f}" for new, old in zip(found, before, strict=True)]
                if before
                else [""] * 6
            )
            print(
                f"{axis + ' ' + str(size):16}",
                *(f"{x:15.4g} {y:>5}" for x, y in zip(found, ratios, strict=True)),
                flush=True,
            )
            before = found
    print(
        f"tiny model, batch {ROWS}, length {LENGTH}, on {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )


if __name__ == "__main__":
    main()
