"""Measure log-probabilities and entropies over a large vocabulary, dense and in chunks.

python benchmarks/logits.py
python benchmarks/logits.py --tokens 16384 --d 2048 --vocabulary 151936 --dtype bfloat16

The first takes sizes for a laptop's CPU: about two minutes and 6 GB. The second is meant for one
GPU. Both measure a value and its gradient.

Dense: all the logits, differentiated by JAX. Chunked: alignjax.models.vocabulary. TFLOP/s counts
the three products that both need (logits, d hidden, d kernel), not those that the chunked form
repeats. Temporary memory is the compiled program's, without the arrays that go in and come out.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import shapes  # noqa: E402

from alignjax.models.vocabulary import token_logprobs  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Size:
    tokens: int
    width: int
    vocabulary: int
    dtype: str


def dense(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what token_logprobs returns, from logits of [tokens vocabulary]."""
    kernel = kernel.astype(hidden.dtype)
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    probabilities = jnp.exp(logits - normaliser[:, None])
    entropy = normaliser - jnp.sum(probabilities * logits, axis=-1)
    return chosen - normaliser, entropy


def measure(token_logprobs: Callable, size: Size, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a value and its gradients, and MiB of temporary memory."""
    hidden = jax.random.normal(jax.random.key(0), (size.tokens, size.width), size.dtype)
    kernel = jax.random.normal(jax.random.key(1), (size.width, size.vocabulary)) * size.width**-0.5
    targets = jax.random.randint(jax.random.key(2), (size.tokens,), 0, size.vocabulary)

    def loss(hidden, kernel, targets):
        logprob, entropy = token_logprobs(hidden, kernel, targets)
        return -jnp.mean(logprob + 0.01 * entropy)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    program = gradient.lower(hidden, kernel, targets).compile()
    seconds = shapes.seconds(lambda: program(hidden, kernel, targets), repeats)
    return statistics.median(seconds), program.memory_analysis().temp_size_in_bytes / 2**20


def figures(token_logprobs: Callable, size: Size, repeats: int) -> str:
    """Return the cells of a measurement, also of one that needs more memory than there is."""
    try:
        seconds, memory = measure(token_logprobs, size, repeats)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return "out of memory | |"
    operations = 6 * size.tokens * size.width * size.vocabulary
    return f"{seconds:.4g} | {operations / seconds / 1e12:.3g} | {memory:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--d", type=int, nargs="+", default=[512])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 32768, 151936])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="of hidden"
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, median of {arguments.repeats}\n")
    print("| tokens | d | vocabulary | hidden | | seconds | TFLOP/s | temporary MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype, width, tokens, vocabulary in itertools.product(
        arguments.dtype, arguments.d, arguments.tokens, arguments.vocabulary
    ):
        size = Size(tokens=tokens, width=width, vocabulary=vocabulary, dtype=dtype)
        for name, function in (("dense", dense), ("chunked", token_logprobs)):
            cells = figures(function, size, arguments.repeats)
            print(f"| {tokens} | {width} | {vocabulary} | {dtype} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
