"""Mixtures of experts: routing, grouped products, load balancing, meshes, refusals."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from runs import command, cut, files_of, rows
from test_families import draw
from test_gpu_plan import run_with_compiler
from test_hf_config import read, refusal
from test_models import GOLDEN, error, golden, largest_error, run, sum_of_sines, tiny, words
from test_sharding import lm_batch, mesh_of, place

from alignjax import config as configs
from alignjax import convert, train
from alignjax.algorithms import lm, losses, ranking
from alignjax.config import Config, Model, UserError
from alignjax.machine import sharding
from alignjax.models import experts, families, grouped, modules, scoring, transformer
from alignjax.models.experts import ExpertKernels, Routing
from alignjax.planning.operations import count_operations
from alignjax.weights import checkpoint, hf, hf_layout, peft_adapter, safetensors

SIZES = {"experts": 8, "experts_per_token": 2, "normalise_experts": True, "vocab_size": 96}
mixture = functools.partial(tiny, **SIZES)


def choices(seed, rows, chosen, count):
    """Return for each row some different numbers up to `count`, which stands for none."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(count + 1)[:chosen] for _ in range(rows)]).astype(np.int32)


@pytest.mark.parametrize("kind", ["blocks", "tpu", "triton"])
@pytest.mark.parametrize(
    ("rows", "chosen", "count", "inputs", "outputs"),
    [(40, 2, 4, 32, 24), (300, 3, 5, 40, 160), (7, 2, 8, 16, 16)],
)
def test_grouped_products_are_those_of_each_rows_kernels(
    kind, rows, chosen, count, inputs, outputs, monkeypatch
):
    """All ways agree, with gradients; kernels that are made for TPUs and GPUs are interpreted."""
    if kind == "triton":
        monkeypatch.setattr(grouped, "platform", lambda: "gpu")
    product = grouped.tpu_product if kind == "tpu" else grouped.block_product
    x = draw(0, rows, inputs)
    kernels = draw(1, count, inputs, outputs)
    weights = draw(2, rows, chosen)
    mixed = draw(4, rows, outputs)
    chosen_kernels = choices(3, rows, chosen, count)
    groups = grouped.group(jnp.asarray(chosen_kernels), count, count)
    assert groups.sizes.sum() % groups.block == 0

    def ours(x, kernels, weights):
        results = product(grouped.Factors(grouped.to_slots(x, groups), kernels), groups)
        return jnp.sum(grouped.weighted_sum(grouped.Weighted(results, weights), groups) * mixed)

    def expected(x, kernels, weights):
        none = jnp.zeros((1, inputs, outputs))
        of_choice = jnp.concatenate([kernels, none])[chosen_kernels]
        return jnp.einsum("ri,rcio,rc,ro->", x, of_choice, weights, mixed)

    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    value, gradients = gradient(ours)(x, kernels, weights)
    expected_value, expected_gradients = gradient(expected)(x, kernels, weights)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-4)
    assert largest_error(gradients, expected_gradients) < 2e-6


@pytest.mark.parametrize("rows", [1, 16, 500])
def test_no_choice_is_dropped_though_all_are_the_same(rows):
    same = jnp.tile(jnp.asarray([[3, 0]], jnp.int32), (rows, 1))
    groups = grouped.group(same, 4, 4)
    x = jnp.arange(1.0, rows + 1)[:, None]
    slots = grouped.to_slots(x, groups)
    assert np.array_equal(slots[groups.slot.reshape(-1)], np.repeat(x, 2, axis=0))
    assert np.array_equal(groups.sizes > 0, [True, False, False, True])
    assert len(np.unique(groups.slot)) == 2 * rows


def kernels_of(layer):
    return ExpertKernels(*(layer[name]["kernel"] for name in ExpertKernels._fields))


@pytest.mark.parametrize("normalise", [False, True])
def test_a_layer_of_experts_is_that_of_its_definition(normalise):
    """For each token, the networks of the most probable experts, one by one; none for a pad."""
    model, params = mixture(layers=1, normalise_experts=normalise, experts_per_token=3)
    layer = jax.tree.map(lambda x: x[0], params["layers"]["experts"])
    x = draw(0, 2, 7, model.d_model)
    module = nnx_experts(model, layer)
    real = np.arange(7) < 6
    y, routing = jax.jit(module)(x, jnp.tile(real, (2, 1)))
    assert not y[:, ~real].any()
    for token in np.ndindex(2, 6):
        logits = np.asarray(x[token] @ layer["router"]["kernel"])
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = np.argsort(-probabilities)[:3]
        assert np.array_equal(routing.chosen[token], chosen)
        weights = probabilities[chosen]
        weights = weights / weights.sum() if normalise else weights
        expected = 0
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up, down = (np.asarray(kernel[expert]) for kernel in kernels_of(layer))
            hidden = np.asarray(jax.nn.silu(x[token] @ gate)) * np.asarray(x[token] @ up)
            expected = expected + weight * (hidden @ down)
        assert error(np.asarray(y[token]), expected) < 2e-6


def nnx_experts(model, layer):
    """Return the experts of a layer as a module with these parameters."""
    module = experts.Experts(model, modules.ACTIVATIONS[model.activation], nnx.Rngs(0))
    for name, part in layer.items():
        getattr(module, name).kernel[...] = jnp.asarray(part["kernel"])
    return module


def test_what_a_token_gets_depends_on_no_other_token():
    """Neither on those before it in other rows, nor on how many choose its experts."""
    model, params = mixture()
    tokens = words(0, 3, 9) % 96
    alone = run(model, params, tokens[:1], np.ones((1, 9), int))
    together = run(model, params, tokens, np.ones((3, 9), int))
    crowded = np.concatenate([np.repeat(tokens[:1], 40, axis=0), tokens])
    among_copies = run(model, params, crowded, np.ones_like(crowded))
    assert error(together[0], alone[0]) < 2e-6
    assert error(among_copies[0], alone[0]) < 2e-6
    assert error(among_copies[-1], together[-1]) < 2e-6


def balanced_loss(model, params, tokens):
    """Return a number that all logits and the load-balancing loss change."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    read = transformer.apply(model, params, tokens, positions, jnp.ones_like(tokens))
    logits = transformer.logits(model, params, read.hidden)
    return jnp.mean(jnp.sin(logits)) + jnp.mean(read.load_balancing)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("sizes", "rows", "count"),
    [
        ((1, 8, 1), 8, 8),
        ((2, 2, 2), 8, 8),
        ((1, 1, 8), 8, 8),
        ((1, 4, 2), 3, 8),  # rows that do not divide
        ((1, 4, 2), 8, 6),  # experts that do not divide
    ],
)
def test_experts_over_a_mesh_give_the_single_devices_gradient(sizes, rows, count):
    model, params = mixture(experts=count, load_balancing_coef=0.1)
    tokens = words(1, rows, 9) % 96
    gradient = jax.value_and_grad(balanced_loss, argnums=1)
    expected, expected_gradient = jax.jit(gradient, static_argnums=0)(model, params, tokens)
    mesh = mesh_of(*sizes)
    model = dataclasses.replace(model, remat="everything")
    with jax.set_mesh(mesh):
        placed = place(jax.tree.map(jnp.asarray, params), mesh)
        on_mesh = sharding.shard_batch(tokens, mesh)
        value, ours = jax.jit(gradient, static_argnums=0)(model, placed, on_mesh)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert largest_error(ours, expected_gradient) < 1e-5


@pytest.mark.parametrize(("preferred", "rounds"), [([], 1), ([0, 1], 2), ([5, 6], 0)])
def test_choices_for_which_there_is_no_room_are_mixed_in_another_round(
    preferred, rounds, monkeypatch
):
    """As if one of four devices had two experts, which some tokens choose, or all, or none."""
    model, params = mixture(layers=1)
    layer = jax.tree.map(lambda x: x[0], params["layers"]["experts"])
    kernels = ExpertKernels(*(jnp.asarray(part[:2]) for part in kernels_of(layer)))
    probabilities = np.random.default_rng(0).random((1, 200, 8)).astype(np.float32)
    probabilities[..., preferred] += 1.0
    weights, chosen = jax.lax.top_k(jnp.asarray(probabilities), 2)
    here = jnp.minimum(chosen, 2)
    hidden = draw(1, 1, 200, model.d_model)
    groups = grouped.group(here.reshape(200, 2), 2, 8)
    assert len(groups.choice) > groups.room
    assert rounds == -(-int(groups.sizes.sum()) // groups.room)

    def total(kernels, hidden, weights):
        tokens = experts.RoutedTokens(hidden, here, weights)
        return jnp.sum(jnp.sin(experts.mix_here(jax.nn.silu, kernels, tokens, 4)))

    gradient = jax.value_and_grad(total, argnums=(0, 1, 2))
    value, gradients = gradient(kernels, hidden, weights)
    monkeypatch.setattr(grouped, "SPARE", 100.0)
    expected_value, expected_gradients = gradient(kernels, hidden, weights)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
    for ours, expected in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_experts_lie_over_fsdp_and_the_numbers_within_them_over_tensor():
    mesh = mesh_of(2, 2, 2)
    specs = sharding.param_shardings(mixture()[1], mesh)["layers"]["experts"]
    assert specs["gate"]["kernel"].spec == P(None, "fsdp", None, "tensor")
    assert specs["down"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert specs["router"]["kernel"].spec == P(None, "fsdp", None)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_experts_do_not_travel():
    """The gradient sends no device another's kernels."""
    model, params = mixture(d_ff=512, layers=1)
    mesh = mesh_of(1, 8, 1)
    kernel = params["layers"]["experts"]["gate"]["kernel"].size
    with jax.set_mesh(mesh):
        placed = place(jax.tree.map(jnp.asarray, params), mesh)
        tokens = sharding.shard_batch(words(1, 8, 9) % 96, mesh)
        gradient = jax.jit(jax.grad(sum_of_sines, argnums=1), static_argnums=0)
        text = gradient.lower(model, placed, tokens).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathered
    assert not [line for line in gathered if f"8,{model.d_model},{model.d_ff}" in line]
    assert kernel == 8 * model.d_model * model.d_ff


def test_the_load_balancing_loss_is_that_of_a_worked_example():
    """Three tokens of a sequence, two of another, and a pad; four experts, two for a token."""
    probabilities = np.array(
        [
            [0.4, 0.3, 0.2, 0.1],
            [0.5, 0.1, 0.3, 0.1],
            [0.1, 0.2, 0.3, 0.4],
            [0.7, 0.1, 0.1, 0.1],
            [0.1, 0.6, 0.2, 0.1],
            [0.25, 0.25, 0.25, 0.25],
        ]
    )
    chosen = np.array([[0, 1], [0, 2], [3, 2], [0, 1], [1, 2], [0, 1]])
    routing = Routing(
        probabilities=jnp.float32(probabilities)[None],
        chosen=jnp.int32(chosen)[None],
        weights=jnp.zeros((1, 6, 2)),
    )
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    same = jnp.asarray(segments[:, :, None] == segments[:, None, :])
    ours = np.asarray(experts.load_balancing(routing, same))[0]
    # Shares 2/3, 1/3, 2/3, 1/3 and mean probabilities 1/3, 0.2, 0.8/3, 0.2, times 4 / 2.
    first = 2 * (2 / 3 * 1 / 3 + 1 / 3 * 0.2 + 2 / 3 * 0.8 / 3 + 1 / 3 * 0.2)
    # Shares 1/2, 1, 1/2, 0 and mean probabilities 0.4, 0.35, 0.15, 0.1.
    second = 2 * (1 / 2 * 0.4 + 1 * 0.35 + 1 / 2 * 0.15)
    np.testing.assert_allclose(ours[:5], [first] * 3 + [second] * 2, rtol=1e-6)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1.0), (0.25, 4.0)])
def test_the_load_balancing_loss_is_1_in_balance_and_at_most_experts_over_chosen(share, expected):
    """Eight experts, of which a share is used, one after the other, with all probability."""
    used = int(8 * share)
    chosen = (np.arange(16)[:, None] + np.arange(2)) % used
    probabilities = np.zeros((16, 8), np.float32)
    np.put_along_axis(probabilities, chosen, 0.5, axis=1)
    routing = Routing(probabilities[None], chosen[None], np.full((1, 16, 2), 0.5, np.float32))
    loss = experts.load_balancing(jax.tree.map(jnp.asarray, routing), jnp.ones((1, 16, 16), bool))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("stage", ["lm", "ranking"])
def test_the_load_balancing_loss_does_not_depend_on_the_packing(stage):
    """The loss of a minibatch and its gradient are the same in one microbatch and in many."""
    head = "lm" if stage == "lm" else "scalar"
    model, params = mixture(head=head, load_balancing_coef=0.7)
    if stage == "lm":
        loss_fn = functools.partial(lm.loss_fn, model)
        microbatches = functools.partial(lm.pack_minibatch, lm_batch(0))
    else:
        loss_fn = functools.partial(ranking.loss_fn, model, configs.Ranking())
        microbatches = functools.partial(ranking.pack_minibatch, comparison_rows())
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))

    def total(budget):
        parts = [step(params, part) for part in microbatches(budget, 1)]
        return len(parts), jax.tree.map(lambda *x: sum(x), *parts)

    one, ((whole, metrics), gradient) = total(4096)
    many, ((in_parts, other_metrics), other_gradient) = total(16)
    assert one == 1 < many
    assert float(whole) == pytest.approx(float(in_parts), rel=1e-5)
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(other_metrics[name]), rel=1e-5, abs=1e-6)
    for ours, expected in zip(
        jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=1e-4)
    expected = float(metrics["loss"] + 0.7 * metrics["load_balancing"])
    assert float(whole) == pytest.approx(expected, rel=1e-5)
    without = dataclasses.replace(model, load_balancing_coef=0.0)
    plain = functools.partial(loss_fn.func, without, *loss_fn.args[1:])
    loss, plain_metrics = plain(params, microbatches(4096, 1)[0])
    assert float(loss) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert "load_balancing" not in plain_metrics


def comparison_rows():
    rng = np.random.default_rng(0)
    rows = {"margin": np.zeros(4, np.float32), "prompt_length": np.ones(4, np.int32)}
    for side in ("chosen", "rejected"):
        rows[side] = rng.integers(1, 96, (4, 9)).astype(np.int32)
        rows[f"{side}_length"] = rng.integers(3, 10, 4).astype(np.int32)
    return rows


def test_without_experts_there_is_no_load_balancing_loss():
    loss = jnp.float32(2.0)
    metrics = {"loss": loss}
    objective = losses.add_load_balancing(loss, metrics, None, jnp.ones(3), 0.1)
    assert objective == (loss, metrics)


def test_the_load_balancing_loss_evens_out_the_use_of_experts():
    """Steps along its gradient alone lower it, from a router that prefers some experts."""
    model, params = mixture(load_balancing_coef=1.0, layers=1)
    params["layers"]["experts"]["router"]["kernel"][..., :2] += 0.5
    tokens = words(5, 4, 24) % 96

    @jax.jit
    @jax.value_and_grad
    def loss(router):
        layers = params["layers"]
        changed = {**layers, "experts": {**layers["experts"], "router": {"kernel": router}}}
        positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
        read = transformer.apply(
            model, {**params, "layers": changed}, tokens, positions, jnp.ones_like(tokens)
        )
        return read.load_balancing.mean()

    router = jnp.asarray(params["layers"]["experts"]["router"]["kernel"])
    values = []
    for _ in range(40):
        value, gradient = loss(router)
        values.append(float(value))
        router -= 0.3 * gradient
    assert values[0] > 1.2 and values[-1] < 1.08


@pytest.mark.parametrize(
    ("count", "dtype", "stops"),
    [(0, "bfloat16", True), (8, "float32", True), (8, "bfloat16", False)],
)
def test_one_score_of_a_mixture_may_change_in_16_bits_and_no_other(count, dtype, stops):
    """Rounding may give a token another expert; if it changes most scores, it is a fault."""
    model = Model(experts=count, experts_per_token=min(count, 2), dtype=dtype)
    changes = np.array([0.5, 0.0, 0.01, -0.02, 0.0])
    if stops:
        changes = changes if dtype == "bfloat16" else changes / 10
        with pytest.raises(UserError, match="the largest change of a score when its row's pads"):
            scoring.check_packing("score", changes, model)
        return
    scoring.check_packing("score", changes, model)
    with pytest.raises(UserError, match="the median change of a score .* is 0.2, not 0"):
        scoring.check_packing("score", np.full(5, -0.2), model)


def test_operations_are_those_of_the_chosen_experts_on_any_mesh():
    """Padding of blocks and slots for all choices on every device do not count."""
    model, params = mixture(d_model=64, d_ff=128, layers=1, experts=16, remat="nothing")
    tokens = np.zeros((8, 32), np.int32)

    def count(function):
        return count_operations(jax.jit(function).trace(params).jaxpr.jaxpr)

    def loss(params):
        positions = jnp.broadcast_to(jnp.arange(32), tokens.shape)
        return transformer.apply(model, params, tokens, positions, jnp.ones_like(tokens))[0].sum()

    attention = 2 * model.d_model * model.head_size * (model.heads + model.kv_heads)
    matrices = attention + model.d_model * model.experts + 3 * 2 * model.d_model * model.d_ff
    scores = 4 * 8 * 32 * 32 * model.heads * model.head_size
    expected = 2 * tokens.size * matrices + scores
    assert count(loss) == pytest.approx(expected)
    assert count(jax.grad(loss)) == pytest.approx(3 * expected, rel=0.02)
    if jax.device_count() >= 8:
        with jax.set_mesh(mesh_of(2, 2, 2)):
            assert count(loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 4}, "model.experts_per_token=0 must be 1 to model.experts=4"),
        ({"experts": 4, "experts_per_token": 5}, "experts_per_token=5 must be 1 to .*experts=4"),
        ({"experts_per_token": 2}, "experts_per_token=2 has a meaning only with model.experts"),
        ({"normalise_experts": True}, "normalise_experts=True has a meaning only with"),
        ({"load_balancing_coef": 0.1}, "load_balancing_coef=0.1 has a meaning only with"),
        (
            {"experts": 4, "experts_per_token": 2, "mlp_bias": True},
            "mlp_bias=True has no meaning with model.experts=4",
        ),
    ],
)
def test_settings_of_experts_that_do_not_fit_are_named(fields, message):
    config = Config()
    for field, value in fields.items():
        setattr(config.model, field, value)
    with pytest.raises(UserError, match=message):
        configs.check(config)


def test_adapters_of_experts_are_refused_and_those_of_attention_are_not():
    config = configs.load("sft.py:tiny")
    config.lora.rank = 4
    for name, value in SIZES.items():
        setattr(config.model, name, value)
    with pytest.raises(UserError, match="gate,up,down, but experts .* no adapters; use q,k,v,out"):
        configs.check(config)
    config.lora.targets = "q,k,v,out"
    configs.check(config)


def test_an_adapter_of_an_expert_is_refused_by_its_tensor(tmp_path):
    model = golden("qwen3_moe").model
    layout = hf_layout.layout_of(model, "lm")
    adapted = [tensor.module for tensor in hf_layout.kernel_tensors(layout)]
    assert len(adapted) == 4 * model.layers and not any("mlp" in module for module in adapted)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["gate_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    name = "base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_A.weight"
    factor = np.zeros((2, model.d_model), np.float32)
    spec = safetensors.TensorSpec(name, "F32", factor.shape)
    safetensors.write_tensors(tmp_path / "adapter_model.safetensors", [spec], iter([factor]))
    with pytest.raises(UserError, match="experts.0.gate_proj.lora_A.weight .* has no place in an"):
        peft_adapter.open_adapter(tmp_path, model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported, only 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported, only \[\]"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 must be at most the 6 experts"),
        ({"num_experts": 5}, "num_experts=5 must be 6"),
        ({"norm_topk_prob": None}, "norm_topk_prob=null is not a value for it"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types must be the same for all"),
    ],
)
def test_what_we_do_not_compute_of_a_mixture_is_refused(fields, message):
    assert re.search(message, refusal("qwen3_moe", **fields))


def test_both_names_of_the_number_of_experts_are_read():
    """transformers 4 writes num_experts, which we write, and 5 num_local_experts."""
    model = read("qwen3_moe", num_experts=6, dropped=("num_local_experts",))
    assert model == read("qwen3_moe") == golden("qwen3_moe").model
    written = families.hf_from_model(model, "lm")
    assert written["num_experts"] == 6 and "num_local_experts" not in written


@pytest.mark.parametrize(
    ("family", "count"), [("qwen3", 4), ("qwen3_moe", 0)], ids=["too many", "none"]
)
def test_a_family_without_experts_has_none_and_one_with_them_needs_some(family, count):
    model = tiny(family=family, experts=count, experts_per_token=min(count, 2), qk_norm=True)[0]
    with pytest.raises(UserError, match=f"model.experts={count} does not go with .*{family!r}"):
        hf_layout.layout_of(model, "lm")


def test_a_device_reads_its_own_experts_only():
    """Those of other devices are not read from the files."""
    _, views = hf.open_hf(GOLDEN / "qwen3_moe", "lm")
    view = views["layers/experts/up/kernel"]
    whole = view.read()
    index = (slice(1, 3), slice(2, 4), slice(0, 16), slice(4, 8))
    assert np.array_equal(view.read(index), whole[index])


# ---------------------------------------------------------------------------------- whole runs


def test_ppo_of_a_mixture_resumes_to_the_bit_and_is_exported(tmp_path):
    """The tiny chain, with the load-balancing loss in each stage; its self-checks pass."""
    fields = {"family": "qwen3_moe", "qk_norm": True, "qkv_bias": False, "layers": 1, "d_ff": 32}
    fields |= {"experts": 4, "experts_per_token": 2, "load_balancing_coef": 0.01}
    words = [f"--config.model.{name}={value}" for name, value in fields.items()]
    assert train.main(command("ppo-tiny", tmp_path, *words)) == 0
    for name, figures in (
        ("sft-tiny", ["load_balancing"]),
        ("rm-tiny", ["load_balancing"]),
        ("ppo-tiny", ["loss/load_balancing_avg", "loss/value_load_balancing_avg"]),
    ):
        last = rows(tmp_path / name / "metrics.jsonl")[-1]
        assert all(0.99 < last[figure] <= 2 for figure in figures)
    cut(tmp_path / "ppo-tiny", tmp_path / "again")
    again = ["--config", "ppo.py:tiny", "--workdir", str(tmp_path / "again")]
    assert train.main([*again, *words]) == 0
    assert files_of(tmp_path / "again") == files_of(tmp_path / "ppo-tiny")
    exported = tmp_path / "exported"
    assert convert.main(["--to_hf", str(tmp_path / "ppo-tiny"), "--out", str(exported)]) == 0
    model, params = hf.load_hf(exported, "lm")
    assert (model.experts, model.experts_per_token) == (4, 2)
    item = checkpoint.newest(tmp_path / "ppo-tiny") / "policy"
    trained = checkpoint.restore_array(item, "layers/experts/down/kernel")
    assert np.array_equal(params["layers"]["experts"]["down"]["kernel"], trained)


WHOLE_KERNELS = ([256, 384], [384, 256])
COMPILED = """
import json, re, sys
import jax
from alignjax import config as configs
from alignjax.config.overrides import parse_overrides
from alignjax.machine import sharding
from alignjax.planning import cost, topologies, work

topology, *words = json.loads(sys.argv[1])
config = configs.load("lm.py", parse_overrides(words))
mesh = sharding.make_mesh(config.mesh, topologies.devices_of(topology))
with jax.set_mesh(mesh):
    gradient = next(p for p in work.work_of(config, mesh).programs if p.name == "gradient")
    text = cost.compile_program(gradient)[1].as_text()
kernels = sorted(set(re.findall(r"multiply_blocks|add_outer_products|tgmm|gmm", text)))
lines = re.findall(r"= (.*?) all-gather(?:-start)?\\(", text)
shapes = [sizes.split(",") for line in lines for sizes in re.findall(r"\\[([\\d,]+)\\]", line)]
print(json.dumps([kernels, [list(map(int, shape)) for shape in shapes]]))
"""


@pytest.mark.parametrize(
    ("topology", "compiler", "kernels"),
    [
        ("h100:2", "gpu-compiler", ["add_outer_products", "multiply_blocks"]),
        ("v5e:2x2", "tpu-compiler", ["gmm", "tgmm"]),
    ],
)
def test_experts_compile_for_accelerators_that_are_not_here(topology, compiler, kernels):
    """As kernels that pass over what no token has chosen; no device gathers all experts."""
    fields = {**SIZES, "vocab_size": 512, "d_model": 256, "d_ff": 384, "layers": 2, "heads": 4}
    fields |= {"kv_heads": 2, "head_size": 64, "dtype": "bfloat16", "remat": "everything"}
    words = [topology, *(f"--config.model.{name}={value}" for name, value in fields.items())]
    printed = run_with_compiler(COMPILED, words, compiler)
    called, gathered = json.loads(printed)
    assert called == kernels
    assert gathered
    assert not [sizes for sizes in gathered if sizes[0] == 8 and sizes[-2:] in WHOLE_KERNELS]
