"""The optimiser step: microbatches add, AdamW by hand, schedules, and what a checkpoint keeps."""

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
    """budget -> (the whole minibatch's gradient and metrics, the number of microbatches)."""
    add = optimisation.adder(functools.partial(lm.loss_fn, MODEL))

    @functools.cache
    def of(budget):
        parts = lm.microbatches(ROWS, budget, 1)
        return optimisation.total(add, PARAMS, parts), len(parts)

    return of


@pytest.mark.parametrize("budget, count", [(32, 2), (16, 3)])
def test_microbatches_of_unequal_lengths_add_up_to_the_minibatch(gradients, budget, count):
    """The fewest tokens that hold all 44 are three rows of 16."""
    (one, alone), (many, parts) = gradients(48), gradients(budget)
    assert alone == 1 and parts == count
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, many)


def test_every_target_counts_alike(gradients):
    """The loss is the mean over all targets, not a mean of the rows' means; the gradient is that of this mean."""

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def mean(params):
        places = np.tile(np.arange(9), (8, 1))
        hidden, _ = transformer.apply(MODEL, params, ROWS["tokens"], places, ROWS["segments"])
        logp = jax.nn.log_softmax(transformer.logits(MODEL, params, hidden[:, :-1]))
        found = jnp.take_along_axis(logp, ROWS["tokens"][:, 1:, None], axis=-1)[..., 0]
        entropy = -(jnp.exp(logp) * logp).sum(-1)
        mask = ROWS["mask"][:, 1:] > 0
        return -found.mean(where=mask), (
            entropy.mean(where=mask),
            -found.mean(axis=1, where=mask).mean(),
        )

    (loss, (entropy, mean_of_means)), grads = jax.device_get(mean(PARAMS))
    assert ROWS["mask"].sum() == 36
    for budget in (48, 16):
        (found, metrics), _ = gradients(budget)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["entropy"] == pytest.approx(entropy, rel=1e-5)
        assert abs(metrics["loss"] - mean_of_means) > 1e-2
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, grads
        )


def line(params, batch):
    """A loss whose gradient is plain to see."""
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
    """Microbatches of any shapes: 3/2 + 4/4 + 8/4 = 4.5 and the weights' sum; losses 2 x + 1, by weight."""
    grads, metrics = optimisation.total(
        optimisation.adder(line), jax.tree.map(jnp.float32, LINE), PARTS
    )
    assert grads == {"kernel": 4.5, "bias": 1.0} and metrics == {"loss": 2 * 4.5 + 1, "seen": 8}
    assert optimisation.total(None, None, []) is None


def test_a_compiled_step_is_one_optimiser_step_whose_state_is_used_up():
    """Adam's first step is the learning rate, whatever the gradient; its norm is that before the clip."""
    optimiser = optimisation.make_optimiser(Optimiser(learning_rate=0.1, clip_norm=1.0), 10)
    step = optimisation.compiled(line, optimiser)
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
    """Gradients come whole on every device; the state that goes in, and comes out, has its rows and columns cut."""
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = sharding.make_mesh(Mesh(2, 2, 2))
    optimiser = optimisation.make_optimiser(Optimiser(learning_rate=0.1), 10)
    init = functools.partial(optimisation.init_state, optimiser=optimiser)
    params = {"head": {"kernel": np.ones((4, 6), np.float32)}}
    shapes = sharding.abstract(jax.eval_shape(init, params), mesh)
    with jax.set_mesh(mesh):
        state = optimisation.placed(
            init, jax.device_put(params, sharding.param_shardings(params, mesh)), shapes
        )
        step = optimisation.stepper(functools.partial(optimisation.finish, optimiser), shapes)
        for _ in range(2):
            grads = jax.device_put(params, sharding.replicated(mesh))
            state, _ = step(state, (grads, {}))
            kernel = state.params["head"]["kernel"]
            assert kernel.sharding.spec == P("fsdp", "tensor") and kernel.addressable_shards[
                0
            ].data.shape == (2, 3)
            assert all(
                jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s.sharding, state, shapes))
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
    rate = optimisation.learning_rate(Optimiser(learning_rate=2.0, **settings), 10)
    for at, wanted in rates.items():
        assert float(rate(at)) == pytest.approx(wanted, abs=1e-6)


def test_items_are_the_state_taken_apart():
    optimiser = optimisation.make_optimiser(Optimiser(), 10)
    state = {
        "policy": optimisation.init_state({"kernel": jnp.ones(2)}, optimiser),
        "stats": (jnp.ones(()),),
    }
    items = optimisation.to_items(state)
    assert (
        set(items) == {"policy", "policy_optimiser", "stats"}
        and items["policy"] is state["policy"].params
    )
    again = optimisation.from_items(items)
    assert jax.tree.structure(again) == jax.tree.structure(state) and set(again) == set(state)
