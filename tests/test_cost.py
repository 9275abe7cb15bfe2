"""What a program costs: counts against numbers worked out by hand, and against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_models import tiny, words

from alignjax.algorithms.stage import Loops
from alignjax.config import Mesh
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.planning import chips, hlo
from alignjax.planning.operations import ONCE, count_operations
from alignjax.planning.traffic import count_traffic
from alignjax.planning.work import device_bytes


def operations(function, *shapes, loops=ONCE):
    """Count the operations of a function of float32 arrays of these shapes."""
    arguments = [jax.ShapeDtypeStruct(sizes, jnp.float32) for sizes in shapes]
    return count_operations(jax.jit(function).trace(*arguments).jaxpr.jaxpr, loops)


def compile_for(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def traffic(compiled):
    return count_traffic(hlo.parse_module(compiled.as_text()))


def shape(*sizes, spec=None, mesh=None):
    layout = NamedSharding(mesh, spec) if mesh else None
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=layout)


def test_a_product_has_two_operations_for_each_term():
    assert operations(lambda a, b: a @ b, (5, 7), (7, 3)) == 2 * 5 * 7 * 3
    batched = operations(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), (4, 5, 7), (4, 7, 3))
    assert batched == 4 * 2 * 5 * 7 * 3


def test_a_loop_counts_as_often_as_it_runs():
    def repeated(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=11)[0]

    def rollout(a, b):
        """Run turns of a product and of decoding, whose draws loop without a product."""

        def draw(x):
            return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)

        def decode(x):
            return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: draw(x @ b), x)

        return jax.lax.while_loop(lambda x: x.sum() > 2, lambda x: decode(x @ b), a)

    one_product = 2 * 4 * 6 * 6
    shapes = ((4, 6), (6, 6))
    assert operations(repeated, *shapes) == 11 * one_product
    ten_steps = operations(rollout, *shapes, loops=Loops(turns=3, steps=10))
    assert ten_steps == 3 * (1 + 10) * one_product
    no_steps = operations(rollout, *shapes, loops=Loops(turns=3, steps=0))
    assert no_steps == 3 * one_product


def test_rematerialised_products_count_again():
    def loss(a, b):
        return jnp.sum(jnp.sin(a @ b) @ b)

    one_product = 2 * 4 * 6 * 6
    plain = operations(jax.grad(loss), (4, 6), (6, 6))
    again = operations(jax.grad(jax.checkpoint(loss)), (4, 6), (6, 6))
    assert plain == 4 * one_product
    assert again - plain == one_product  # the value of the second product is not needed


@pytest.mark.parametrize("remat, times", [("nothing", 3), ("everything", 4)])
def test_a_models_operations_are_those_of_its_matrices(remat, times):
    """By hand: the matrices, all scores of a short row, and the output's chunk."""
    model, params = tiny(remat=remat, vocab_size=96)
    rows = 3
    tokens = 8
    width = model.d_model
    packed = scoring.PackedTokens(
        tokens=words(0, rows, tokens),
        positions=np.zeros((rows, tokens), np.int32),
        segments=np.ones((rows, tokens), np.int32),
    )
    targets = np.tile(np.arange(tokens), (rows, 1))

    def loss(params):
        return scoring.token_logprobs(model, params, packed, targets)[0].sum()

    def count(function):
        return count_operations(jax.jit(function).trace(params).jaxpr.jaxpr)

    attention_weights = 2 * width * model.head_size * (model.heads + model.kv_heads)
    matrices = attention_weights + 3 * width * model.d_ff
    scores = 4 * rows * tokens * tokens * model.heads * model.head_size
    layers = model.layers * (2 * rows * tokens * matrices + scores)
    output = 2 * rows * tokens * width * 96
    assert count(loss) == layers + output
    most = times * layers + 3 * output
    assert 0.9 * most < count(jax.grad(loss)) <= most


def test_bytes_moved_are_those_read_and_written():
    added = traffic(compile_for(lambda x: x + 1, shape(2**20)))
    assert added.moved == 2 * 4 * 2**20
    assert added.sent == 0
    product = compile_for(lambda a, b: jnp.tanh(a) @ b, shape(512, 256), shape(256, 128))
    xlas_count = product.cost_analysis()["bytes accessed"]
    assert traffic(product).moved == pytest.approx(xlas_count, rel=0.05)


def test_a_loop_moves_a_layer_at_a_time_and_as_often_as_it_runs():
    def layers(x, stack):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, stack)[0]

    moved = traffic(compile_for(layers, shape(8, 256), shape(20, 256, 256))).moved
    stack = 20 * 256 * 256 * 4
    # It is read once and perhaps copied before; the whole stack is not read twenty times.
    assert stack <= moved < 6 * stack


def test_an_update_in_place_moves_what_it_updates():
    def write_row(i, cache, x):
        return jax.lax.dynamic_update_slice(cache, x + i, (i, 0))

    def fill(cache, x):
        return jax.lax.fori_loop(0, 50, lambda i, cache: write_row(i, cache, x), cache)

    donating = jax.jit(fill, donate_argnums=0)
    compiled = donating.lower(shape(4096, 128), shape(1, 128)).compile()
    assert traffic(compiled).moved < 4096 * 128 * 4


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_bytes_sent_are_those_that_travel():
    mesh = sharding.make_mesh(Mesh(fsdp=8))
    by_rows = NamedSharding(mesh, P("fsdp"))
    replicated = NamedSharding(mesh, P())
    size = 1024 * 64 * 4

    def sent(function, result_layout):
        argument = shape(1024, 64, spec=P("fsdp"), mesh=mesh)
        compiled = jax.jit(function, out_shardings=result_layout).lower(argument).compile()
        return traffic(compiled).sent

    assert sent(lambda x: x * 2, by_rows) == 0
    assert sent(lambda x: x * 2, replicated) == size * 7 / 8  # a gather
    # A sum over all devices, sent to all of them.
    assert sent(lambda x: x.sum(0), replicated) == 2 * 64 * 4


def test_arrays_in_the_chips_own_memory_do_not_count():
    assert hlo.type_bytes("f32[8,4]{1,0:T(8,128)}") == 128
    assert hlo.type_bytes("f32[8,4]{1,0:T(8,128)S(1)}") == 0
    assert hlo.type_bytes("(bf16[3]{0}, pred[5]{0:S(2)}, s32[])") == 6 + 4
    assert hlo.type_bytes("bf16[3]{0:S(1)}", everywhere=True) == 6


def test_a_device_has_its_share():
    mesh = sharding.make_mesh(Mesh(fsdp=-1))
    layout = NamedSharding(mesh, P("fsdp"))
    half = jax.ShapeDtypeStruct((64, 3), jnp.bfloat16, sharding=layout)
    assert device_bytes({"a": half, "b": [half]}) == 2 * 64 * 3 * 2 / mesh.size


def test_this_machines_figures_are_measured():
    devices = jax.devices()
    assert chips.published_chip(devices[0].device_kind) is None
    chip = chips.measure_chip(devices)
    assert chip.memory > 0.1
    assert chip.flops > 1e8
    assert chip.bandwidth > 1e7
