"""How exactly float32 is multiplied: as such, whatever the device."""

import jax
import jax.numpy as jnp

from alignjax.machine.precision import products_of


def product_of(dtype):
    """Return a product of float32 as a program has it, within a model of this type."""
    matrix = jnp.ones((8, 8))
    with products_of(dtype):
        return jax.jit(lambda a: a @ a).lower(matrix).as_text()


def test_float32_is_multiplied_as_such_and_other_types_by_the_device():
    before = jax.config.jax_default_matmul_precision
    assert "precision = [HIGHEST, HIGHEST]" in product_of("float32")
    assert "HIGHEST" not in product_of("bfloat16")
    assert jax.config.jax_default_matmul_precision == before
