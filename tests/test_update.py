"""The optimiser step: microbatches add, AdamW by hand, schedules, and what a checkpoint keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny, words

from alignjax import update
from alignjax.config import Optimiser
from alignjax.stages import lm

MODEL, PARAMS = tiny()


@pytest.fixture(scope="module")
def batch():
    """Eight rows with 1 to 8 targets."""
    n = np.arange(1, 9)[:, None]
    mask = (np.arange(9) <= n) & (np.arange(9) > 0)
    return lm.weighted({"tokens": words(0, 8, 9), "mask": jnp.asarray(mask), "segments": np.ones((8, 9), np.int32)})


def gradients(batch, microbatches):
    loss = functools.partial(lm.loss_fn, MODEL)
    return jax.jit(lambda params, batch: update.gradients(loss, params, batch, microbatches))(PARAMS, batch)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_of_unequal_lengths_add_up_to_the_minibatch(batch, microbatches):
    one, many = gradients(batch, 1), gradients(batch, microbatches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, many)


def test_every_target_counts_alike(batch):
    """The loss is the mean over all targets, not a mean of the rows' means."""
    _, metrics = gradients(batch, 1)
    logprob, _ = lm.sequence_logprobs(MODEL, PARAMS, batch["tokens"], batch["segments"])
    targets = np.asarray(batch["weights"])[:, 1:] > 0
    assert targets.sum() == 36
    assert metrics["loss"] == pytest.approx(-np.asarray(logprob)[targets].mean(), rel=1e-5)


def test_microbatches_take_every_so_many_th_row():
    cut = update.microbatched({"x": jnp.arange(6)}, 2)
    assert cut["x"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_adamw_by_hand():
    """Gradients (3, 4) have norm 5 and are clipped to (0.6, 0.8); only the kernel decays."""
    o = Optimiser(learning_rate=0.1, weight_decay=0.5, b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0)
    optimiser = update.make_optimiser(o, 10)
    state = update.init_state({"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}, optimiser)
    grads = {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}
    state = update.apply_gradients(optimiser, state, grads)
    assert state.params["kernel"] == pytest.approx(2 - 0.1 * (1 + 0.5 * 2), rel=1e-5)  # first step: m / sqrt(v) = 1
    assert state.params["bias"] == pytest.approx(2 - 0.1, rel=1e-5) and int(state.updates) == 1
    state = update.apply_gradients(optimiser, state, jax.tree.map(lambda x: -x, grads))
    m, v = 0.9 * 0.06 - 0.1 * 0.6, 0.6**2
    step = (m / (1 - 0.9**2)) / np.sqrt(v)
    assert state.params["kernel"] == pytest.approx(1.8 - 0.1 * (step + 0.5 * 1.8), rel=1e-4)


@pytest.mark.parametrize("settings, rates", [
    (dict(), {0: 2.0, 9: 2.0}),
    (dict(warmup_steps=4), {0: 0.0, 1: 0.5, 4: 2.0, 9: 2.0}),
    (dict(schedule="cosine"), {0: 2.0, 5: 1.1, 10: 0.2, 20: 0.2}),
    (dict(schedule="cosine", warmup_steps=2), {0: 0.0, 1: 1.0, 2: 2.0, 6: 1.1, 10: 0.2}),
])  # fmt: skip
def test_schedules(settings, rates):
    rate = update.learning_rate(Optimiser(learning_rate=2.0, **settings), 10)
    for at, wanted in rates.items():
        assert float(rate(at)) == pytest.approx(wanted, abs=1e-6)


def test_items_are_the_state_taken_apart():
    optimiser = update.make_optimiser(Optimiser(), 10)
    state = {"policy": update.init_state({"kernel": jnp.ones(2)}, optimiser), "stats": (jnp.ones(()),)}
    items = update.to_items(state)
    assert set(items) == {"policy", "policy_optimiser", "stats"} and items["policy"] is state["policy"].params
    again = update.from_items(items)
    assert jax.tree.structure(again) == jax.tree.structure(state) and set(again) == set(state)
