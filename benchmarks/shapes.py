"""The two models that our benchmarks share with the peers', and the rates of the machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.config import Model
from alignjax.machine.allocator import keep_memory
from alignjax.models import transformer

keep_memory()  # as training does

MODELS = {
    "tiny": Model(
        d_model=128,
        d_ff=344,
        layers=4,
        heads=4,
        kv_heads=4,
        head_size=32,
        vocab_size=512,
        max_length=512,
    ),
    "small": Model(
        d_model=512,
        d_ff=1376,
        layers=8,
        heads=8,
        kv_heads=8,
        head_size=64,
        vocab_size=8192,
        max_length=512,
    ),
}


def parameters(model: Model, head: str, seed: int) -> dict:
    """Return fresh parameters; their logits are about 1, as of a model that is not sure."""
    return jax.jit(lambda key: transformer.init(model, key, head))(jax.random.key(seed))


def matmul_weights(model: Model) -> int:
    """Count the weights of all layers' products: each has two operations a token, forward."""
    attention = 2 * model.d_model * (model.heads + model.kv_heads) * model.head_size
    feed_forward = 3 * model.d_model * model.d_ff
    return model.layers * (attention + feed_forward)


def operations(model: Model, tokens: int, length: float, logits: int = 0) -> float:
    """Count the operations of a forward pass.

    Each of `tokens` sees `length` tokens on average; `logits` of them get logits.
    """
    attention = 4 * model.layers * model.heads * model.head_size * length
    forward = tokens * (2 * matmul_weights(model) + attention)
    return forward + logits * 2 * model.d_model * model.vocab_size


def seconds(function: Callable[[], Any], repeats: int) -> list[float]:
    """Return the seconds of each call, after one that compiles; the results are waited for."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return times[1:]


def matmul_rate(dtype: str = "float32", size: int = 0) -> float:
    """Return the operations a second of a large square product: a median."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / statistics.median(seconds(lambda: product(matrix), 9))
