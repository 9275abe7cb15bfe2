"""How exactly devices multiply float32.

By default a GPU rounds the factors to TF32, with 10 bits of mantissa instead of 23, and a TPU to
bfloat16. Then a sequence's log-probabilities change by thousandths with its neighbours in a row,
which is more than `scoring.SELF_CHECK_LIMITS` allows. So a model in float32 is multiplied as such
on any device. One that may be less exact can have model.dtype="bfloat16", which is faster still.
"""

import contextlib
from collections.abc import Iterator

import jax


def precision_of(dtype: str) -> str:
    """Return JAX's name for the precision of float32 products in a model of this type."""
    return "highest" if dtype == "float32" else "default"


@contextlib.contextmanager
def products_of(dtype: str) -> Iterator[None]:
    """Multiply as a model of this type needs it, in all threads."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", precision_of(dtype))
    try:
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", before)
