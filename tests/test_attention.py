"""Attention against its definition, its forms against each other, and the choice of the kernel."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.config import Mesh, UserError
from alignjax.machine import sharding
from alignjax.models import attention
from alignjax.models.attention import (
    KeyValues,
    SharedKeys,
    choose,
    flash,
    plain,
    self_attention,
    triton,
)

F32 = np.dtype(np.float32)
BF16 = jnp.dtype(jnp.bfloat16)


class Vectors(NamedTuple):
    """Queries [batch tokens heads head_size], and keys and values [batch tokens kv_heads ...]."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array


def draw_vectors(seed, batch, tokens, heads, kv_heads, head_size):
    """Return random vectors, and a weight for each number of the result."""
    rng = np.random.default_rng(seed)

    def draw(heads):
        numbers = rng.normal(size=(batch, tokens, heads, head_size))
        return jnp.asarray(numbers, jnp.float32)

    vectors = Vectors(draw(heads), draw(kv_heads), draw(kv_heads))
    return vectors, draw(heads)


def packed_segments(tokens):
    """Return three rows: packed with pads behind, pads in front, packed in falling numbers."""
    third = tokens // 3
    rest = tokens - third
    return jnp.array(
        [
            [1] * third + [2] * (rest - 3) + [0] * 3,
            [0] * 5 + [1] * (tokens - 5),
            [7] * third + [4] * rest,
        ]
    )


class Result(NamedTuple):
    """What attention returns, and the gradients of a weighted sum of it."""

    value: jax.Array
    gradients: Vectors


def value_and_gradients(attend, vectors, segments, weights):
    """Return the result at all tokens, pads included."""

    def weighted_sum(vectors):
        value = attend(*vectors, segments)
        return jnp.sum(value * weights), value

    differentiated = jax.value_and_grad(weighted_sum, has_aux=True)
    (_, value), gradients = jax.jit(differentiated)(vectors)
    return Result(value, gradients)


def assert_same(ours, theirs, atol):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def attend_one(query, keys, values):
    """Attend with one query of one head, query[head_size], to keys and values [keys head_size]."""
    scores = keys @ query / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def test_self_attention_is_its_definition_one_query_at_a_time():
    """Grouped keys, packed rows, and pads at both ends."""
    vectors, _ = draw_vectors(0, batch=3, tokens=9, heads=4, kv_heads=2, head_size=8)
    segments = np.asarray(packed_segments(9))
    ours = np.asarray(self_attention(*vectors, jnp.asarray(segments)))
    queries, keys, values = (np.asarray(x, np.float64) for x in vectors)
    for row, token, head in np.ndindex(3, 9, 4):
        visible = [at for at in range(token + 1) if segments[row, at] == segments[row, token]]
        seen_keys = keys[row, visible, head // 2]
        seen_values = values[row, visible, head // 2]
        theirs = attend_one(queries[row, token, head], seen_keys, seen_values)
        assert np.allclose(ours[row, token, head], theirs, atol=2e-6)


def cached(queries, keys, values, mask, sizes):
    """Call `cached_attention` with keys and values [batch kv_heads tokens head_size] in blocks."""
    cuts = np.cumsum(sizes)[:-1]
    blocks = [
        KeyValues(*block)
        for block in zip(
            jnp.split(keys, cuts, axis=2), jnp.split(values, cuts, axis=2), strict=True
        )
    ]
    return attention.cached_attention(queries, blocks, jnp.split(jnp.asarray(mask), cuts, axis=1))


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (2, 1, 1, 3)])
@pytest.mark.parametrize("cache", [F32, BF16])
def test_cached_attention_is_its_definition_whatever_the_blocks(cache, sizes):
    """The first row sees nothing of the last block."""
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(2, 4, 8)).astype(np.float32)
    keys, values = (jnp.asarray(rng.normal(size=(2, 2, 7, 8)), cache) for _ in range(2))
    mask = np.array([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1]], bool)
    ours = cached(jnp.asarray(queries), keys, values, mask, sizes)
    assert ours.dtype == np.float32
    keys = np.asarray(keys, np.float64)
    values = np.asarray(values, np.float64)
    for row, head in np.ndindex(2, 4):
        seen = (row, head // 2, mask[row])
        theirs = attend_one(queries[row, head], keys[seen], values[seen])
        assert np.allclose(ours[row, head], theirs, atol=2e-6)


def test_cached_attention_is_the_last_row_of_self_attention():
    vectors, _ = draw_vectors(2, batch=3, tokens=12, heads=4, kv_heads=2, head_size=8)
    segments = packed_segments(12)
    keys = vectors.keys.swapaxes(1, 2)
    values = vectors.values.swapaxes(1, 2)
    mask = segments == segments[:, -1:]
    ours = cached(vectors.queries[:, -1], keys, values, mask, (5, 4, 3))
    theirs = self_attention(*vectors, segments)[:, -1]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_a_query_that_sees_nothing_has_a_finite_result_and_finite_gradients():
    vectors, weights = draw_vectors(3, batch=2, tokens=6, heads=4, kv_heads=2, head_size=8)
    all_pads = jnp.zeros((2, 6), jnp.int32)

    def from_cache(vectors):
        keys = vectors.keys.swapaxes(1, 2)
        values = vectors.values.swapaxes(1, 2)
        return cached(vectors.queries[:, 0], keys, values, all_pads > 0, (4, 2))

    def self_sum(vectors):
        return jnp.sum(self_attention(*vectors, all_pads) * weights)

    def cached_sum(vectors):
        return jnp.sum(from_cache(vectors) * weights[:, 0])

    for total in (self_sum, cached_sum):
        value, gradients = jax.jit(jax.value_and_grad(total))(vectors)
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in gradients)
    mean = np.repeat(vectors.values.mean(axis=1), 2, axis=1)
    np.testing.assert_allclose(from_cache(vectors), mean, rtol=0, atol=2e-6)


@pytest.mark.parametrize("tokens, loops", [(25, 0), (37, 3)])
def test_parts_and_blocks_give_what_one_piece_gives(tokens, loops, monkeypatch):
    """Blocks of 8: four parts of at most a block, the last short; five blocks, two to a part."""
    vectors, weights = draw_vectors(4, batch=3, tokens=tokens, heads=4, kv_heads=2, head_size=8)
    segments = packed_segments(tokens)
    whole = value_and_gradients(self_attention, vectors, segments, weights)
    monkeypatch.setattr(plain, "WHOLE", 8)
    monkeypatch.setattr(plain, "BLOCK", 8)
    assert str(jax.make_jaxpr(self_attention)(*vectors, segments)).count("scan[") == loops
    assert_same(value_and_gradients(self_attention, vectors, segments, weights), whole, 1e-5)


def test_no_array_is_larger_than_the_scores_of_one_block():
    """The backward pass keeps the scores of no more than one block either."""
    tokens = 2048
    heads = 2
    shapes = jax.eval_shape(functools.partial(draw_vectors, 5, 1, tokens, heads, 1, 8))
    segments = jnp.ones((1, tokens), jnp.int32)

    def weighted_sum(vectors, weights):
        return jnp.sum(self_attention(*vectors, segments) * weights)

    program = str(jax.make_jaxpr(jax.grad(weighted_sum))(*shapes))
    sizes = [
        np.prod([int(size) for size in shape.split(",")])
        for shape in re.findall(r"f32\[([\d,]+)\]", program)
    ]
    assert max(sizes) == heads * plain.BLOCK * tokens


def test_cudnn_is_given_the_mask_and_an_even_length(monkeypatch):
    """Whether cuDNN then computes the right thing takes a GPU to tell."""
    without_kernel = jax.nn.dot_product_attention

    def stand_in(queries, keys, values, mask, implementation):
        assert implementation == "cudnn" and queries.shape[1] == keys.shape[1] == 10
        return without_kernel(queries, keys, values, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    vectors, weights = draw_vectors(9, batch=3, tokens=9, heads=4, kv_heads=2, head_size=8)
    segments = packed_segments(9)
    ours = value_and_gradients(flash.cudnn_attention, vectors, segments, weights)
    assert_same(ours, value_and_gradients(self_attention, vectors, segments, weights), 1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_splash_gives_what_plain_attention_gives(kv_heads):
    """The kernel is interpreted; 200 tokens are no multiple of 128, so pads are added."""
    vectors, weights = draw_vectors(
        6, batch=3, tokens=200, heads=4, kv_heads=kv_heads, head_size=16
    )
    segments = packed_segments(200)
    ours = value_and_gradients(flash.splash_attention, vectors, segments, weights)
    assert_same(ours, value_and_gradients(self_attention, vectors, segments, weights), 1e-4)


@pytest.mark.parametrize("tokens, kv_heads", [(200, 4), (120, 1)])
def test_triton_gives_what_plain_attention_gives(tokens, kv_heads):
    """The kernels are interpreted; rows are padded to 256 and 128, in two blocks or one."""
    vectors, weights = draw_vectors(6, 3, tokens, heads=4, kv_heads=kv_heads, head_size=16)
    segments = packed_segments(tokens)
    ours = value_and_gradients(triton.triton_attention, vectors, segments, weights)
    assert_same(ours, value_and_gradients(self_attention, vectors, segments, weights), 1e-5)


def test_triton_rounds_in_16_bits_as_plain_attention_does():
    """Both are at most 1 % away from float32, of the mean square."""
    vectors, weights = draw_vectors(6, batch=3, tokens=192, heads=4, kv_heads=2, head_size=64)
    segments = packed_segments(192)
    halves = jax.tree.map(lambda x: x.astype(BF16), vectors)
    widened = jax.tree.map(lambda x: x.astype(F32), halves)
    exact = value_and_gradients(self_attention, widened, segments, weights)
    for attend in (triton.triton_attention, self_attention):
        rounded = value_and_gradients(attend, halves, segments, weights)
        for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
            assert a.dtype == BF16
            error = np.square(np.asarray(a, F32) - b).mean() / np.square(b).mean()
            assert error < 0.01**2


@pytest.mark.parametrize("kernels", [flash.splash_attention, triton.triton_attention])
@pytest.mark.parametrize("rows", [4, 3])
def test_kernels_over_a_mesh_give_what_plain_attention_gives(rows, kernels):
    """Three rows do not divide over the four devices, so each device has all of them."""
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    vectors, weights = draw_vectors(7, batch=rows, tokens=128, heads=4, kv_heads=2, head_size=8)
    segments = jnp.tile(packed_segments(128), (2, 1))[:rows]
    alone = value_and_gradients(self_attention, vectors, segments, weights)
    with jax.set_mesh(sharding.make_mesh(Mesh(2, 2, 2))):
        assert attention.shards() == (4, 2)
        # Splash has heads before tokens.
        sizes = "2,128,8" if kernels is flash.splash_attention else "128,2,8"
        shape_on_a_device = f"f32[{1 if rows == 4 else 3},{sizes}]"
        assert shape_on_a_device in str(jax.make_jaxpr(kernels)(*vectors, segments))
        ours = value_and_gradients(kernels, vectors, segments, weights)
    assert_same(ours, alone, 1e-4)


LONG = (8, 1024, 4, 64)  # batch, tokens, heads, head_size


@pytest.mark.parametrize(
    "backend, dtype, shape, kv_heads, shards, name",
    [
        ("cpu", F32, LONG, 2, (1, 1), "xla"),
        ("cpu", BF16, LONG, 2, (4, 2), "xla"),
        ("gpu", BF16, LONG, 2, (1, 1), "triton"),
        ("gpu", BF16, LONG, 2, (4, 2), "triton"),
        ("gpu", BF16, (8, 1024, 4, 80), 2, (4, 2), "cudnn"),
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


def test_rows_that_do_not_divide_do_not_prevent_an_explicit_choice():
    """A batch's last rows must not stop a run."""
    assert choose("splash", "tpu", BF16, LONG, 2, (3, 1)) == "splash"
    assert choose("triton", "gpu", BF16, LONG, 2, (3, 1)) == "triton"
    assert choose("cudnn", "gpu", BF16, LONG, 2, (3, 1)) == "cudnn"


@pytest.mark.parametrize(
    "name, backend, dtype, head_size, tensor, message",
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
        (
            "triton",
            "gpu",
            F32,
            64,
            1,
            "needs a GPU and model.dtype='bfloat16', not gpu and float32",
        ),
        ("triton", "gpu", BF16, 80, 1, "needs model.head_size=80 to be one of 16, 32, 64, 128"),
        ("triton", "gpu", BF16, 64, 4, "needs mesh.tensor=4 to divide model.kv_heads=2"),
        ("splash", "cpu", BF16, 64, 1, "needs a TPU, not cpu"),
        ("splash", "gpu", BF16, 64, 1, "needs a TPU, not gpu"),
        ("splash", "tpu", BF16, 64, 4, "needs mesh.tensor=4 to divide model.kv_heads=2"),
    ],
)
def test_a_choice_that_cannot_run_is_refused(name, backend, dtype, head_size, tensor, message):
    with pytest.raises(UserError, match=f"^model.attention='{name}' {message}$"):
        choose(name, backend, dtype, (8, 1024, 4, head_size), 2, (1, tensor))


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="they are refused where there is neither GPU nor TPU"
)
@pytest.mark.parametrize("name", ["triton", "cudnn", "splash"])
def test_kernels_are_refused_on_a_cpu(name):
    vectors, _ = draw_vectors(8, batch=1, tokens=3, heads=4, kv_heads=2, head_size=8)
    with pytest.raises(UserError, match=f"model.attention='{name}' needs a .PU"):
        self_attention(*vectors, jnp.ones((1, 3), jnp.int32), name)


# Forward and backward for eight v5p chips, through "auto": the mesh says that it has TPUs.
TPU_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from alignjax.machine.sharding import AXES, BATCH
from alignjax.models.attention import self_attention

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5:2x2x2").devices
mesh = Mesh(np.array(devices).reshape(2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)

def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

def heads(count, head_size, dtype):
    return array((4, 256, count, head_size), dtype, *BATCH, None, "tensor")

def total(queries, keys, values, segments):
    y = self_attention(queries, keys, values, segments)
    return jnp.sum(y.astype(jnp.float32) ** 2)

segments = array((4, 256), jnp.int32, *BATCH)
for kv_heads, size, dtype in ((4, 64, jnp.bfloat16), (2, 128, jnp.bfloat16), (4, 64, jnp.float32)):
    keys = heads(kv_heads, size, dtype)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(total, (0, 1, 2)))
        lowered = gradient.lower(heads(4, size, dtype), keys, keys, segments)
        text = lowered.compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    print(len(calls), *(part in "".join(calls) for part in ("mha_fwd", "mha_dq", "mha_dkv")))
"""


def test_splash_compiles_for_a_tpu_that_is_not_here():
    root = Path(__file__).resolve().parent.parent
    compiler = root / ".venv" / "tpu-compiler"  # where run.sh has put it
    if not (compiler / "libtpu").exists():
        pytest.skip("needs libtpu, the TPU compiler, which tests/run.sh installs")
    environment = dict(os.environ)
    # These two are for the tests' CPU devices.
    environment.pop("XLA_FLAGS", None)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": f"{compiler}:{root}",
    }
    command = [sys.executable, "-c", TPU_PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3 True True True"] * 3


@pytest.mark.parametrize("tokens", [40, 200, 530])  # whole, in parts, and in parts of blocks
def test_a_prefix_and_a_second_segment_are_seen(tokens):
    """Against one softmax over all keys.

    A row has a trunk with two branches, grouped queries, and a prefix behind pads.
    """
    batch, heads, kv_heads, head_size = 2, 4, 2, 8
    prefix_tokens = 11
    vectors, _ = draw_vectors(3, batch, tokens, heads, kv_heads, head_size)
    rng = np.random.default_rng(4)
    prefix_shape = (prefix_tokens, kv_heads, head_size)
    prefix_keys, prefix_values = (
        jnp.asarray(rng.normal(size=prefix_shape), jnp.float32) for _ in range(2)
    )
    real = jnp.arange(prefix_tokens) >= 3
    branch = tokens // 4
    trunk = tokens // 2
    own = np.repeat([1, 2, 3, 0], [trunk, branch, tokens - trunk - branch - 2, 2])
    second = np.minimum(own, 1)
    segments = np.broadcast_to(np.stack([own, second], axis=-1), (batch, tokens, 2))

    visible = (own[:, None] == own) | (second[:, None] == own)
    causal = np.tril(np.ones((tokens, tokens), bool))
    prefix_mask = np.broadcast_to(real, (tokens, prefix_tokens))
    mask = np.concatenate([prefix_mask, visible & causal], axis=1)

    def with_prefix(prefix, own):
        prefix = jnp.broadcast_to(prefix, (batch, *prefix_shape))
        return jnp.repeat(jnp.concatenate([prefix, own], axis=1), heads // kv_heads, axis=2)

    keys = with_prefix(prefix_keys, vectors.keys)
    values = with_prefix(prefix_values, vectors.values)
    scores = jnp.einsum("bqnh,bsnh->bnqs", vectors.queries, keys) * head_size**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
    expected = jnp.einsum("bnqs,bsnh->bqnh", weights, values)
    prefix = SharedKeys(prefix_keys, prefix_values, real)
    result = jax.jit(self_attention)(*vectors, jnp.asarray(segments), prefix=prefix)
    np.testing.assert_allclose(result, expected, atol=2e-6)
