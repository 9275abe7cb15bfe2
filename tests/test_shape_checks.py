"""The shapes in signatures are checked in every test: see tests/conftest.py."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from alignjax.algorithms import advantages, losses
from alignjax.sampling import ring_cache

LOGPROBS = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    "weights",
    [jnp.ones((2, 4)), jnp.ones(3), jnp.ones((2, 3), jnp.int32), None],
    ids=["width", "axes", "type", "none"],
)
def test_an_argument_of_another_shape_or_type_fails(weights):
    losses.lm_loss(LOGPROBS, jnp.ones((2, 3)))
    with pytest.raises(jaxtyping.TypeCheckError, match="weights"):
        losses.lm_loss(LOGPROBS, weights)


def test_a_mask_must_be_boolean():
    with pytest.raises(jaxtyping.TypeCheckError, match="mask"):
        advantages.whiten(LOGPROBS, LOGPROBS)


def test_a_function_that_another_module_has_imported_is_checked_too():
    with pytest.raises(jaxtyping.TypeCheckError, match="queries"):
        ring_cache.cached_attention(LOGPROBS, [], [])


def test_a_numpy_array_may_stand_for_a_jax_array():
    loss, _ = losses.lm_loss(np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32))
    assert loss == 0
