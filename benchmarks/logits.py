"""What token log-probabilities and entropies cost over a large vocabulary, dense and in chunks: value and gradient.

python benchmarks/logits.py                                      sizes for a laptop's CPU, about two minutes, 6 GB
python benchmarks/logits.py --tokens 16384 --d 2048 --vocabulary 151936 --dtype bfloat16            on one GPU

Dense: all the logits, differentiated by JAX. Chunked: alignjax.vocabulary. TFLOP/s counts the three products that both
need (logits, d hidden, d kernel), not those that the chunked form makes twice. Temporary memory is the compiled
program's, beside the arrays that go in and come out.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alignjax.models.vocabulary import token_logprobs


def dense(hidden, kernel, targets):
    """As token_logprobs, with logits[t v]."""
    z = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(z, axis=-1)
    logprob = jnp.take_along_axis(z, targets[:, None], axis=-1)[:, 0] - normaliser
    return logprob, normaliser - jnp.sum(jnp.exp(z - normaliser[:, None]) * z, axis=-1)


def measure(read, tokens: int, d: int, v: int, dtype: str, repeats: int) -> tuple[float, float]:
    """Median seconds of a value and its gradients, and MiB of temporary memory."""
    hidden = jax.random.normal(jax.random.key(0), (tokens, d), dtype)
    kernel = jax.random.normal(jax.random.key(1), (d, v)) * d**-0.5
    targets = jax.random.randint(jax.random.key(2), (tokens,), 0, v)

    def loss(hidden, kernel, targets):
        logprob, entropy = read(hidden, kernel, targets)
        return -jnp.mean(logprob + 0.01 * entropy)

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel, targets).compile()
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(hidden, kernel, targets))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), program.memory_analysis().temp_size_in_bytes / 2**20


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
    print(
        "| tokens | d | vocabulary | hidden | | seconds | TFLOP/s | temporary MiB |\n|---|---|---|---|---|---|---|---|"
    )
    sizes = [
        (t, d, v, dtype)
        for dtype in arguments.dtype
        for d in arguments.d
        for t in arguments.tokens
        for v in arguments.vocabulary
    ]
    for t, d, v, dtype in sizes:
        for name, read in (("dense", dense), ("chunked", token_logprobs)):
            try:
                seconds, memory = measure(read, t, d, v, dtype, arguments.repeats)
                figures = f"{seconds:.4g} | {6 * t * d * v / seconds / 1e12:.3g} | {memory:.0f}"
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                figures = "out of memory | |"
            print(f"| {t} | {d} | {v} | {dtype} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
