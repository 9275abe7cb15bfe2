"""Token log-probabilities and entropies from hidden states and the output kernel, without logits of all the words.

The vocabulary is cut into chunks: the forward joins their log-sum-exps, the backward makes a chunk's logits again, as in
Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", but with XLA's plain products.
Letters: t tokens, d model, v vocabulary, s the words of v that a tensor shard has, w those of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from alignjax.machine.sharding import BATCH, constrain

# One chunk's logits [t w] on a device (64 MiB), and its part of the kernel. All logits at once where they are no more.
ELEMENTS = 2**24
# Chunks have a multiple of this many words. Tokens are never cut, however many: [t 512] is about the size of hidden[t d]
# itself. With n = t v / ELEMENTS chunks, to cut the vocabulary moves n times d hidden (8 n t d bytes in and out) and
# d kernel once; to cut the tokens would move n times d kernel (8 n d v bytes), and a device has fewer tokens than words.
WIDTH = 512
LOWEST = jnp.finfo(jnp.float32).min  # log 0, but finite: -inf times 0 is NaN


def token_logprobs(hidden, kernel, targets, temperature=1.0, tied=False):
    """log p(targets[...] | hidden[... d]) and the entropy of p = softmax(hidden @ kernel / temperature), in nats.

    kernel[d v], or the embedding [v d] where tied. Both results are [...] float32, from logits that are summed and used
    in float32. Gradients go to hidden and kernel, in their types; none goes to the temperature.
    """
    x, y = constrain(hidden.reshape(-1, hidden.shape[-1])), targets.reshape(-1)
    axis = 0 if tied else 1
    v, m = kernel.shape[axis], jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if (
        m == 1 or v % m
    ):  # one part: where m does not divide v, sharding.param_shardings has dropped the axis
        high, low, entropy, target = part(axis, x, kernel, y, temperature)
    else:
        # A chunk cut out of v would be gathered. Each shard goes through its own words instead: [m d s] or [m s d].
        parts = jnp.moveaxis(
            kernel.reshape(*kernel.shape[:axis], m, v // m, *kernel.shape[axis + 1 :]), axis, 0
        )
        each_shard = jax.vmap(
            functools.partial(part, axis), (None, 0, 0, None), spmd_axis_name="tensor"
        )
        *sums, targets_found = each_shard(
            x, parts, y - jnp.arange(m)[:, None] * (v // m), temperature
        )
        (high, low, entropy), target = join(*sums), targets_found.max(0)
    logprob = target - high - low
    # No more than 0 but for rounding: exp(0) is not always quite 1, and XLA may fuse a division into a subtraction.
    logprob -= jax.lax.stop_gradient(jnp.maximum(logprob, 0.0))
    return logprob.reshape(targets.shape), entropy.reshape(targets.shape)


def join(highs, lows, entropies):
    """Log-sum-exps (high + low) and entropies of parts of the vocabulary, [parts t] each -> of all of it, [t] each.

    The entropy is the sum of w (H - log w), w a part's probability. In one float32 a log-sum-exp of 1000 would be known
    to 6e-5, and so would p.
    """
    high = jax.lax.stop_gradient(highs.max(0))
    log = highs - high + lows
    low = jax.nn.logsumexp(log, axis=0)
    log -= low
    return high, low, (jnp.exp(log) * (entropies - log)).sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def part(axis, x, kernel, y, temperature):
    """Of the logits of x[t d] over a kernel with s words along `axis`: high, low, entropy, and the logit of word y[t].

    Each [t] float32; the last is LOWEST where y is not in [0 s). The log-sum-exp is high + low, its gradient low's.
    """
    return forward(axis, x, kernel, y, temperature)[0]


def forward(axis, x, kernel, y, temperature):
    def step(running, start, width):
        *sums, target = running
        z = product(x, block(axis, x, kernel, start, width), 1, 1 - axis) / temperature
        # For XLA's CPU backend: sums over [t w] are 8 times as fast as over a third axis of 1, and they make no array
        # where each subtracts for itself; two that share z - top would have it stored.
        top = z.max(1)
        low = jnp.log(jnp.exp(z - top[:, None]).sum(1))
        high = top + low
        low -= high - top
        log = z - high[:, None] - low[:, None]
        sums = [
            jnp.stack(both)
            for both in zip(sums, (high, low, -(jnp.exp(log) * log).sum(1)), strict=True)
        ]
        found = jnp.take_along_axis(z, jnp.clip(y - start, 0, width - 1)[:, None], axis=1)[:, 0]
        return (*join(*sums), jnp.where((y >= start) & (y < start + width), found, target)), z

    lowest, zero = jnp.full(len(x), LOWEST), jnp.zeros(len(x))
    results, z = chunks(axis, x, kernel, step, (lowest, zero, zero, lowest))
    return results, (x, kernel, y, temperature, *results[:3], z)


def backward(axis, residuals, gradients):
    """d x and d kernel. With p = exp(log) and entropy H: d log-sum-exp / d z = p, and d H / d z = -p (log p + H)."""
    x, kernel, y, temperature, *sums, kept = residuals
    high, low, entropy, _, d_low, d_entropy, d_target = (a[:, None] for a in (*sums, *gradients))

    def step(sums, start, width):
        dx, dkernel = sums
        words = block(axis, x, kernel, start, width)
        log = (product(x, words, 1, 1 - axis) / temperature if kept is None else kept) - high - low
        dz = jnp.exp(log) * (d_low - d_entropy * (log + entropy))
        dz += jnp.where(y[:, None] - start == jnp.arange(width), d_target, 0.0)
        dz = (dz / temperature).astype(x.dtype)
        dwords = (product(x, dz, 0, 0) if axis else product(dz, x, 0, 0)).astype(kernel.dtype)
        dkernel = jax.lax.dynamic_update_slice_in_dim(dkernel, place(dwords, axis), start, axis)
        return (dx + product(dz, words, 1, axis), dkernel), None

    (dx, dkernel), _ = chunks(axis, x, kernel, step, (jnp.zeros(x.shape), jnp.zeros_like(kernel)))
    return dx.astype(x.dtype), dkernel, None, None


part.defvjp(forward, backward)


def chunks(axis, x, kernel, step, carry):
    """carry, kept = step(carry, start, width) over the chunks, the last with the words left; kept, if it is the only."""
    (t, d), s, mesh = x.shape, kernel.shape[axis], jax.sharding.get_abstract_mesh().shape
    rows = math.prod(mesh.get(a, 1) for a in BATCH[0])
    t = t if t % rows else t // rows  # of one device
    w = max(1, ELEMENTS // max(t, d) // WIDTH) * WIDTH
    n = 0 if t * s <= ELEMENTS else (s - 1) // w
    if n:
        carry, _ = jax.lax.scan(
            lambda carry, i: (step(carry, i * w, w)[0], None), carry, jnp.arange(n)
        )
    carry, kept = step(carry, n * w, s - n * w)
    return carry, None if n else kept


def block(axis, x, kernel, start, width):
    """Words of the kernel in x's type, whole along d, for the products of a chunk."""
    words = place(jax.lax.dynamic_slice_in_dim(kernel, start, width, axis), axis)
    return place(
        words.astype(x.dtype)
    )  # placed twice, or GSPMD gathers the whole kernel and cuts that


def product(a, b, i, j):
    """The product of two matrices over axis i of a and j of b, in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def place(words, axis=None):
    """Words of a kernel, along `axis`, with d over the mesh's fsdp where that divides, as the kernel has it; or whole."""
    mesh = jax.sharding.get_abstract_mesh().shape
    if "fsdp" not in mesh:
        return words
    spec = [None, None]
    if axis is not None and words.shape[1 - axis] % mesh["fsdp"] == 0:
        spec[1 - axis] = "fsdp"
    return jax.lax.with_sharding_constraint(words, P(*spec))
