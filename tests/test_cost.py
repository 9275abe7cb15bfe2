"""What a program costs: counts against hand-worked numbers, with loops, and against XLA's own where it has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_models import tiny, words

from alignjax.config import Mesh
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.planning import cost

F32 = jnp.float32


def flops(function, *shapes, loops=cost.ONCE):
    return cost.flops(
        jax.jit(function).trace(*(jax.ShapeDtypeStruct(s, F32) for s in shapes)).jaxpr.jaxpr, loops
    )


def traffic(function, *arguments, loops=cost.ONCE):
    compiled = jax.jit(function).lower(*arguments).compile()
    return cost.Program(compiled.as_text()).traffic(loops), compiled


def shape(*sizes, spec=None, mesh=None):
    return jax.ShapeDtypeStruct(sizes, F32, sharding=NamedSharding(mesh, spec) if mesh else None)


def test_a_products_operations_are_two_for_each_term():
    assert flops(lambda a, b: a @ b, (5, 7), (7, 3)) == 2 * 5 * 7 * 3
    assert (
        flops(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), (4, 5, 7), (4, 7, 3))
        == 4 * 2 * 5 * 7 * 3
    )


def test_a_loop_counts_as_often_as_it_runs():
    def repeated(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=11)[0]

    assert flops(repeated, (4, 6), (6, 6)) == 11 * 2 * 4 * 6 * 6

    def rollout(a, b):
        """Turns of a product and of decoding, whose draw loops without one."""
        draw = lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)
        decode = lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: draw(x @ b), x)
        return jax.lax.while_loop(lambda x: x.sum() > 2, lambda x: decode(x @ b), a)

    one = 2 * 4 * 6 * 6
    assert flops(rollout, (4, 6), (6, 6), loops=cost.Loops(turns=3, steps=10)) == 3 * (1 + 10) * one
    assert flops(rollout, (4, 6), (6, 6), loops=cost.Loops(turns=3, steps=0)) == 3 * one


def test_what_is_computed_again_for_the_gradient_counts_again():
    double = lambda a, b: jnp.sum(jnp.sin(a @ b) @ b)
    plain = flops(jax.grad(double), (4, 6), (6, 6))
    again = flops(jax.grad(jax.checkpoint(double)), (4, 6), (6, 6))
    assert (
        plain == 4 * 2 * 4 * 6 * 6 and again - plain == 2 * 4 * 6 * 6
    )  # the second product's value is not needed


@pytest.mark.parametrize("remat, times", [("nothing", 3), ("everything", 4)])
def test_a_models_operations_are_those_of_its_matrices(remat, times):
    """Of log-probabilities and their gradient, by hand: matrices, all scores of a short row, and the output's chunk."""
    model, params = tiny(remat=remat, vocab_size=96)
    b, t, d, h = 3, 8, model.d_model, model.head_size
    batch = {
        "tokens": words(0, b, t),
        "positions": np.zeros((b, t), np.int32),
        "segments": np.ones((b, t), np.int32),
        "at": np.tile(np.arange(t), (b, 1)),
    }
    loss = lambda params: scoring.token_logprobs(model, params, batch)[0].sum()
    matrices = 2 * d * h * model.heads + 2 * d * h * model.kv_heads + 3 * d * model.d_ff
    layers = model.layers * (2 * b * t * matrices + 4 * b * t * t * model.heads * h)
    output = 2 * b * t * d * 96
    count = lambda function: cost.flops(jax.jit(function).trace(params).jaxpr.jaxpr)
    assert count(loss) == layers + output
    found = count(jax.grad(loss))
    assert found <= times * layers + 3 * output and found > 0.9 * (times * layers + 3 * output)


def test_bytes_moved_are_those_of_what_is_read_and_written():
    found, compiled = traffic(lambda x: x + 1, shape(2**20))
    assert found.moved == 2 * 4 * 2**20 and found.sent == 0
    found, compiled = traffic(lambda a, b: jnp.tanh(a) @ b, shape(512, 256), shape(256, 128))
    assert found.moved == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.05)


def test_a_loop_moves_a_layer_at_a_time_and_as_often_as_it_runs():
    def layers(x, stack):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, stack)[0]

    found, _ = traffic(layers, shape(8, 256), shape(20, 256, 256))
    stack = 20 * 256 * 256 * 4
    assert (
        stack <= found.moved < 6 * stack
    )  # read once, perhaps copied before; not twenty times the whole of it


def test_an_update_in_place_moves_what_it_updates():
    def fill(cache, x):
        return jax.lax.fori_loop(
            0, 50, lambda i, c: jax.lax.dynamic_update_slice(c, x + i, (i, 0)), cache
        )

    compiled = jax.jit(fill, donate_argnums=0).lower(shape(4096, 128), shape(1, 128)).compile()
    found = cost.Program(compiled.as_text()).traffic()
    assert found.moved < 4096 * 128 * 4


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_bytes_sent_are_those_that_travel():
    mesh = sharding.make_mesh(Mesh(fsdp=8))
    rows, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    size = 1024 * 64 * 4

    def sent(function, out, *specs):
        arguments = [shape(1024, 64, spec=spec, mesh=mesh) for spec in specs]
        compiled = jax.jit(function, out_shardings=out).lower(*arguments).compile()
        return cost.Program(compiled.as_text()).traffic().sent

    assert sent(lambda x: x * 2, rows, P("fsdp")) == 0
    assert sent(lambda x: x * 2, whole, P("fsdp")) == size * 7 / 8  # a gather
    assert (
        sent(lambda x: x.sum(0), whole, P("fsdp")) == 2 * 64 * 4
    )  # a sum of everybody's, to everybody


def test_arrays_on_the_chip_do_not_count():
    assert (
        cost.size("f32[8,4]{1,0:T(8,128)}") == 128 and cost.size("f32[8,4]{1,0:T(8,128)S(1)}") == 0
    )
    assert cost.size("(bf16[3]{0}, pred[5]{0:S(2)}, s32[])") == 6 + 4
    assert cost.size("bf16[3]{0:S(1)}", everywhere=True) == 6


def test_a_device_has_its_share():
    mesh = sharding.make_mesh(Mesh(fsdp=-1))
    half = jax.ShapeDtypeStruct((64, 3), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    assert cost.device_bytes({"a": half, "b": [half]}) == 2 * 64 * 3 * 2 / mesh.size


def test_this_machines_figures_are_measured():
    chip = cost.measured(jax.devices())
    assert (
        cost.chip_of(jax.devices()[0]) is None
        and chip.memory > 0.1
        and chip.flops > 1e8
        and chip.bandwidth > 1e7
    )
