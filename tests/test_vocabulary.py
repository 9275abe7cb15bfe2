"""Log-probabilities and entropies without all the logits: the dense figures and gradients, on any mesh, in less memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax import config as configs
from alignjax.machine import sharding
from alignjax.models import vocabulary
from alignjax.models.vocabulary import token_logprobs

B, T, D = 4, 6, 16
TOKENS = B * T


def dense(hidden, kernel, targets, temperature=1.0, tied=False):
    """The plain formulas, with all the logits."""
    z = hidden.astype(jnp.float32) @ (kernel.T if tied else kernel) / temperature
    logp = jax.nn.log_softmax(z)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], -(jnp.exp(logp) * logp).sum(
        -1
    )


def arrays(v, scale=1.0, tied=False):
    """hidden[b t d], kernel[d v] or [v d], targets[b t], and weights[b t] of log-probabilities and entropies."""
    rng = np.random.default_rng(0)
    hidden, kernel = scale * rng.normal(size=(B, T, D)), rng.normal(size=(D, v)) * D**-0.5
    weights = rng.normal(size=(2, B, T))
    kernel = kernel.T if tied else kernel
    return (
        *(x.astype(np.float32) for x in (hidden, kernel)),
        rng.integers(0, v, (B, T)),
        *weights.astype(np.float32),
    )


def gradients(read, temperature=1.0, tied=False):
    """jitted (hidden, kernel, targets, weights, weights) -> (d hidden, d kernel), (log-probabilities, entropies)."""

    def total(hidden, kernel, targets, of_logprob, of_entropy):
        logprob, entropy = read(hidden, kernel, targets, temperature, tied)
        return jnp.sum(of_logprob * logprob) + jnp.sum(of_entropy * entropy), (logprob, entropy)

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))


@functools.cache
def expected(*settings):
    return gradients(dense, *settings)


def cut(monkeypatch, width, tokens=TOKENS):
    """Chunks of `width` words for so many tokens on a device."""
    monkeypatch.setattr(vocabulary, "WIDTH", 1)
    monkeypatch.setattr(vocabulary, "ELEMENTS", width * max(tokens, D))


def same(ours, theirs, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("v, width", [(64, 16), (67, 1000), (67, 16), (67, 66), (101, 1)])
def test_any_chunks_are_dense_in_value_and_gradient(v, width, tied, monkeypatch):
    inputs = arrays(v, tied=tied)
    cut(monkeypatch, width)
    same(gradients(token_logprobs, 0.7, tied)(*inputs), expected(0.7, tied)(*inputs))


@pytest.mark.parametrize("output", [0, 1])
def test_each_output_has_its_own_gradient(output, monkeypatch):
    inputs = list(arrays(67))
    inputs[4 - output] = np.zeros((B, T), np.float32)
    cut(monkeypatch, 20)
    same(gradients(token_logprobs)(*inputs), expected()(*inputs))


@pytest.mark.parametrize("width", [1000, 20])
def test_sure_of_itself(width, monkeypatch):
    """Log-probabilities from 0 down to -1000: none above 0, no entropy below 0, and the gradients still right."""
    hidden, kernel, targets, *weights = arrays(67, scale=150.0)
    z = hidden @ kernel
    targets[:2] = z[:2].argmax(-1)
    targets[2, 0] = z[2, 0].argmin()
    cut(monkeypatch, width)
    for temperature in (1.0, 0.7):
        ours = gradients(token_logprobs, temperature)(hidden, kernel, targets, *weights)
        same(ours, expected(temperature)(hidden, kernel, targets, *weights), 2e-3)
        logprob, entropy = ours[1]
        assert logprob.max() <= 0 and logprob.max() > -1e-3 and logprob.min() < -700
        assert entropy.min() > -1e-6


def test_the_temperature_may_be_traced_and_has_no_gradient():
    hidden, kernel, targets, *_ = arrays(67)
    total = lambda temperature: token_logprobs(hidden, kernel, targets, temperature)[0].sum()
    value, gradient = jax.jit(jax.value_and_grad(total))(0.7)
    assert gradient == 0 and value == pytest.approx(
        float(dense(hidden, kernel, targets, 0.7)[0].sum()), rel=1e-5
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [1000, 20])
def test_bfloat16_is_near_float32(width, tied, monkeypatch):
    hidden, kernel, *rest = arrays(67, tied=tied)
    cut(monkeypatch, width)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    for kept in (jnp.float32, jnp.bfloat16):
        (dx, dk), outputs = gradients(token_logprobs, 1.0, tied)(hidden, kernel.astype(kept), *rest)
        assert [x.dtype for x in (dx, dk, *outputs)] == [
            jnp.bfloat16,
            kept,
            jnp.float32,
            jnp.float32,
        ]
        (exact_dx, exact_dk), exact = expected(1.0, tied)(hidden.astype(jnp.float32), kernel, *rest)
        same(outputs, exact, 0.02)
        same((dx.astype(jnp.float32), dk.astype(jnp.float32)), (exact_dx, exact_dk), 0.05)


def elements(line) -> int:
    """Of the largest array in the text of a compiled program."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]*)\]", line)
    return max((math.prod(int(n) for n in shape.split(",") if n) for shape in shapes), default=0)


def largest(compiled) -> int:
    return elements(compiled.as_text())


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "v, width", [(152, 1000), (152, 20), (101, 20)]
)  # 101 is over no tensor axis
def test_any_mesh_gives_one_device_and_gathers_a_chunk_at_most(v, width, tied, monkeypatch):
    inputs = arrays(v, tied=tied)
    wanted = expected(0.7, tied)(*inputs)
    mesh = sharding.make_mesh(configs.Mesh(data=2, fsdp=2, tensor=2))
    tensor = "tensor" if v % 2 == 0 else None
    rows, kernel = P(("data", "fsdp")), P(tensor, "fsdp") if tied else P("fsdp", tensor)
    specs = (rows, kernel, rows, rows, rows)
    cut(monkeypatch, width, TOKENS // 4)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(inputs, specs, strict=True)
        ]
        compiled = gradients(token_logprobs, 0.7, tied).lower(*placed).compile()
        outputs = compiled(*placed)
    same(outputs, wanted)
    (dx, dk), _ = outputs
    assert dk.sharding.is_equivalent_to(NamedSharding(mesh, kernel), 2) and dx.sharding.spec[0] == (
        "data",
        "fsdp",
    )
    moves = [
        line.split(", metadata")[0]
        for line in compiled.as_text().splitlines()
        if " all-gather" in line
    ]
    words = v // 2 if tensor else v  # of a device
    assert moves and max(map(elements, moves)) == D * min(
        width, words
    )  # over fsdp alone, where all words are one chunk


def compiled_for(tokens, d, v, dtype=jnp.float32):
    shape = jax.ShapeDtypeStruct
    weights = shape((tokens,), jnp.float32)
    inputs = (
        shape((tokens, d), dtype),
        shape((d, v), jnp.float32),
        shape((tokens,), jnp.int32),
        weights,
        weights,
    )
    return gradients(token_logprobs).lower(*inputs).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_array_of_tokens_times_vocabulary(dtype, monkeypatch):
    tokens, d, v = 512, 64, 151936
    monkeypatch.setattr(vocabulary, "ELEMENTS", 2**20)
    compiled = compiled_for(tokens, d, v, dtype)
    assert largest(compiled) == d * v  # the kernel and its gradient
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * v * 4 / 16
    few = compiled_for(32, d, 256)
    assert largest(few) == max(d, 32) * 256  # and where the logits are few, they are one chunk


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    """Beyond the kernel and its gradient, which are no temporary arrays."""
    monkeypatch.setattr(vocabulary, "ELEMENTS", 2**20)
    single, double = (compiled_for(512, 64, v).memory_analysis() for v in (2**16, 2**17))
    assert double.temp_size_in_bytes <= 1.01 * single.temp_size_in_bytes
    assert double.output_size_in_bytes > 1.9 * single.output_size_in_bytes


def test_many_tokens_have_narrow_chunks_but_not_too_narrow(monkeypatch):
    monkeypatch.setattr(vocabulary, "ELEMENTS", 64)
    monkeypatch.setattr(vocabulary, "WIDTH", 8)
    inputs = arrays(67)
    same(gradients(token_logprobs)(*inputs), expected()(*inputs))
    compiled = jax.jit(token_logprobs).lower(*inputs[:3]).compile()
    assert f"[{TOKENS},8]" in compiled.as_text() and f"[{TOKENS},67]" not in compiled.as_text()
