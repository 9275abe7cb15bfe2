"""The two models that the benchmarks share with those of other libraries, and the rate that the machine's products reach."""

import statistics
import time

import jax
import jax.numpy as jnp

from alignjax.config import Model
from alignjax.models import transformer

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


def parameters(model: Model, head: str, seed: int):
    """Fresh parameters; logits of about a unit, as of a model that is not sure."""
    return jax.jit(lambda key: transformer.init(model, key, head))(jax.random.key(seed))


def matmul_weights(model: Model) -> int:
    """Weights of a layer's products, in all layers: two operations a token each, forward."""
    m = model
    return m.layers * (
        2 * m.d_model * (m.heads + m.kv_heads) * m.head_size + 3 * m.d_model * m.d_ff
    )


def operations(model: Model, tokens: int, length: float, logits: int = 0) -> float:
    """Of a forward pass over `tokens` that see `length` others each on average, with logits for some of them."""
    attention = 4 * model.layers * model.heads * model.head_size * length
    return (
        tokens * (2 * matmul_weights(model) + attention)
        + logits * 2 * model.d_model * model.vocab_size
    )


def seconds(run, repeats: int) -> list[float]:
    """Of each of `repeats` calls of run(), which returns arrays to wait for, after one that compiles."""
    out = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        out.append(time.perf_counter() - start)
    return out[1:]


def matmul_rate(dtype: str = "float32", size: int = 0) -> float:
    """Operations a second of a square product, the median of some."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / statistics.median(seconds(lambda: product(x), 9))
