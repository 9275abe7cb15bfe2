"""Adapters: their mathematics, the bases that roles share, and runs that train adapters alone."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from runs import checkpoint_bytes, command, cut, fails, files_of, rows
from test_models import tiny
from test_sharding import lm_batch, mesh_of

from alignjax import config as configs
from alignjax import train
from alignjax.algorithms import lm, optimisation
from alignjax.algorithms.ppo import PPO
from alignjax.algorithms.responding import params_placement
from alignjax.config import Config, Lora, UserError
from alignjax.machine import sharding
from alignjax.models import lora, transformer
from alignjax.sampling import cache, rollout
from alignjax.sampling.types import Prompts, SamplingSettings
from alignjax.weights import bases, roles
from alignjax.weights.role_reader import RoleReader

MESH = jax.make_mesh(
    (1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
)
SETTINGS = Lora(rank=3, alpha=6.0)
RANK = "--config.lora.rank=3"


def model_and(head="lm"):
    return tiny(head=head, vocab_size=96)


def adapters_of(params, settings=SETTINGS, seed=0):
    """Return adapters whose two factors are both random."""
    key = jax.random.key(seed)
    adapters = lora.init(settings, params["layers"], key)
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(key, x.shape), adapters)


def in_base(params, settings=SETTINGS):
    """Return the parameters as a base: with the scales of adapters."""
    return lora.combine(params, lora.scales(settings, len(params["layers"]["norm1"]["scale"])))


def text_loss(model, params):
    """Return the loss of a batch of text and its gradient by all parameters."""
    (part,) = lm.pack_minibatch(lm_batch(0), 4096, 1)
    loss = jax.jit(jax.value_and_grad(lambda params: lm.loss_fn(model, params, part)[0]))
    value, gradient = loss(params)
    return float(value), gradient


def close(one, other, tolerance=1e-5):
    """Check that two trees of arrays agree, relative to the largest number of each array."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


# --------------------------------------------------------------------------------- mathematics


def test_the_gradient_is_that_of_a_full_rank_twin_by_the_chain_rule():
    """With G the gradient by W + s A B: that by A is s G B', and that by B is s A' G."""
    model, params = model_and()
    adapters = adapters_of(params)
    combined = lora.combine(in_base(params), adapters)
    loss, gradient = text_loss(model, combined)
    twin_loss, twin = text_loss(model, lora.merge(combined))
    assert loss == pytest.approx(twin_loss, rel=1e-6)
    scale = SETTINGS.alpha / SETTINGS.rank
    for part, name in lora.adapted_products(params["layers"] | adapters["layers"]):
        product = adapters["layers"][part][name]
        layers, rank = product["lora_b"].shape[:2]
        a = product["lora_a"].reshape(layers, -1, rank)
        b = product["lora_b"].reshape(layers, rank, -1)
        g = twin["layers"][part][name]["kernel"].reshape(layers, a.shape[1], b.shape[2])
        expected = {
            "lora_a": scale * jnp.einsum("lio,lro->lir", g, b).reshape(product["lora_a"].shape),
            "lora_b": scale * jnp.einsum("lir,lio->lro", a, g).reshape(product["lora_b"].shape),
        }
        own = gradient["layers"][part][name]
        close({key: own[key] for key in expected}, expected)


def test_adapters_of_full_rank_make_any_kernel():
    model, params = model_and()
    other = tiny(1, vocab_size=96)[1]
    settings = Lora(rank=model.d_model, alpha=model.d_model, targets="gate")
    kernel = params["layers"]["mlp"]["gate"]["kernel"]
    change = other["layers"]["mlp"]["gate"]["kernel"] - kernel
    identity = jnp.broadcast_to(jnp.eye(model.d_model), (model.layers, *2 * (model.d_model,)))
    adapters = {"layers": {"mlp": {"gate": {"lora_a": identity, "lora_b": change}}}}
    combined = lora.combine(in_base(params, settings), adapters)
    swapped = jax.tree.map(jnp.asarray, params)
    swapped["layers"]["mlp"]["gate"]["kernel"] = kernel + change
    assert text_loss(model, combined)[0] == pytest.approx(text_loss(model, swapped)[0], rel=1e-5)
    close(lora.merge(combined), swapped)


def test_new_adapters_change_nothing_and_do_not_depend_on_the_other_targets():
    model, params = model_and()
    key = jax.random.key(5)
    new = lora.init(SETTINGS, params["layers"], key)
    combined = lora.combine(in_base(params), new)
    assert text_loss(model, combined)[0] == text_loss(model, params)[0]
    few = lora.init(Lora(rank=3, targets="down, q"), params["layers"], key)
    assert {part: list(products) for part, products in few["layers"].items()} == {
        "attention": ["q"],
        "mlp": ["down"],
    }
    same = lora.select(new, few)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, same, few))
    bound = model.d_ff**-0.5
    down = np.asarray(new["layers"]["mlp"]["down"]["lora_a"])
    assert 0.8 * bound < np.abs(down).max() <= bound


@pytest.mark.parametrize("joins", [False, True], ids=["stacked", "joined"])
def test_a_rollout_by_merged_adapters_is_that_by_adapters_as_they_are(joins, monkeypatch):
    """To rounding, and so are the log-probabilities; both on CPUs and as GPUs decode.

    A GPU joins the products of merged layers, and scans layers with adapters.
    """
    model, params = model_and()
    combined = lora.combine(in_base(params), adapters_of(params))
    monkeypatch.setattr(transformer, "joins_products", lambda: joins)
    if joins:
        monkeypatch.setattr(transformer, "UNROLLED", 0)
        monkeypatch.setattr(cache, "platform", lambda: "gpu")
    config = Config(stage="ppo", model=model, lora=SETTINGS)
    merged = params_placement(config, MESH, combined)(combined)
    assert isinstance(merged["layers"], list) == joins
    config.lora = Lora(rank=3, alpha=6.0, merge_for_rollout=False)
    placed = params_placement(config, MESH, combined)(combined)
    assert placed is combined
    settings = SamplingSettings(
        model=model,
        samples_per_prompt=2,
        response_length=4,
        temperature=1.0,
        top_p=0.9,
        end_tokens=(3,),
        slots=0,
        cache_dtype="",
    )
    prompts = Prompts(
        tokens=np.full((2, 3), 7, np.int32),
        lengths=np.full(2, 3, np.int32),
        index=np.arange(2, dtype=np.int32),
    )
    generate = jax.jit(functools.partial(rollout.generate, settings=settings))
    results = [generate(tree, prompts, jax.random.key(0)) for tree in (merged, placed)]
    np.testing.assert_array_equal(results[0].tokens, results[1].tokens)
    np.testing.assert_allclose(results[0].logprobs, results[1].logprobs, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_an_update_on_eight_devices_is_that_on_one():
    model, params = model_and()
    adapters = adapters_of(params)
    optimiser = optimisation.make_optimiser(configs.Optimiser(eps=1e-3), 1)
    losses = []
    results = []
    for mesh in (MESH, mesh_of(2, 2, 2)):
        with jax.set_mesh(mesh):
            base = place(in_base(params), mesh)
            state = optimisation.init_state(place(adapters, mesh), optimiser)
            update = optimisation.MinibatchUpdate(functools.partial(lm.loss_fn, model), optimiser)
            parts = lm.pack_minibatch(lm_batch(0), 4096, sharding.row_shards(mesh))
            state, metrics = update(state, sharding.shard_batch(parts, mesh), base)
            losses.append(float(metrics["loss"]))
            results.append(jax.tree.map(np.asarray, state.params))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    close(results[1], results[0], 1e-4)


def place(params, mesh):
    layout = sharding.param_shardings(params, mesh)
    return jax.tree.map(lambda x, s: jax.device_put(jnp.copy(x), s), params, layout)


def test_a_gradient_by_adapters_makes_no_gradient_of_the_base():
    """The compiled program has no array of a matrix's shape but the matrix itself."""
    model, params = model_and()
    (part,) = lm.pack_minibatch(lm_batch(0), 4096, 1)
    accumulate = optimisation.Accumulate(functools.partial(lm.loss_fn, model))
    arguments = (adapters_of(params), part, in_base(params))
    total = accumulate.empty(*arguments)
    text = accumulate.add.lower(total, *arguments).compile().as_text()
    made = {"output kernel": (model.d_model, 96), "gate": (model.layers, model.d_model, model.d_ff)}
    for name, shape in made.items():
        sizes = ",".join(map(str, shape))
        operations = set(re.findall(rf"= f32\[{sizes}\]\S* ([\w-]+)\(", text))
        assert operations <= {"parameter", "get-tuple-element", "bitcast"}, (name, operations)


# ---------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def adapted(chain, tmp_path_factory):
    """Return a directory of runs with adapters upon lm-tiny: sft, rm, and ppo from both."""
    runs = tmp_path_factory.mktemp("adapted")
    shutil.copytree(chain.runs / "lm-tiny", runs / "lm-tiny")
    for name in ("sft-tiny", "rm-tiny"):
        parent = f"--config.parents.model={runs / 'lm-tiny'}"
        assert train.main(command(name, runs, RANK, parent)) == 0
    assert train.main(command("ppo-tiny", runs, *ppo_arguments(runs))) == 0
    return runs


def ppo_arguments(runs):
    parents = {"policy": "sft", "reference": "sft", "value": "rm", "reward": "rm"}
    return [
        RANK,
        *(f"--config.parents.{role}={runs / name}-tiny" for role, name in parents.items()),
    ]


def paths(tree):
    return {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_a_run_keeps_adapters_alone_and_starts_where_its_reference_is(adapted):
    """The KL of the first step is 0, exactly, and checkpoints have no array of the base."""
    first = rows(adapted / "ppo-tiny" / "metrics.jsonl")[0]
    assert first["objective/kl"] == 0.0
    assert first["objective/kl_per_token"] == 0.0
    arrays = checkpoint_bytes(adapted / "ppo-tiny", 4)
    names = {
        item: {
            "/".join(re.findall(r"\['(\w+)'\]", array)[-2:])
            for array in arrays
            if array.startswith(f"{item}[")
        }
        for item in ("policy", "value")
    }
    products = {"q", "k", "v", "out", "gate", "up", "down"}
    adapters = {f"{product}/{factor}" for product in products for factor in ("lora_a", "lora_b")}
    assert names["policy"] == adapters
    assert names["value"] == adapters | {"head/kernel", "head/bias"}
    summary = json.loads((adapted / "sft-tiny" / "summary.json").read_text())
    assert 0 < summary["trained_parameters"] < 0.2 * summary["parameters"]


def test_a_run_goes_on_with_its_parents_adapters_in_its_parents_base(adapted):
    """A resume after a kill gives the same files, to the bit."""
    run = adapted / "ppo-tiny"
    marker = json.loads((run / "alignjax.json").read_text())
    assert {base["place"] for base in marker["bases"].values()} == {"../lm-tiny"}
    whole = files_of(run)
    aside = run.with_name("whole")
    run.rename(aside)
    try:
        cut(aside, run)
        assert train.main(command("ppo-tiny", adapted, *ppo_arguments(adapted))) == 0
        resumed = files_of(run)
    finally:
        shutil.rmtree(run)
        aside.rename(run)
    assert resumed == whole


def test_all_four_roles_share_one_base_that_training_leaves_as_it_is(adapted):
    config = configs.load("ppo.py:tiny")
    config.model = configs.model_from_json(
        json.loads((adapted / "sft-tiny/config.json").read_text())
    )
    config.lora = Lora(rank=3)
    names = {"policy": "sft", "reference": "sft", "value": "rm", "reward": "rm"}
    parents = {role: adapted / f"{name}-tiny" for role, name in names.items()}
    with jax.set_mesh(MESH):
        reader = RoleReader(config, MESH, parents)
        reward = reader.frozen("reward", config.model)
        reference = reader.frozen("reference", config.model)
        policy = reader.base("policy")
        value = reader.base("value")
        base = roles.read(config.model, "lm", MESH, adapted / "lm-tiny")
    for path in ("layers/mlp/up/kernel", "embed/embedding", "layers/norm1/scale", "norm/scale"):
        arrays = [at(tree, path) for tree in (policy, value, reference, reward)]
        assert all(array is arrays[0] for array in arrays)
        np.testing.assert_array_equal(arrays[0], at(base, path))
    assert "head" not in value and paths(reward["head"]) == {"kernel", "bias"}
    with jax.set_mesh(MESH):
        policy_adapters = reader.initial("policy")
    own = policy_adapters["layers"]["attention"]["q"]["lora_b"]
    np.testing.assert_array_equal(own, reference["layers"]["attention"]["q"]["lora_b"])
    assert own is not reference["layers"]["attention"]["q"]["lora_b"]
    assert np.any(own)


def at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def test_a_plan_knows_that_roles_share_a_base():
    """The state of a planned run and of a loaded one have the same shapes."""
    config = configs.load("ppo.py:tiny")
    config.model = model_and()[0]
    config.lora = Lora(rank=3)
    with jax.set_mesh(MESH):
        stage = PPO.plan(config, MESH)
        resident = stage.resident()
        programs = {program.name: program for program in stage.programs()}
    whole = [x.size for x in jax.tree.leaves(roles.abstract_params(config.model, "lm", MESH))]
    # The policy and the reference begin from sft.py, value and reward from rm.py: two bases.
    head = config.model.d_model * config.model.vocab_size
    scales = 2 * 7 * config.model.layers
    assert sum(x.size for x in resident["base"]) == 2 * sum(whole) - head + scales
    gradient = programs["policy gradient"].arguments[0].gradient
    assert jax.tree.leaves(gradient) == jax.tree.leaves(stage.abstract_state["policy"].params)


def test_a_loaded_run_is_its_base_with_the_adapters_added(adapted, tmp_path):
    """Also where it has been moved together with its base; and a child may train it in full."""
    for name in ("lm-tiny", "sft-tiny"):
        shutil.copytree(adapted / name, tmp_path / name)
    run = tmp_path / "sft-tiny"
    model = configs.model_from_json(json.loads((run / "config.json").read_text()))
    settings = bases.adapters_of(run)
    with jax.set_mesh(MESH):
        params = roles.load(model, "lm", MESH, jax.random.key(0), run)
        base = roles.read(model, "lm", MESH, tmp_path / "lm-tiny")
        adapters = roles.read_adapters(model, "lm", MESH, run, settings)
        scalar = roles.load(model, "scalar", MESH, jax.random.key(0), run)
    product = {**base["layers"]["mlp"]["up"], **adapters["layers"]["mlp"]["up"]}
    a, b = np.asarray(product["lora_a"]), np.asarray(product["lora_b"])
    expected = np.asarray(product["kernel"]) + settings.alpha / settings.rank * (a @ b)
    np.testing.assert_allclose(params["layers"]["mlp"]["up"]["kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(params["embed"]["embedding"], base["embed"]["embedding"])
    assert paths(params) == paths(base)
    assert paths(scalar["head"]) == {"kernel", "bias"}
    other = bases.origin_of(run, "lm", Lora(rank=2))
    assert other == bases.Origin(base=run, item="model", adapters=None)
    same = bases.origin_of(run, "lm", settings)
    assert same == bases.Origin(base=tmp_path / "lm-tiny", item="model", adapters=run)


def test_a_base_that_is_gone_or_has_changed_is_one_line(adapted, tmp_path, capsys):
    shutil.copytree(adapted / "sft-tiny", tmp_path / "sft-tiny")
    child = command("sft-tiny", tmp_path / "runs", f"--config.parents.model={tmp_path}/sft-tiny")
    line = fails(capsys, *child)
    assert f"sft-tiny: its base {tmp_path}/lm-tiny is not there" in line
    shutil.copytree(adapted / "rm-tiny", tmp_path / "lm-tiny")
    assert "has other parameters now" in fails(capsys, *child)


def test_adapters_of_a_language_model_are_no_reward_model(adapted):
    config = configs.load("ppo.py:tiny")
    config.model = configs.model_from_json(
        json.loads((adapted / "sft-tiny/config.json").read_text())
    )
    config.lora = Lora(rank=3)
    with jax.set_mesh(MESH):
        for name in ("sft-tiny", "lm-tiny"):
            reader = RoleReader(config, MESH, {"reward": adapted / name})
            with pytest.raises(UserError, match=f"{name}: a reward model is wanted"):
                reader.frozen("reward", config.model)


# --------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 8.0}, "lora.alpha=8.0 has a meaning only with lora.rank, which is 0"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha=0.0 must be above 0"),
        (
            {"rank": 2, "targets": "q,w"},
            "lora.targets='q,w' must be some of q,k,v,out,gate,up,down",
        ),
        ({"rank": 2, "targets": "q,q"}, "lora.targets='q,q' must be some of"),
        ({"rank": 2, "targets": ""}, "lora.targets='' must be some of"),
        ({"rank": 2, "merge_for_rollout": False}, "has a meaning for ppo only, not for lm"),
    ],
)
def test_a_wrong_field_is_one_line_with_its_value(fields, message):
    config = Config(parents={"model": "somewhere"}, lora=Lora(**fields))
    with pytest.raises(UserError) as raised:
        configs.check(config)
    assert message in str(raised.value)


def test_adapters_need_a_parent():
    with pytest.raises(UserError, match="lora.rank=2 needs a parent"):
        configs.check(Config(lora=Lora(rank=2)))
