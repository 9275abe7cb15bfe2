"""Attention against its definition, its forms against each other, and the choice among them on every backend."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.config import Mesh, UserError
from alignjax.machine import sharding
from alignjax.models import attention
from alignjax.models.attention import SharedKeys, choose, flash, plain, self_attention

F32, BF16 = np.dtype(np.float32), jnp.dtype(jnp.bfloat16)


def arrays(seed, b, t, n, k, h):
    """q, k, v, and a weight for each number that comes out."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return draw(b, t, n, h), draw(b, t, k, h), draw(b, t, k, h), draw(b, t, n, h)


def layout(t):
    """segments[3 t]: packed with pads behind, pads in front, and packed without pads, in numbers that fall."""
    third, rest = t // 3, t - t // 3
    return jnp.array(
        [
            [1] * third + [2] * (rest - 3) + [0] * 3,
            [0] * 5 + [1] * (t - 5),
            [7] * third + [4] * rest,
        ]
    )


def value_and_grads(of, q, k, v, segments, weights):
    """What comes out, at pads too, and the gradients of a weighted sum of it."""

    def loss(q, k, v):
        y = of(q, k, v, segments)
        return jnp.sum(y * weights), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *grads


def assert_same(ours, theirs, atol):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def loop(q, keys, values):
    """One query head, q[h], keys[s h], values[s h]."""
    scores = keys @ q / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def test_self_attention_is_a_loop():
    """Against the definition, one query head at a time, with grouped keys, packed rows and pads at both ends."""
    q, k, v, _ = arrays(0, 3, 9, 4, 2, 8)
    segments = np.asarray(layout(9))
    ours = np.asarray(self_attention(q, k, v, jnp.asarray(segments)))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, t, n in np.ndindex(3, 9, 4):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        assert np.allclose(
            ours[b, t, n], loop(q[b, t, n], k[b, seen, n // 2], v[b, seen, n // 2]), atol=2e-6
        )


def cut(keys, values, mask, sizes):
    """keys[b k s h], values[b k s h] and mask[b s] in blocks of so many places, as `cached_attention` takes them."""
    at = np.cumsum(sizes)[:-1]
    blocks = zip(*(jnp.split(x, at, axis=2) for x in (keys, values)), strict=True)
    return list(blocks), jnp.split(jnp.asarray(mask), at, axis=1)


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (2, 1, 1, 3)])
@pytest.mark.parametrize("cache", [F32, BF16])
def test_cached_attention_is_a_loop(cache, sizes):
    """Whatever the blocks; the first row sees nothing of the last of them."""
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, 4, 8)).astype(np.float32)
    keys, values = (jnp.asarray(rng.normal(size=(2, 2, 7, 8)), cache) for _ in range(2))
    mask = np.array([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1]], bool)
    ours = attention.cached_attention(jnp.asarray(q), *cut(keys, values, mask, sizes))
    assert ours.dtype == np.float32
    keys, values = np.asarray(keys, np.float64), np.asarray(values, np.float64)
    for b, n in np.ndindex(2, 4):
        theirs = loop(q[b, n], keys[b, n // 2, mask[b]], values[b, n // 2, mask[b]])
        assert np.allclose(ours[b, n], theirs, atol=2e-6)


def test_cached_attention_is_the_last_row_of_self_attention():
    q, k, v, _ = arrays(2, 3, 12, 4, 2, 8)
    segments = layout(12)
    blocks = cut(k.swapaxes(1, 2), v.swapaxes(1, 2), segments == segments[:, -1:], (5, 4, 3))
    ours = attention.cached_attention(q[:, -1], *blocks)
    np.testing.assert_allclose(ours, self_attention(q, k, v, segments)[:, -1], rtol=0, atol=2e-6)


def test_what_sees_nothing_is_finite_with_finite_gradients():
    q, k, v, weights = arrays(3, 2, 6, 4, 2, 8)
    nothing = jnp.zeros((2, 6), jnp.int32)
    one = lambda q, k, v: jnp.sum(self_attention(q, k, v, nothing) * weights)
    two = lambda q, k, v: jnp.sum(
        attention.cached_attention(
            q[:, 0], *cut(k.swapaxes(1, 2), v.swapaxes(1, 2), nothing > 0, (4, 2))
        )
        * weights[:, 0]
    )
    for of in (one, two):
        value, grads = jax.jit(jax.value_and_grad(of, (0, 1, 2)))(q, k, v)
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in grads)
    mean = attention.cached_attention(
        q[:, 0], *cut(k.swapaxes(1, 2), v.swapaxes(1, 2), nothing > 0, (4, 2))
    )
    np.testing.assert_allclose(mean, np.repeat(v.mean(axis=1), 2, axis=1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("t, loops", [(25, 0), (37, 3)])
def test_parts_and_blocks_are_one_piece(t, loops, monkeypatch):
    """Blocks of 8: four parts of a block at most, the last short; and five blocks, with pads, in parts of two."""
    q, k, v, weights = arrays(4, 3, t, 4, 2, 8)
    whole = value_and_grads(self_attention, q, k, v, layout(t), weights)
    monkeypatch.setattr(plain, "WHOLE", 8)
    monkeypatch.setattr(plain, "BLOCK", 8)
    assert str(jax.make_jaxpr(self_attention)(q, k, v, layout(t))).count("scan[") == loops
    assert_same(value_and_grads(self_attention, q, k, v, layout(t), weights), whole, 1e-5)


def test_no_array_is_larger_than_the_scores_of_one_block():
    """Nor does the backward pass keep those of several."""
    t, n = 2048, 2
    q, k, v, weights = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(5, 1, t, n, 1, 8))
    loss = lambda q, k, v, w: jnp.sum(self_attention(q, k, v, jnp.ones((1, t), jnp.int32)) * w)
    shapes = re.findall(
        r"f32\[([\d,]+)\]", str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v, weights))
    )
    assert (
        max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)
        == n * plain.BLOCK * t
    )


def test_cudnn_is_given_the_mask_and_an_even_length(monkeypatch):
    """What cuDNN then makes of them needs a GPU."""
    without_kernel = jax.nn.dot_product_attention

    def stand_in(q, k, v, mask, implementation):
        assert implementation == "cudnn" and q.shape[1] == k.shape[1] == 10
        return without_kernel(q, k, v, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v, weights = arrays(9, 3, 9, 4, 2, 8)
    ours = value_and_grads(flash.cudnn_attention, q, k, v, layout(9), weights)
    assert_same(ours, value_and_grads(self_attention, q, k, v, layout(9), weights), 1e-5)


@pytest.mark.parametrize("k", [4, 2])
def test_splash_is_xla(k):
    """Interpreted; t is no multiple of 128, so that pads come in."""
    q, k, v, weights = arrays(6, 3, 200, 4, k, 16)
    ours = value_and_grads(flash.splash_attention, q, k, v, layout(200), weights)
    assert_same(ours, value_and_grads(self_attention, q, k, v, layout(200), weights), 1e-4)


@pytest.mark.parametrize("rows", [4, 3])
def test_splash_over_a_mesh_is_xla(rows):
    """Three rows don't divide over the four devices, and lie on each."""
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    q, k, v, weights = arrays(7, rows, 128, 4, 2, 8)
    segments = jnp.tile(layout(128), (2, 1))[:rows]
    alone = value_and_grads(self_attention, q, k, v, segments, weights)
    with jax.set_mesh(sharding.make_mesh(Mesh(2, 2, 2))):
        assert attention.shards() == (4, 2)
        on_each = "f32[1,2,128,8]" if rows == 4 else "f32[3,2,128,8]"
        assert on_each in str(jax.make_jaxpr(flash.splash_attention)(q, k, v, segments))
        ours = value_and_grads(flash.splash_attention, q, k, v, segments, weights)
    assert_same(ours, alone, 1e-4)


LONG = (8, 1024, 4, 64)  # b t n h


@pytest.mark.parametrize(
    "backend, dtype, shape, kv_heads, shards, name",
    [
        ("cpu", F32, LONG, 2, (1, 1), "xla"),
        ("cpu", BF16, LONG, 2, (4, 2), "xla"),
        ("gpu", BF16, LONG, 2, (1, 1), "cudnn"),
        ("gpu", BF16, LONG, 2, (4, 2), "cudnn"),
        ("gpu", F32, LONG, 2, (1, 1), "xla"),
        ("gpu", BF16, (8, 1024, 4, 100), 2, (1, 1), "xla"),
        ("gpu", BF16, LONG, 2, (1, 4), "xla"),
        ("gpu", BF16, LONG, 2, (3, 1), "xla"),
        ("tpu", BF16, LONG, 2, (1, 1), "splash"),
        ("tpu", F32, LONG, 2, (4, 2), "splash"),
        ("tpu", BF16, (8, 1000, 4, 100), 2, (1, 1), "splash"),
        ("tpu", BF16, (8, 100, 4, 64), 2, (1, 1), "xla"),
        ("tpu", BF16, LONG, 2, (1, 4), "xla"),
        ("tpu", BF16, LONG, 2, (3, 1), "xla"),
    ],
)
def test_auto_takes_what_the_backend_and_the_shape_allow(
    backend, dtype, shape, kv_heads, shards, name
):
    assert choose("auto", backend, dtype, shape, kv_heads, shards) == name
    assert choose("xla", backend, dtype, shape, kv_heads, shards) == "xla"
    assert choose(name, backend, dtype, shape, kv_heads, shards) == name


def test_rows_that_do_not_divide_hinder_no_explicit_choice():
    """A batch's last rows must not stop a run."""
    assert choose("splash", "tpu", BF16, LONG, 2, (3, 1)) == "splash"
    assert choose("cudnn", "gpu", BF16, LONG, 2, (3, 1)) == "cudnn"


@pytest.mark.parametrize(
    "name, backend, dtype, h, tensor, message",
    [
        (
            "cudnn",
            "cpu",
            BF16,
            64,
            1,
            "needs a GPU and model.dtype='bfloat16', not cpu and bfloat16",
        ),
        ("cudnn", "gpu", F32, 64, 1, "needs a GPU and model.dtype='bfloat16', not gpu and float32"),
        (
            "cudnn",
            "gpu",
            BF16,
            100,
            1,
            "needs model.head_size=100 to be a multiple of 8 and at most 128",
        ),
        ("cudnn", "gpu", BF16, 64, 4, "needs mesh.tensor=4 to divide model.kv_heads=2"),
        ("splash", "cpu", BF16, 64, 1, "needs a TPU, not cpu"),
        ("splash", "gpu", BF16, 64, 1, "needs a TPU, not gpu"),
        ("splash", "tpu", BF16, 64, 4, "needs mesh.tensor=4 to divide model.kv_heads=2"),
    ],
)
def test_a_choice_that_cannot_run_is_refused(name, backend, dtype, h, tensor, message):
    with pytest.raises(UserError, match=f"^model.attention='{name}' {message}$"):
        choose(name, backend, dtype, (8, 1024, 4, h), 2, (1, tensor))


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="they are refused where there is neither GPU nor TPU"
)
@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_kernels_are_refused_on_a_cpu(name):
    q, k, v, _ = arrays(8, 1, 3, 4, 2, 8)
    with pytest.raises(UserError, match=f"model.attention='{name}' needs a .PU"):
        self_attention(q, k, v, jnp.ones((1, 3), jnp.int32), name)


# Forward and backward for eight v5p chips, through `auto`: the mesh says that it is of TPUs.
TPU = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from alignjax.models.attention import self_attention
from alignjax.machine.sharding import AXES, BATCH

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5:2x2x2").devices
mesh = Mesh(np.array(devices).reshape(2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
array = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
segments = array((4, 256), jnp.int32, *BATCH)
for k, h, dtype in ((4, 64, jnp.bfloat16), (2, 128, jnp.bfloat16), (4, 64, jnp.float32)):
    heads = lambda n: array((4, 256, n, h), dtype, *BATCH, None, "tensor")
    loss = lambda q, k, v, s: jnp.sum(self_attention(q, k, v, s).astype(jnp.float32) ** 2)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads(4), heads(k), heads(k), segments).compile()
    names = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    print(len(names), *(part in "".join(names) for part in ("mha_fwd", "mha_dq", "mha_dkv")))
"""


def test_splash_compiles_for_a_tpu_that_is_not_here():
    compiler = (
        Path(__file__).resolve().parent.parent / ".venv" / "tpu-compiler"
    )  # where run.sh has put it
    if not (compiler / "libtpu").exists():
        pytest.skip("needs libtpu, the TPU compiler, which tests/run.sh installs")
    # XLA_FLAGS and the cache of compiled programs are for the tests' CPU devices.
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    env |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": f"{compiler}:{compiler.parent.parent}",
    }
    done = subprocess.run([sys.executable, "-c", TPU], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3 True True True"] * 3


@pytest.mark.parametrize("t", [40, 200, 530])  # whole, in parts, and in parts of blocks
def test_a_prefix_and_a_second_segment_are_seen(t):
    """Against one softmax over all keys; a trunk with two branches in a row, grouped queries, a prefix behind pads."""
    b, n, k, h, s = 2, 4, 2, 8, 11
    q, key, value, _ = arrays(3, b, t, n, k, h)
    rng = np.random.default_rng(4)
    keys, values = (jnp.asarray(rng.normal(size=(s, k, h)), jnp.float32) for _ in range(2))
    real = jnp.arange(s) >= 3
    own = np.repeat([1, 2, 3, 0], [t // 2, t // 4, t - t // 2 - t // 4 - 2, 2])
    segments = jnp.asarray(np.broadcast_to(np.stack([own, np.minimum(own, 1)], axis=-1), (b, t, 2)))
    seen = (own[:, None] == own) | (np.minimum(own, 1)[:, None] == own)
    mask = np.concatenate(
        [np.broadcast_to(real, (t, s)), seen & np.tril(np.ones((t, t), bool))], axis=1
    )
    joined = [
        jnp.repeat(jnp.concatenate([jnp.broadcast_to(x, (b, s, k, h)), y], axis=1), n // k, axis=2)
        for x, y in ((keys, key), (values, value))
    ]
    scores = jnp.where(mask, jnp.einsum("bqnh,bsnh->bnqs", q, joined[0]) * h**-0.5, -1e30)
    expected = jnp.einsum("bnqs,bsnh->bqnh", jax.nn.softmax(scores), joined[1])
    found = jax.jit(self_attention)(q, key, value, segments, prefix=SharedKeys(keys, values, real))
    np.testing.assert_allclose(found, expected, atol=2e-6)
