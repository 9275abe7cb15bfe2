"""Any mesh gives the single device's result over several steps of every stage; the table covers every parameter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_models import tiny
from test_ppo import make

from alignjax import config as configs
from alignjax.algorithms import lm, optimisation, ppo, ranking
from alignjax.algorithms.advantages import RunningStats
from alignjax.config import UserError
from alignjax.machine import sharding

STEPS = 3
RATE = configs.Optimiser(learning_rate=1e-3, eps=1e-6)
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def mesh_of(*sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def place(init, params, mesh):
    shapes = sharding.abstract(jax.eval_shape(init, params), mesh)
    params = jax.tree.map(
        lambda x, s: jax.device_put(x.copy(), s), params, sharding.param_shardings(params, mesh)
    )
    return optimisation.placed(init, params, shapes)


def model_and(head):
    return tiny(head=head, vocab_size=96, remat="everything")


def rows(step, **arrays):
    rng = np.random.default_rng(step)
    return {name: make(rng).astype(np.int32) for name, make in arrays.items()}


def lm_batch(step):
    batch = rows(
        step, tokens=lambda r: r.integers(1, 96, (8, 9)), mask=lambda r: r.random((8, 9)) < 0.6
    )
    return batch | {"segments": (np.arange(9) < np.arange(2, 10)[:, None]).astype(np.int32)}


def comparison_batch(step):
    sides = rows(
        step,
        chosen=lambda r: r.integers(1, 96, (8, 9)),
        rejected=lambda r: r.integers(1, 96, (8, 9)),
        chosen_length=lambda r: r.integers(2, 10, 8),
        rejected_length=lambda r: r.integers(2, 10, 8),
    )
    return sides | {"margin": np.zeros(8, np.float32)}


def run_supervised(module, loss_fn, head, batch_of, mesh):
    model, params = model_and(head)
    optimiser = optimisation.make_optimiser(RATE, STEPS)
    step = optimisation.compiled(functools.partial(loss_fn, model), optimiser)
    with jax.set_mesh(mesh):
        state = place(functools.partial(optimisation.init_state, optimiser=optimiser), params, mesh)
        losses = []
        for i in range(STEPS):
            parts = module.microbatches(batch_of(i), 64, sharding.row_shards(mesh))
            state, metrics = step(state, [sharding.shard_batch(part, mesh) for part in parts])
            losses.append(float(metrics["loss"]))
        return jax.tree.map(np.asarray, state.params), losses


def run_ppo(mesh):
    config = make(budget=64, epochs=1, pretrain_coef=0.5, pretrain_ratio=1.0)
    config.model, config.optimiser, config.value_optimiser = model_and("lm")[0], RATE, RATE
    optimisers = {role: optimisation.make_optimiser(RATE, STEPS) for role in ("policy", "value")}
    programs = ppo.compiled(config, optimisers, 3)
    with jax.set_mesh(mesh):
        inits = {
            role: functools.partial(optimisation.init_state, optimiser=o)
            for role, o in optimisers.items()
        }
        state = {
            "policy": place(inits["policy"], model_and("lm")[1], mesh),
            "value": place(inits["value"], model_and("scalar")[1], mesh),
            "stats": RunningStats.zero(),
        }
        frozen = {
            role: place(lambda x: x, model_and(head)[1], mesh)
            for role, head in (("reference", "lm"), ("reward", "scalar"))
        }
        lengths = np.array([5, 2, 3, 5, 4, 1, 5, 3], np.int32)
        prompts = {
            "prompts": np.where(np.arange(5) >= 5 - lengths[:, None], 7, 0).astype(np.int32),
            "lengths": lengths,
            "index": np.arange(8, dtype=np.int32),
        }
        put = lambda parts: [sharding.shard_batch(part, mesh) for part in parts]
        text = lambda number: put(lm.microbatches(lm_batch(number), 64, sharding.row_shards(mesh)))
        found = []
        for i in range(STEPS):
            params = {role: state[role].params for role in optimisers} | frozen
            sampled = programs.sample(
                params["policy"], sharding.shard_batch(prompts, mesh), jax.random.key(i)
            )
            experience, stats, metrics, said, first, cut = ppo.score(
                config, programs, params, state["stats"], sampled, np.repeat(lengths, 2), mesh
            )
            if i == 0:
                ppo.self_check(config, programs, config.model, params, experience, said, first[0])
            state = {**state, "stats": stats}
            state, more = ppo.learn(
                config, programs, lambda n: 0.0, state, experience, i, first, cut, text
            )
            found.append(
                [
                    float(metrics["objective/scores"]),
                    float(more["loss/policy_avg"]),
                    float(more["loss/value_avg"]),
                ]
            )
        return jax.tree.map(
            np.asarray, (state["policy"].params, state["value"].params, state["stats"])
        ), found


def ranking_loss(model, params, batch):
    return ranking.loss_fn(model, configs.Ranking(), params, batch)


RUNS = {
    "lm": functools.partial(run_supervised, lm, lm.loss_fn, "lm", lm_batch),
    "ranking": functools.partial(run_supervised, ranking, ranking_loss, "scalar", comparison_batch),
    "ppo": run_ppo,
}


@functools.cache
def alone(stage):
    return RUNS[stage](mesh_of(1, 1, 1))


@pytest.mark.parametrize(
    "stage, sizes",
    [("lm", (8, 1, 1)), ("lm", (1, 4, 2)), ("ranking", (2, 2, 2)), ("ppo", (2, 2, 2))],
)
def test_a_mesh_gives_the_single_devices_result(stage, sizes):
    params, figures = RUNS[stage](mesh_of(*sizes))
    np.testing.assert_allclose(figures, alone(stage)[1], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(alone(stage)[0]), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_batch_lies_over_data_and_fsdp_and_each_device_has_its_own_rows():
    """A host array, whole in every process; what the devices' rows don't divide lies on each of them."""
    mesh = mesh_of(2, 2, 2)
    assert sharding.row_shards(mesh) == 4
    host = {
        "rows": np.arange(24, dtype=np.int32).reshape(8, 3),
        "odd": np.arange(6),
        "one": np.float32(7),
    }
    batch = sharding.shard_batch(host, mesh)
    assert all(
        np.array_equal(batch[name], host[name]) and batch[name].is_fully_addressable
        for name in host
    )
    assert batch["rows"].sharding.spec == P(("data", "fsdp"))
    placed = {
        shard.device.id: np.asarray(shard.data).tolist()
        for shard in batch["rows"].addressable_shards
    }
    for at, device in np.ndenumerate(mesh.devices):
        part = 2 * at[0] + at[1]
        assert placed[device.id] == host["rows"][2 * part : 2 * part + 2].tolist()
    assert batch["odd"].sharding.is_fully_replicated and batch["one"].sharding.is_fully_replicated
    assert all(shard.data.shape == (6,) for shard in batch["odd"].addressable_shards)


def test_parameters_and_optimiser_state_are_cut_by_one_table():
    mesh = mesh_of(2, 2, 2)
    model, params = model_and("lm")
    optimiser = optimisation.make_optimiser(RATE, STEPS)
    shapes = sharding.abstract(
        jax.eval_shape(functools.partial(optimisation.init_state, optimiser=optimiser), params),
        mesh,
    )
    specs = {
        sharding.path_name(path): x.sharding.spec
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    }
    for name, spec in specs.items():
        if name.startswith("params/"):
            twins = [
                other for other in specs if other.endswith(f"u/{name.removeprefix('params/')}")
            ]  # mu and nu
            assert len(twins) == 2 and all(specs[twin] == spec for twin in twins)
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
