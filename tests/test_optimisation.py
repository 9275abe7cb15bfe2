"""The optimiser step: microbatches add up, AdamW by hand, schedules, checkpoint items."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_models import tiny, words

from alignjax.algorithms import lm, optimisation
from alignjax.config import Mesh, Optimiser
from alignjax.machine import sharding
from alignjax.models import transformer

MODEL, PARAMS = tiny()
LENGTHS = np.arange(2, 10)  # of eight rows, with 1 to 8 targets
ROWS = {
    "tokens": words(0, 8, 9),
    "mask": ((np.arange(9) < LENGTHS[:, None]) & (np.arange(9) > 0)).astype(np.int32),
    "segments": (np.arange(9) < LENGTHS[:, None]).astype(np.int32),
}


@pytest.fixture(scope="module")
def gradients():
    """Return budget -> (total over the minibatch, number of microbatches)."""
    accumulate = optimisation.Accumulate(functools.partial(lm.loss_fn, MODEL))

    @functools.cache
    def total_of(budget):
        microbatches = lm.pack_minibatch(ROWS, budget, 1)
        return accumulate(PARAMS, microbatches), len(microbatches)

    return total_of


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget, count", [(32, 2), (16, 3)])
def test_microbatches_of_unequal_lengths_add_up_to_the_minibatch(gradients, budget, count):
    """The smallest microbatch that holds all 44 tokens has three rows of 16."""
    whole, whole_count = gradients(48)
    split, split_count = gradients(budget)
    assert whole_count == 1 and split_count == count
    assert_close(whole, split)


def test_every_target_counts_alike(gradients):
    """Loss and gradient are those of the mean over all targets, not of a mean of row means."""

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def mean(params):
        places = np.tile(np.arange(9), (8, 1))
        hidden = transformer.apply(MODEL, params, ROWS["tokens"], places, ROWS["segments"]).hidden
        all_logprobs = jax.nn.log_softmax(transformer.logits(MODEL, params, hidden[:, :-1]))
        labels = ROWS["tokens"][:, 1:, None]
        logprobs = jnp.take_along_axis(all_logprobs, labels, axis=-1)[..., 0]
        entropy = -(jnp.exp(all_logprobs) * all_logprobs).sum(-1)
        mask = ROWS["mask"][:, 1:] > 0
        aside = {
            "entropy": entropy.mean(where=mask),
            "mean_of_means": -logprobs.mean(axis=1, where=mask).mean(),
        }
        return -logprobs.mean(where=mask), aside

    (loss, aside), gradient = jax.device_get(mean(PARAMS))
    assert ROWS["mask"].sum() == 36
    for budget in (48, 16):
        total, _ = gradients(budget)
        assert total.metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert total.metrics["entropy"] == pytest.approx(aside["entropy"], rel=1e-5)
        assert abs(total.metrics["loss"] - aside["mean_of_means"]) > 1e-2
        assert_close(total.gradient, gradient)


def line(params, batch):
    """Return a loss whose gradient can be worked out by hand."""
    loss = jnp.sum(batch["weights"] * (params["kernel"] * batch["x"] + params["bias"]))
    return loss, {"loss": loss, "seen": batch["x"].size}


LINE = {"kernel": 2.0, "bias": 1.0}
PARTS = [
    {"x": np.array([[3.0, 4.0]]), "weights": np.array([[0.5, 0.25]])},
    {
        "x": np.array([[8.0, 9.0, 9.0], [9.0, 9.0, 9.0]]),
        "weights": np.array([[0.25, 0.0, 0.0]] + [[0.0] * 3]),
    },
]


def test_a_total_by_hand():
    """Microbatches of any shapes: 3/2 + 4/4 + 8/4 = 4.5, and the sum of the weights."""
    params = jax.tree.map(jnp.float32, LINE)
    total = optimisation.Accumulate(line)(params, PARTS)
    assert total.gradient == {"kernel": 4.5, "bias": 1.0}
    assert total.metrics == {"loss": 2 * 4.5 + 1, "seen": 8}
    assert optimisation.Accumulate(line)(params, []) is None


def test_a_minibatch_update_is_one_optimiser_step_that_donates_the_state():
    """Adam's first step is the learning rate for any gradient; the norm is that before the clip."""
    optimiser = optimisation.make_optimiser(Optimiser(learning_rate=0.1, clip_norm=1.0), 10)
    step = optimisation.MinibatchUpdate(line, optimiser)
    before = optimisation.init_state({name: jnp.float32(x) for name, x in LINE.items()}, optimiser)
    kernel = before.params["kernel"]
    after, metrics = step(before, PARTS)
    assert (
        metrics["grad_norm"] == pytest.approx(np.hypot(4.5, 1.0))
        and metrics["loss"] == 10
        and metrics["seen"] == 8
    )
    assert after.params["kernel"] == pytest.approx(1.9) and after.params["bias"] == pytest.approx(
        0.9
    )
    assert int(after.updates) == 1 and kernel.is_deleted()


def test_a_step_leaves_the_state_laid_out_by_the_table_and_compiles_once():
    """Gradients are whole on every device; the state, before and after, is sharded."""
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = sharding.make_mesh(Mesh(2, 2, 2))
    optimiser = optimisation.make_optimiser(Optimiser(learning_rate=0.1), 10)
    init = functools.partial(optimisation.init_state, optimiser=optimiser)
    params = {"head": {"kernel": np.ones((4, 6), np.float32)}}
    abstract = sharding.abstract(jax.eval_shape(init, params), mesh)
    update = functools.partial(optimisation.update_state, optimiser)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        state = optimisation.place_state(placed, optimiser, abstract)
        step = optimisation.compile_update(update, abstract)
        for _ in range(2):
            gradient = jax.device_put(params, sharding.replicated(mesh))
            state, _ = step(state, optimisation.GradientSum(gradient, {}))
            kernel = state.params["head"]["kernel"]
            assert kernel.sharding.spec == P("fsdp", "tensor") and kernel.addressable_shards[
                0
            ].data.shape == (2, 3)
            assert all(
                jax.tree.leaves(
                    jax.tree.map(lambda x, s: x.sharding == s.sharding, state, abstract)
                )
            )
    assert step._cache_size() == 1 and int(state.updates) == 2


def test_adamw_by_hand():
    """Gradients (3, 4) have norm 5 and are clipped to (0.6, 0.8); only the kernel decays."""
    o = Optimiser(learning_rate=0.1, weight_decay=0.5, b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0)
    optimiser = optimisation.make_optimiser(o, 10)
    state = optimisation.init_state(
        {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}, optimiser
    )
    grads = {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}
    state, _ = optimisation.apply_gradients(optimiser, state, grads, {"loss": jnp.ones(())})
    assert state.params["kernel"] == pytest.approx(
        2 - 0.1 * (1 + 0.5 * 2), rel=1e-5
    )  # first step: m / sqrt(v) = 1
    assert state.params["bias"] == pytest.approx(2 - 0.1, rel=1e-5) and int(state.updates) == 1
    state, _ = optimisation.apply_gradients(
        optimiser, state, jax.tree.map(lambda x: -x, grads), {"loss": jnp.ones(())}
    )
    m, v = 0.9 * 0.06 - 0.1 * 0.6, 0.6**2
    step = (m / (1 - 0.9**2)) / np.sqrt(v)
    assert state.params["kernel"] == pytest.approx(1.8 - 0.1 * (step + 0.5 * 1.8), rel=1e-4)


@pytest.mark.parametrize(
    "settings, rates",
    [
        (dict(), {0: 2.0, 9: 2.0}),
        (dict(warmup_steps=4), {0: 0.0, 1: 0.5, 4: 2.0, 9: 2.0}),
        (dict(schedule="cosine"), {0: 2.0, 5: 1.1, 10: 0.2, 20: 0.2}),
        (dict(schedule="cosine", warmup_steps=2), {0: 0.0, 1: 1.0, 2: 2.0, 6: 1.1, 10: 0.2}),
    ],
)
def test_schedules(settings, rates):
    rate = optimisation.learning_rate_schedule(Optimiser(learning_rate=2.0, **settings), 10)
    for at, wanted in rates.items():
        assert float(rate(at)) == pytest.approx(wanted, abs=1e-6)


def test_items_are_the_state_taken_apart():
    optimiser = optimisation.make_optimiser(Optimiser(), 10)
    state = {
        "policy": optimisation.init_state({"kernel": jnp.ones(2)}, optimiser),
        "stats": (jnp.ones(()),),
    }
    items = optimisation.to_checkpoint(state)
    assert (
        set(items) == {"policy", "policy_optimiser", "stats"}
        and items["policy"] is state["policy"].params
    )
    again = optimisation.from_checkpoint(items)
    assert jax.tree.structure(again) == jax.tree.structure(state) and set(again) == set(state)
