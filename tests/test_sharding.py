"""Any mesh gives a single device's result for every stage; one table shards every parameter."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_models import tiny
from test_ppo import make

from alignjax import config as configs
from alignjax.algorithms import dpo_programs, lm, optimisation, ranking
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.ppo import PPO
from alignjax.config import UserError
from alignjax.machine import sharding

STEPS = 3
# Steps of PPO's randomness in which a response ends early, and whose microbatches have the same two
# shapes: each shape is compiled for the policy, the value and the scorer.
SAMPLING_STEPS = (10, 76, 96)
RATE = configs.Optimiser(learning_rate=1e-3, eps=1e-6)
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def mesh_of(*sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def place(params, mesh):
    """Return a copy of parameters laid out on a mesh by the table."""
    layout = sharding.param_shardings(params, mesh)
    return jax.tree.map(lambda x, s: jax.device_put(x.copy(), s), params, layout)


def place_state(params, optimiser, mesh):
    """Return the initial state of a role, laid out on a mesh by the table."""
    init = functools.partial(optimisation.init_state, optimiser=optimiser)
    abstract = sharding.abstract(jax.eval_shape(init, params), mesh)
    return optimisation.place_state(place(params, mesh), optimiser, abstract)


def model_and(head):
    return tiny(head=head, vocab_size=96, remat="everything")


def lm_batch(step):
    rng = np.random.default_rng(step)
    return {
        "tokens": rng.integers(1, 96, (8, 9)).astype(np.int32),
        "mask": (rng.random((8, 9)) < 0.6).astype(np.int32),
        "segments": (np.arange(9) < np.arange(2, 10)[:, None]).astype(np.int32),
    }


def comparison_batch(step):
    rng = np.random.default_rng(step)
    # The same in every step, so that few shapes of microbatches are compiled.
    lengths = np.random.default_rng(0).integers(2, 10, (2, 8)).astype(np.int32)
    return {
        "chosen": rng.integers(1, 96, (8, 9)).astype(np.int32),
        "rejected": rng.integers(1, 96, (8, 9)).astype(np.int32),
        "chosen_length": lengths[0],
        "rejected_length": lengths[1],
        "margin": np.zeros(8, np.float32),
        "prompt_length": np.ones(8, np.int32),
    }


def run_supervised(module, loss_fn, head, batch_of, mesh):
    """Return (parameters, losses) after some steps of a stage with one loss."""
    model, params = model_and(head)
    optimiser = optimisation.make_optimiser(RATE, STEPS)
    update = optimisation.MinibatchUpdate(functools.partial(loss_fn, model), optimiser)
    with jax.set_mesh(mesh):
        state = place_state(params, optimiser, mesh)
        losses = []
        for step in range(STEPS):
            parts = module.pack_minibatch(batch_of(step), 64, sharding.row_shards(mesh))
            parts = [sharding.shard_batch(part, mesh) for part in parts]
            state, metrics = update(state, parts)
            losses.append(float(metrics["loss"]))
        return jax.tree.map(np.asarray, state.params), losses


def ppo_stage(mesh):
    """Return a stage of PPO over a mesh, with roles of random parameters and its text."""
    config = make(budget=64, epochs=1, pretrain_coef=0.5, pretrain_ratio=1.0)
    config.model = model_and("lm")[0]
    config.optimiser = RATE
    config.value_optimiser = RATE
    stage = PPO(config, mesh, end_tokens=(3,))

    def text(update):
        parts = lm.pack_minibatch(lm_batch(update), 64, sharding.row_shards(mesh))
        return [sharding.shard_batch(part, mesh) for part in parts]

    stage.text = SimpleNamespace(microbatches=text)
    stage.frozen = {
        role: place(model_and(head)[1], mesh)
        for role, head in (("reference", "lm"), ("reward", "scalar"))
    }
    return stage


def run_ppo(mesh):
    """Return (parameters and statistics, figures of each step) after some steps of PPO."""
    lengths = np.array([5, 2, 3, 5, 4, 1, 5, 3], np.int32)
    batch = {
        "prompts": np.where(np.arange(5) >= 5 - lengths[:, None], 7, 0).astype(np.int32),
        "lengths": lengths,
        "index": np.arange(8, dtype=np.int32),
    }
    with jax.set_mesh(mesh):
        stage = ppo_stage(mesh)
        trained = stage.trained
        state = {
            "policy": place_state(model_and("lm")[1], trained.policy_optimiser, mesh),
            "value": place_state(model_and("scalar")[1], trained.value_optimiser, mesh),
            "stats": RunningStats.zero(),
        }
        figures = []
        for step in range(STEPS):
            params = stage.role_params(state)
            rollout = stage.compiled.responder.respond(
                params["policy"], batch, SAMPLING_STEPS[step]
            )
            minibatches = stage.pack(batch, rollout)
            scored = stage.score(params, state, rollout, minibatches)
            if step == 0:
                stage.check(params, scored, minibatches)
            state = {**state, "stats": scored.stats}
            state, metrics = stage.learn(state, scored.experience, minibatches, step)
            metrics = scored.metrics | metrics
            names = ("objective/scores", "loss/policy_avg", "loss/value_avg")
            figures.append([float(metrics[name]) for name in names])
        results = (state["policy"].params, state["value"].params, state["stats"])
        return jax.tree.map(np.asarray, results), figures


def ranking_loss(model, params, microbatch):
    return ranking.loss_fn(model, configs.Ranking(), params, microbatch)


def dpo_loss(model, params, microbatch):
    reference = jnp.linspace(-30, -10, 16).reshape(8, 2)
    return dpo_programs.loss_fn(model, configs.DPO(), params, (reference, microbatch))


RUNS = {
    "lm": functools.partial(run_supervised, lm, lm.loss_fn, "lm", lm_batch),
    "ranking": functools.partial(run_supervised, ranking, ranking_loss, "scalar", comparison_batch),
    "dpo": functools.partial(run_supervised, dpo_programs, dpo_loss, "lm", comparison_batch),
    "ppo": run_ppo,
}


@functools.cache
def run_on_one_device(stage):
    return RUNS[stage](mesh_of(1, 1, 1))


@pytest.mark.parametrize(
    "stage, sizes",
    [
        ("lm", (8, 1, 1)),
        ("lm", (1, 4, 2)),
        ("ranking", (2, 2, 2)),
        ("dpo", (2, 2, 2)),
        ("ppo", (2, 2, 2)),
    ],
)
def test_a_mesh_gives_the_single_devices_result(stage, sizes):
    params, figures = RUNS[stage](mesh_of(*sizes))
    expected_params, expected_figures = run_on_one_device(stage)
    np.testing.assert_allclose(figures, expected_figures, atol=1e-5, rtol=1e-5)
    leaves = jax.tree.leaves(params)
    expected_leaves = jax.tree.leaves(expected_params)
    for leaf, expected in zip(leaves, expected_leaves, strict=True):
        np.testing.assert_allclose(leaf, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_lies_over_data_and_fsdp_and_each_device_has_its_own_rows():
    """A host array is whole in every process; rows that the devices don't divide are on all."""
    mesh = mesh_of(2, 2, 2)
    assert sharding.row_shards(mesh) == 4
    host = {
        "rows": np.arange(24, dtype=np.int32).reshape(8, 3),
        "odd": np.arange(6),
        "one": np.float32(7),
    }
    batch = sharding.shard_batch(host, mesh)
    for name in host:
        assert np.array_equal(batch[name], host[name]) and batch[name].is_fully_addressable
    assert batch["rows"].sharding.spec == P(("data", "fsdp"))
    rows_of_device = {
        shard.device.id: np.asarray(shard.data).tolist()
        for shard in batch["rows"].addressable_shards
    }
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        first = 2 * (2 * data + fsdp)
        assert rows_of_device[device.id] == host["rows"][first : first + 2].tolist()
    assert batch["odd"].sharding.is_fully_replicated and batch["one"].sharding.is_fully_replicated
    assert all(shard.data.shape == (6,) for shard in batch["odd"].addressable_shards)


def test_parameters_and_optimiser_state_are_cut_by_one_table():
    mesh = mesh_of(2, 2, 2)
    model, params = model_and("lm")
    optimiser = optimisation.make_optimiser(RATE, STEPS)
    init = functools.partial(optimisation.init_state, optimiser=optimiser)
    shapes = sharding.abstract(jax.eval_shape(init, params), mesh)
    specs = {
        sharding.path_name(path): x.sharding.spec
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    }
    for name, spec in specs.items():
        if name.startswith("params/"):
            # Adam's mu and nu
            moment = f"u/{name.removeprefix('params/')}"
            moment_specs = [specs[other] for other in specs if other.endswith(moment)]
            assert moment_specs == [spec, spec]
    assert specs["params/layers/mlp/gate/kernel"] == P(None, "fsdp", "tensor")
    assert model.kv_heads % 2 == 0 and specs["params/layers/attention/k/kernel"][2] == "tensor"


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="no row of .* matches parameter adapter/kernel"):
        sharding.param_shardings({"adapter": {"kernel": jnp.zeros((2, 2))}}, mesh_of(1, 1, 1))


def test_an_axis_that_does_not_divide_is_dropped_for_that_array():
    _, params = tiny(heads=3, kv_heads=3)
    specs = sharding.param_shardings(params, mesh_of(1, 1, 8))
    assert specs["layers"]["attention"]["k"]["kernel"].spec == P(None, "fsdp", None, None)
    assert specs["layers"]["mlp"]["up"]["kernel"].spec == P(None, "fsdp", "tensor")


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 1, 8), (2, 2, 4), (-2, 1, 1)])
def test_a_mesh_that_does_not_make_the_devices_is_refused(sizes):
    with pytest.raises(
        UserError, match=rf"mesh.data={sizes[0]} x mesh.fsdp={sizes[1]} .* must make 8 devices"
    ):
        sharding.make_mesh(configs.Mesh(*sizes))


def test_minus_1_takes_the_devices_that_are_left():
    shape = dict(sharding.make_mesh(dataclasses.replace(configs.Mesh(), tensor=2)).shape)
    assert shape == {"data": 1, "fsdp": 4, "tensor": 2}
