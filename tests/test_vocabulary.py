"""Log-probabilities and entropies in chunks: as dense ones, on any mesh, and in less memory."""

import functools
import math
import re
from typing import NamedTuple

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

BATCH, TOKENS, WIDTH = 4, 6, 16  # WIDTH is that of the hidden states
ALL_TOKENS = BATCH * TOKENS


def dense_logprobs(hidden, kernel, targets, temperature=1.0, tied=False):
    """Apply the plain formulas, with all logits at once."""
    logits = hidden.astype(jnp.float32) @ (kernel.T if tied else kernel) / temperature
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    return chosen, -(jnp.exp(logprobs) * logprobs).sum(-1)


class Inputs(NamedTuple):
    hidden: np.ndarray  # [batch tokens width]
    kernel: np.ndarray  # [width vocab], or [vocab width] if it is tied
    targets: np.ndarray  # [batch tokens]


def draw_inputs(vocab, scale=1.0, tied=False):
    """Return inputs, and weights [2 batch tokens] of the log-probabilities and the entropies."""
    rng = np.random.default_rng(0)
    hidden = scale * rng.normal(size=(BATCH, TOKENS, WIDTH))
    kernel = rng.normal(size=(WIDTH, vocab)) * WIDTH**-0.5
    weights = rng.normal(size=(2, BATCH, TOKENS)).astype(np.float32)
    targets = rng.integers(0, vocab, (BATCH, TOKENS))
    if tied:
        kernel = kernel.T
    return Inputs(hidden.astype(np.float32), kernel.astype(np.float32), targets), weights


def gradients(read, temperature=1.0, tied=False):
    """Return a function of inputs and weights: (d hidden, d kernel), (logprobs, entropies)."""

    def weighted_sum(hidden, kernel, targets, weights):
        logprobs, entropies = read(hidden, kernel, targets, temperature, tied)
        total = jnp.sum(weights[0] * logprobs) + jnp.sum(weights[1] * entropies)
        return total, (logprobs, entropies)

    return jax.jit(jax.grad(weighted_sum, (0, 1), has_aux=True))


@functools.cache
def expected(*settings):
    return gradients(dense_logprobs, *settings)


def cut_into_chunks(monkeypatch, words, tokens=ALL_TOKENS):
    """Make chunks of so many words, where a device has so many tokens."""
    monkeypatch.setattr(vocabulary, "WIDTH", 1)
    monkeypatch.setattr(vocabulary, "ELEMENTS", words * max(tokens, WIDTH))


def assert_same(ours, theirs, tolerance=2e-5):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(check, ours, theirs)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab, words", [(64, 16), (67, 1000), (67, 16), (67, 66), (101, 1)])
def test_any_chunks_give_dense_values_and_gradients(vocab, words, tied, monkeypatch):
    inputs, weights = draw_inputs(vocab, tied=tied)
    cut_into_chunks(monkeypatch, words)
    ours = gradients(token_logprobs, 0.7, tied)(*inputs, weights)
    assert_same(ours, expected(0.7, tied)(*inputs, weights))


@pytest.mark.parametrize("output", [0, 1])  # log-probabilities, entropies
def test_each_output_has_its_own_gradient(output, monkeypatch):
    inputs, weights = draw_inputs(67)
    weights[1 - output] = 0
    cut_into_chunks(monkeypatch, 20)
    ours = gradients(token_logprobs)(*inputs, weights)
    assert_same(ours, expected()(*inputs, weights))


@pytest.mark.parametrize("words", [1000, 20])
def test_extreme_logits_give_no_positive_logprob_and_right_gradients(words, monkeypatch):
    """Log-probabilities from 0 down to -1000; no entropy is below 0."""
    inputs, weights = draw_inputs(67, scale=150.0)
    logits = inputs.hidden @ inputs.kernel
    inputs.targets[:2] = logits[:2].argmax(-1)
    inputs.targets[2, 0] = logits[2, 0].argmin()
    cut_into_chunks(monkeypatch, words)
    for temperature in (1.0, 0.7):
        ours = gradients(token_logprobs, temperature)(*inputs, weights)
        assert_same(ours, expected(temperature)(*inputs, weights), 2e-3)
        logprobs, entropies = ours[1]
        assert logprobs.max() <= 0 and logprobs.max() > -1e-3 and logprobs.min() < -700
        assert entropies.min() > -1e-6


def test_the_temperature_may_be_traced_and_has_no_gradient():
    inputs, _ = draw_inputs(67)

    def total(temperature):
        return token_logprobs(*inputs, temperature)[0].sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(0.7)
    dense, _ = dense_logprobs(*inputs, 0.7)
    assert gradient == 0 and value == pytest.approx(float(dense.sum()), rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("words", [1000, 20])
def test_bfloat16_is_near_float32(words, tied, monkeypatch):
    inputs, weights = draw_inputs(67, tied=tied)
    cut_into_chunks(monkeypatch, words)
    hidden = jnp.asarray(inputs.hidden, jnp.bfloat16)
    rounded = inputs._replace(hidden=hidden.astype(jnp.float32))
    exact_gradients, exact_outputs = expected(1.0, tied)(*rounded, weights)
    for kernel_type in (jnp.float32, jnp.bfloat16):
        kernel = inputs.kernel.astype(kernel_type)
        half = inputs._replace(hidden=hidden, kernel=kernel)
        read = gradients(token_logprobs, 1.0, tied)
        (d_hidden, d_kernel), outputs = read(*half, weights)
        assert [d_hidden.dtype, d_kernel.dtype] == [jnp.bfloat16, kernel_type]
        assert [x.dtype for x in outputs] == [jnp.float32, jnp.float32]
        assert_same(outputs, exact_outputs, 0.02)
        ours = (d_hidden.astype(jnp.float32), d_kernel.astype(jnp.float32))
        assert_same(ours, exact_gradients, 0.05)


def largest_array(text) -> int:
    """Return the elements of the largest array in the text of a compiled program."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]*)\]", text)
    sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    return max(sizes, default=0)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
@pytest.mark.parametrize("tied", [False, True])
# 101 words do not divide over the tensor axis.
@pytest.mark.parametrize("vocab, words", [(152, 1000), (152, 20), (101, 20)])
def test_a_mesh_gives_what_one_device_gives_and_gathers_at_most_a_chunk(
    vocab, words, tied, monkeypatch
):
    inputs, weights = draw_inputs(vocab, tied=tied)
    wanted = expected(0.7, tied)(*inputs, weights)
    mesh = sharding.make_mesh(configs.Mesh(data=2, fsdp=2, tensor=2))
    tensor = "tensor" if vocab % 2 == 0 else None
    rows = ("data", "fsdp")
    kernel_spec = P(tensor, "fsdp") if tied else P("fsdp", tensor)
    specs = (P(rows), kernel_spec, P(rows), P(None, rows))
    cut_into_chunks(monkeypatch, words, ALL_TOKENS // 4)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((*inputs, weights), specs, strict=True)
        ]
        compiled = gradients(token_logprobs, 0.7, tied).lower(*placed).compile()
        outputs = compiled(*placed)
    assert_same(outputs, wanted)
    (d_hidden, d_kernel), _ = outputs
    assert d_kernel.sharding.is_equivalent_to(NamedSharding(mesh, kernel_spec), 2)
    assert d_hidden.sharding.spec[0] == ("data", "fsdp")
    gathers = [
        line.split(", metadata")[0]
        for line in compiled.as_text().splitlines()
        if " all-gather" in line
    ]
    device_words = vocab // 2 if tensor else vocab
    # Over fsdp alone, where all words are one chunk.
    assert gathers
    assert max(map(largest_array, gathers)) == WIDTH * min(words, device_words)


def compiled_for(tokens, width, vocab, dtype=jnp.float32):
    hidden = jax.ShapeDtypeStruct((tokens, width), dtype)
    kernel = jax.ShapeDtypeStruct((width, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, tokens), jnp.float32)
    return gradients(token_logprobs).lower(hidden, kernel, targets, weights).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_array_has_tokens_times_vocabulary(dtype, monkeypatch):
    tokens, width, vocab = 512, 64, 151936
    monkeypatch.setattr(vocabulary, "ELEMENTS", 2**20)
    compiled = compiled_for(tokens, width, vocab, dtype)
    assert largest_array(compiled.as_text()) == width * vocab  # the kernel and its gradient
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 16
    few = compiled_for(32, width, 256)  # whose logits are few, and one chunk
    assert largest_array(few.as_text()) == max(width, 32) * 256


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    """Except for the kernel and its gradient, which are no temporary arrays."""
    monkeypatch.setattr(vocabulary, "ELEMENTS", 2**20)
    single, double = (compiled_for(512, 64, v).memory_analysis() for v in (2**16, 2**17))
    assert double.temp_size_in_bytes <= 1.01 * single.temp_size_in_bytes
    assert double.output_size_in_bytes > 1.9 * single.output_size_in_bytes


def test_many_tokens_have_narrow_chunks_down_to_a_limit(monkeypatch):
    monkeypatch.setattr(vocabulary, "ELEMENTS", 64)
    monkeypatch.setattr(vocabulary, "WIDTH", 8)
    inputs, weights = draw_inputs(67)
    ours = gradients(token_logprobs)(*inputs, weights)
    assert_same(ours, expected()(*inputs, weights))
    text = jax.jit(token_logprobs).lower(*inputs).compile().as_text()
    assert f"[{ALL_TOKENS},8]" in text and f"[{ALL_TOKENS},67]" not in text
