"""Token log-probabilities and entropies from hidden states, without all logits at once.

The vocabulary is cut into chunks. The forward pass joins their log-sum-exps, and the backward pass
computes a chunk's logits again, as in Wijmans et al. 2024, "Cut your losses in large-vocabulary
language models", but with XLA's plain products.

In this module `axis` is the kernel's axis of words: 1 for an output kernel [d_model vocab], 0 for
an embedding [vocab d_model]. `words` are rows or columns of the kernel, laid out like it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from alignjax.machine.sharding import BATCH, constrain
from alignjax.models.attention import soft_cap

# Most elements, on a device, of a chunk's logits [tokens width] (64 MiB) and of its part of the
# kernel. If all logits are no more than this, they are one chunk.
ELEMENTS = 2**24
# A chunk's width is a multiple of so many words. Tokens are never cut, however many: [tokens 512]
# is about as large as hidden[tokens d_model] itself. Let n = tokens * vocab / ELEMENTS be the
# number of chunks. Cutting the vocabulary moves hidden n * d_model times (8 n t d bytes in and
# out) and the kernel once; cutting the tokens would move the kernel n times (8 n d v bytes), and
# a device has fewer tokens than words.
WIDTH = 512
LOWEST = jnp.finfo(jnp.float32).min  # log 0, but finite: -inf times 0 is NaN


class LogSumExp(NamedTuple):
    """The log-sum-exp `high + low` over some words, and the entropy of their softmax.

    In one float32 a log-sum-exp of 1000 would be known to 6e-5 only, and so would probabilities.
    The gradient of the log-sum-exp is that of `low`.
    """

    high: Float[Array, "*parts tokens"]
    low: Float[Array, "*parts tokens"]
    entropy: Float[Array, "*parts tokens"]


class PartResult(NamedTuple):
    """What one part of the vocabulary says about each token."""

    sums: LogSumExp
    target_logits: Float[Array, " tokens"]  # LOWEST where the target is a word of another part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Residuals:
    """What the backward pass needs. `logits` is None unless one chunk holds all of them."""

    hidden: Float[Array, "tokens d_model"]
    kernel: Float[Array, "_ _"]
    targets: Int[Array, " tokens"]
    temperature: float | Float[Array, ""]
    sums: LogSumExp
    logits: Float[Array, "tokens words"] | None


class Chunks(NamedTuple):
    """How the words of a device are cut: `count` chunks of `width` words, then `rest` words."""

    count: int
    width: int
    rest: int


def token_logprobs(
    hidden: Float[Array, "*rows d_model"],
    kernel: Float[Array, "_ _"],
    targets: Int[Array, "*rows"],
    temperature: float | Float[Array, ""] = 1.0,
    tied: bool = False,
    cap: float = 0.0,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Return the targets' log-probabilities and the distributions' entropies, in nats.

    The distribution is softmax(z / temperature), where z is hidden @ kernel or, with a `cap` above
    0, cap * tanh(hidden @ kernel / cap). `kernel` is [d_model vocab], or the embedding [vocab
    d_model] if it is tied. Both results are float32, from logits that are summed and used in
    float32. Gradients go to hidden and kernel, in their types, and not to the temperature.
    """
    flat_hidden = constrain(hidden.reshape(-1, hidden.shape[-1]))
    flat_targets = targets.reshape(-1)
    axis = 0 if tied else 1
    vocab = kernel.shape[axis]
    parts = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    # If the axis does not divide the vocabulary, `sharding.param_shardings` has dropped it.
    if parts == 1 or vocab % parts:
        result = read_part(axis, cap, flat_hidden, kernel, flat_targets, temperature)
    else:
        result = read_shards(axis, cap, parts, flat_hidden, kernel, flat_targets, temperature)
    logprobs = result.target_logits - result.sums.high - result.sums.low
    # At most 0 except for rounding: exp(0) is not always exactly 1, and XLA may fuse a division
    # into a subtraction.
    logprobs -= jax.lax.stop_gradient(jnp.maximum(logprobs, 0.0))
    return logprobs.reshape(targets.shape), result.sums.entropy.reshape(targets.shape)


def read_shards(
    axis: int,
    cap: float,
    parts: int,
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "_ _"],
    targets: Int[Array, " tokens"],
    temperature: float | Float[Array, ""],
) -> PartResult:
    """Read a vocabulary that lies over the mesh's tensor axis, each shard its own words.

    GSPMD would gather a chunk that is cut out of the whole vocabulary.
    """
    words = kernel.shape[axis] // parts
    split = (*kernel.shape[:axis], parts, words, *kernel.shape[axis + 1 :])
    kernels = jnp.moveaxis(kernel.reshape(split), axis, 0)
    read = functools.partial(read_part, axis, cap)
    read_each = jax.vmap(read, (None, 0, 0, None), spmd_axis_name="tensor")
    shard_targets = targets - jnp.arange(parts)[:, None] * words
    results = read_each(hidden, kernels, shard_targets, temperature)
    return PartResult(join(results.sums), results.target_logits.max(0))


def join(parts: LogSumExp) -> LogSumExp:
    """Join log-sum-exps and entropies of parts, [parts tokens], to those of all words, [tokens].

    The entropy is the sum of w (H - log w), where w is a part's probability and H its entropy.
    """
    high = jax.lax.stop_gradient(parts.high.max(0))
    log_weights = parts.high - high + parts.low
    low = jax.nn.logsumexp(log_weights, axis=0)
    log_weights -= low
    entropy = (jnp.exp(log_weights) * (parts.entropy - log_weights)).sum(0)
    return LogSumExp(high, low, entropy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def read_part(
    axis: int,
    cap: float,
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "_ _"],
    targets: Int[Array, " tokens"],
    temperature: float | Float[Array, ""],
) -> PartResult:
    """Read the logits of one part of the vocabulary, chunk by chunk.

    A target is the number of a word in this part; outside of it, its logit is LOWEST.
    """
    return forward(axis, cap, hidden, kernel, targets, temperature)[0]


def forward(
    axis: int,
    cap: float,
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "_ _"],
    targets: Int[Array, " tokens"],
    temperature: float | Float[Array, ""],
) -> tuple[PartResult, Residuals]:
    """Run the forward pass of `read_part`."""

    def step(running, start, width):
        words = kernel_words(axis, hidden, kernel, start, width)
        logits = soft_cap(product(hidden, words, 1, 1 - axis), cap) / temperature
        sums = jax.tree.map(stack_two, running.sums, log_sum_exp(logits))
        places = jnp.clip(targets - start, 0, width - 1)[:, None]
        chunk_logits = jnp.take_along_axis(logits, places, axis=1)[:, 0]
        inside = (targets >= start) & (targets < start + width)
        target_logits = jnp.where(inside, chunk_logits, running.target_logits)
        return PartResult(join(sums), target_logits), logits

    lowest = jnp.full(len(hidden), LOWEST)
    zero = jnp.zeros(len(hidden))
    empty = PartResult(LogSumExp(lowest, zero, zero), lowest)
    result, logits = over_chunks(chunks_of(axis, hidden, kernel), step, empty)
    residuals = Residuals(
        hidden=hidden,
        kernel=kernel,
        targets=targets,
        temperature=temperature,
        sums=result.sums,
        logits=logits,
    )
    return result, residuals


def log_sum_exp(logits: Float[Array, "tokens width"]) -> LogSumExp:
    """Return the log-sum-exp and the entropy of a chunk.

    The form is for XLA's CPU backend. Sums over [tokens width] are 8 times as fast as over a third
    axis of size 1. They make no array as long as each subtracts for itself: XLA would store a
    `logits - top` that two sums share.
    """
    top = logits.max(1)
    low = jnp.log(jnp.exp(logits - top[:, None]).sum(1))
    high = top + low
    low -= high - top
    logprobs = logits - high[:, None] - low[:, None]
    return LogSumExp(high, low, -(jnp.exp(logprobs) * logprobs).sum(1))


def stack_two(first: Array, second: Array) -> Array:
    """Stack two arrays along a new first axis."""
    return jnp.stack([first, second])


def backward(
    axis: int, cap: float, residuals: Residuals, gradients: PartResult
) -> tuple[Float[Array, "tokens d_model"], Float[Array, "_ _"], None, None]:
    """Run the backward pass of `read_part`.

    With p = exp(logprob) and the entropy H, d log-sum-exp / d logit = p and
    d H / d logit = -p (logprob + H).
    """
    hidden = residuals.hidden
    kernel = residuals.kernel
    targets = residuals.targets[:, None]
    sums = jax.tree.map(as_column, residuals.sums)
    d_low = as_column(gradients.sums.low)
    d_entropy = as_column(gradients.sums.entropy)
    d_target = as_column(gradients.target_logits)

    def step(totals, start, width):
        d_hidden, d_kernel = totals
        words = kernel_words(axis, hidden, kernel, start, width)
        logits = residuals.logits
        if logits is None:
            raw = product(hidden, words, 1, 1 - axis)
            logits = soft_cap(raw, cap) / residuals.temperature
        logprobs = logits - sums.high - sums.low
        d_logits = jnp.exp(logprobs) * (d_low - d_entropy * (logprobs + sums.entropy))
        d_logits += jnp.where(targets - start == jnp.arange(width), d_target, 0.0)
        if cap:  # the derivative of the hyperbolic tangent, from its value
            d_logits *= 1 - jnp.square(logits * residuals.temperature / cap)
        d_logits = (d_logits / residuals.temperature).astype(hidden.dtype)
        d_words = product(hidden, d_logits, 0, 0) if axis else product(d_logits, hidden, 0, 0)
        d_words = place(d_words.astype(kernel.dtype), axis)
        d_kernel = jax.lax.dynamic_update_slice_in_dim(d_kernel, d_words, start, axis)
        return (d_hidden + product(d_logits, words, 1, axis), d_kernel), None

    zeros = (jnp.zeros(hidden.shape), jnp.zeros_like(kernel))
    (d_hidden, d_kernel), _ = over_chunks(chunks_of(axis, hidden, kernel), step, zeros)
    # One for each argument: hidden, kernel, targets, temperature.
    cotangents = (d_hidden.astype(hidden.dtype), d_kernel, None, None)
    return cotangents


def as_column(x: Float[Array, " tokens"]) -> Float[Array, "tokens 1"]:
    """Return one number a token as a column, to combine with [tokens words]."""
    return x[:, None]


read_part.defvjp(forward, backward)


def chunks_of(axis: int, hidden: Float[Array, "tokens d_model"], kernel: Array) -> Chunks:
    """Return how to cut a part's words so that a device's chunks stay within ELEMENTS."""
    tokens, d_model = hidden.shape
    words = kernel.shape[axis]
    mesh = jax.sharding.get_abstract_mesh().shape
    row_shards = math.prod(mesh.get(name, 1) for name in BATCH[0])
    if tokens % row_shards == 0:
        tokens = tokens // row_shards  # the tokens of one device
    width = max(1, ELEMENTS // max(tokens, d_model) // WIDTH) * WIDTH
    count = 0 if tokens * words <= ELEMENTS else (words - 1) // width
    return Chunks(count=count, width=width, rest=words - count * width)


def over_chunks(
    chunks: Chunks, step: Callable[[Any, Any, int], tuple[Any, Any]], carry: Any
) -> tuple[Any, Any]:
    """Run `carry, kept = step(carry, start, width)` over all chunks.

    Returns the last carry, and what the step keeps if there is only one chunk, else None.
    """
    if chunks.count:

        def scan_step(carry, number):
            return step(carry, number * chunks.width, chunks.width)[0], None

        carry, _ = jax.lax.scan(scan_step, carry, jnp.arange(chunks.count))
    carry, kept = step(carry, chunks.count * chunks.width, chunks.rest)
    return carry, None if chunks.count else kept


def kernel_words(
    axis: int,
    hidden: Float[Array, "tokens d_model"],
    kernel: Float[Array, "_ _"],
    start: int | Int[Array, ""],
    width: int,
) -> Float[Array, "_ _"]:
    """Return a chunk's words in the type of `hidden`, whole along d_model, for the products."""
    words = place(jax.lax.dynamic_slice_in_dim(kernel, start, width, axis), axis)
    # Placed twice: otherwise GSPMD gathers the whole kernel and cuts that.
    return place(words.astype(hidden.dtype))


def product(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], a_axis: int, b_axis: int
) -> Float[Array, "_ _"]:
    """Multiply two matrices over one axis of each, in float32."""
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def place(words: Float[Array, "_ _"], axis: int | None = None) -> Float[Array, "_ _"]:
    """Constrain words of a kernel to lie whole, or, given `axis`, as the kernel does.

    A kernel's d_model axis lies over the mesh's fsdp axis where that divides it.
    """
    mesh = jax.sharding.get_abstract_mesh().shape
    if "fsdp" not in mesh:
        return words
    spec = [None, None]
    if axis is not None and words.shape[1 - axis] % mesh["fsdp"] == 0:
        spec[1 - axis] = "fsdp"
    return jax.lax.with_sharding_constraint(words, P(*spec))
