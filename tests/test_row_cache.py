"""The cache and the joined layers of GPUs: the samples of other devices, and few launches."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from runs import ROOT
from test_rollout import (
    IN_ORDER,
    KEY,
    MODEL,
    PARAMS,
    assert_is_twin,
    compile_sampler,
    make_prompts,
    make_settings,
    on_host,
)

from alignjax.config import Mesh
from alignjax.machine import sharding
from alignjax.models import transformer
from alignjax.models.attention import decode_attention
from alignjax.sampling import cache, rollout
from alignjax.sampling.prefill import read_prefix

COMPILER = ROOT / ".venv" / "gpu-compiler"  # where run.sh installs it


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Choose cache and layers as on a GPU; the tests' devices stay CPUs."""
    monkeypatch.setattr(transformer, "joins_products", lambda: True)
    monkeypatch.setattr(cache, "platform", lambda: "gpu")


@pytest.mark.parametrize("slots, placed", [(0, True), (6, True), (6, False)])
def test_a_gpu_samples_as_other_devices(slots, placed):
    """All prompts at once, and refilled; with parameters laid out before, or in the rollout."""
    params = transformer.for_sampling(MODEL, PARAMS) if placed else PARAMS
    sampled = on_host(compile_sampler(slots=slots)(params, make_prompts(), KEY))
    assert_is_twin(sampled, IN_ORDER)


def test_eight_devices_sample_as_one_with_rows():
    """Slots over data and fsdp, heads over tensor."""
    order = np.arange(32) % 6
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, sharding.param_shardings(PARAMS, mesh))
        place = jax.jit(functools.partial(transformer.for_sampling, MODEL))
        prompts = sharding.shard_batch(make_prompts(order), mesh)
        sampled = on_host(compile_sampler(slots=16)(place(params), prompts, KEY))
    assert_is_twin(sampled, order)


def test_pads_between_a_prefix_and_a_prompt_are_not_seen():
    """The first two tokens of all prompts as their prefix, itself behind pads."""
    prompts = make_prompts([0, 0], width=8)
    shared = prompts.tokens[0, 3:5]
    whole = on_host(compile_sampler(slots=0)(PARAMS, prompts, KEY))
    prefix = read_prefix(PARAMS, jnp.asarray([0, 0, *shared]), jnp.int32(2), MODEL)
    rest = make_prompts([0, 0], width=8)
    rest.lengths[:] -= 2
    generate = jax.jit(functools.partial(rollout.generate, settings=make_settings()))
    sampled = on_host(generate(PARAMS, rest, KEY, prefix=prefix))
    assert np.array_equal(sampled.tokens[:, 8:], whole.tokens[:, 8:])


def test_the_layout_over_a_mesh_is_that_of_the_table():
    """Joined kernels are cut along their input over fsdp, and along heads or d_ff over tensor."""
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    layers = transformer.for_sampling(MODEL, PARAMS)["layers"]
    shardings = sharding.param_shardings({"layers": layers}, mesh)["layers"]
    assert len(shardings) == MODEL.layers
    for layer in shardings:
        attention = layer["attention"]
        assert attention["qkv"]["kernel"].spec == P("fsdp", "tensor", None, None)
        assert attention["out"]["kernel"].spec == P("tensor", None, "fsdp")
        assert layer["mlp"]["gate_up"]["kernel"].spec == P("fsdp", "tensor", None)
        assert layer["mlp"]["down"]["kernel"].spec == P("tensor", "fsdp")


@pytest.mark.parametrize(
    "places, rounded_up", [(1, 128), (128, 128), (129, 256), (2048, 2048), (2049, 4096)]
)
def test_a_row_has_as_many_places_as_the_kernel_takes(places, rounded_up):
    assert decode_attention.round_up(places) == rounded_up
    for rows in (1, 64, 4096):
        splits = decode_attention.splits_of((rows, rounded_up, 2, 64))
        assert rounded_up % (splits * decode_attention.BLOCK) == 0
        assert splits == 1 or rows * 2 * splits <= 2 * decode_attention.LEAST_PROGRAMS


@pytest.mark.parametrize("heads, kv_heads, head_size", [(4, 2, 64), (7, 1, 128), (3, 3, 32)])
def test_the_kernel_attends_as_the_products_do(heads, kv_heads, head_size, monkeypatch):
    """Interpreted on a CPU, in bfloat16, over rows of which some are nearly empty or full."""
    monkeypatch.setattr(decode_attention, "kernel_can_read", lambda queries, keys: True)
    rng = np.random.default_rng(0)
    shape = (5, 256, kv_heads, head_size)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    queries = draw(5, heads, head_size)
    keys = draw(*shape)
    values = draw(*shape)
    first = jnp.array([0, 3, 200, 0, 130])
    end = jnp.array([256, 4, 256, 1, 250])
    by_kernel = decode_attention.attend_rows(queries, keys, values, first, end)
    exact = decode_attention.attend_masked(
        *(x.astype(jnp.float32) for x in (queries, keys, values)), first, end
    )
    assert by_kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(by_kernel.astype(jnp.float32), exact, atol=0.03)


COUNT = """
import functools, json, jax
from alignjax import config as configs
from alignjax.machine import sharding
from alignjax.models import transformer
from alignjax.planning import hlo, launches, topologies
from alignjax.sampling import rollout
from alignjax.sampling.types import Prompts, SamplingSettings

devices = topologies.devices_of("h100:1")
numbers = jax.ShapeDtypeStruct((16,), jax.numpy.int32)
prompts = Prompts(
    tokens=jax.ShapeDtypeStruct((16, 64), jax.numpy.int32), lengths=numbers, index=numbers
)
key = jax.eval_shape(lambda: jax.random.key(0))
for layers in (1, 3):
    model = configs.Model(
        d_model=128, layers=layers, heads=4, kv_heads=2, head_size=64, d_ff=256, vocab_size=1024,
        dtype="bfloat16", attention="xla",
    )
    settings = SamplingSettings(
        model=model, samples_per_prompt=1, response_length=64, temperature=1.0, top_p=0.9,
        end_tokens=(2,),
    )
    with jax.set_mesh(sharding.make_mesh(configs.Mesh(), devices)):
        params = jax.eval_shape(lambda key: transformer.init(model, key, "lm"), key)
        params = jax.eval_shape(functools.partial(transformer.for_sampling, model), params)
        generate = jax.jit(functools.partial(rollout.generate, settings=settings))
        compiled = generate.lower(params, prompts, key).compile()
    text = compiled.as_text()
    step, draw = launches.loop_bodies(hlo.parse_module(text))[:2]
    print(json.dumps([step.launches, draw.total, " sort(" in text]))
"""


def test_a_decode_step_on_an_h100_launches_14_kernels_a_layer():
    """By the CUDA compiler, without a GPU: no conditional, no copy of a cache or of parameters."""
    if not (COMPILER / "jax_cuda12_plugin").exists():
        pytest.skip("needs the CUDA compiler, which tests/run.sh installs")
    for_cpu = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in for_cpu}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{COMPILER}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    one, three = (launches for launches, _, _ in results)
    assert sum(three.values()) - sum(one.values()) <= 2 * 14
    assert three["custom-call"] == 3  # the kernel of attention
    assert not {"conditional", "copy"} & {*one, *three}
    assert sum(one.values()) <= 36
    # A further round of the draw; and prompts that need not be put in order, without a prefix.
    assert [(draw, has_sort) for _, draw, has_sort in results] == 2 * [(11, False)]
