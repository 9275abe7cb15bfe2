"""Log-probabilities and entropies from hidden states and the output kernel, without an array of tokens x vocabulary.

A custom VJP over chunks of the vocabulary: the forward keeps a running log-sum-exp, the backward makes a chunk's logits
again (Liger and "Cut your losses", Wijmans et al. 2024, do this on GPUs), both as plain XLA products.
Letters: t tokens, d model, v vocabulary = m tensor shards x s; w words of each shard make a chunk [m w].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# Logits that a device holds at once: 64 MiB in float32. All of them, where they are no more: then nothing is made twice.
ELEMENTS = 2**24
# Chunks are no narrower than this, however many the tokens: [t 512] is no more than hidden[t d] itself is of a model
# that has so many of them, and a narrower product would wait for memory.
WIDTH = 512
ROUND = 128
# With n = t v / ELEMENTS chunks, either order makes n tiles of logits. Chunks of the vocabulary write each part of
# d kernel once and read and write d hidden n times, 8 n t d bytes; chunks of tokens do so with d kernel, 8 n d v bytes.
# A device has fewer tokens than words (t < v), so the vocabulary is what is cut; and the tokens never are, see WIDTH.

ROWS = ("data", "fsdp")
LOWEST = jnp.finfo(jnp.float32).min  # not -inf, whose product with 0 is NaN


def token_logprobs(hidden, kernel, targets, temperature=1.0, tied=False):
    """log p(targets[...] | hidden[... d]) and the entropy of p = softmax(hidden @ kernel / temperature), in nats.

    kernel[d v], or the embedding [v d] where tied. Both results are [...] float32; logits are summed and used in
    float32. Gradients go to hidden and kernel, in their types, and not to the temperature.
    """
    x, y = place(hidden.reshape(-1, hidden.shape[-1]), ROWS, None), targets.reshape(-1)
    v, d = kernel.shape if tied else kernel.shape[::-1]
    mesh = jax.sharding.get_abstract_mesh().shape
    m = mesh.get("tensor", 1)
    if v % m or m == 1:  # the kernel lies over no shards, see sharding.param_shardings
        normaliser, entropy, target = part(tied, x, kernel, y, temperature)
    else:
        # A cut along v would gather it: each shard cuts its own part, and their results meet once.
        parts = kernel.reshape(m, -1, d) if tied else kernel.reshape(d, m, -1).swapaxes(0, 1)
        shards = jax.vmap(functools.partial(part, tied), (None, 0, 0, None), spmd_axis_name="tensor")
        normalisers, entropies, found = shards(x, parts, y - jnp.arange(m)[:, None] * (v // m), temperature)
        normaliser, entropy = join(normalisers, entropies)
        target = found.max(0)
    logprob = target - normaliser
    # Where the division is compiled into the subtraction of the largest logit, 0 may come out as one rounding more.
    logprob -= jax.lax.stop_gradient(jnp.maximum(logprob, 0.0))
    return logprob.reshape(targets.shape), entropy.reshape(targets.shape)


def join(normalisers, entropies):
    """log-sum-exp and entropy of parts of the vocabulary, [parts t] each -> of their union: sum w (H - log w)."""
    whole = jax.nn.logsumexp(normalisers, axis=0)
    log = normalisers - whole
    return whole, (jnp.exp(log) * (entropies - log)).sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def part(tied, x, kernel, y, temperature):
    """Of logits x[t d] @ kernel[d s] / temperature: log-sum-exp, entropy, and that of y[t], LOWEST if not in [0 s)."""
    return forward(tied, x, kernel, y, temperature)[0]


def forward(tied, x, kernel, y, temperature):
    """The results, [t] each, and what the backward needs; the logits only where they are one chunk."""

    def step(running, start, width):
        normaliser, entropy, target = running
        z = logits(tied, x, block(tied, x, kernel, start, width), temperature)
        own = jax.nn.logsumexp(z, axis=-1)
        log = z - own[:, None]
        ours = -(jnp.exp(log) * log).sum(-1)
        at = y - start
        found = jnp.take_along_axis(z, jnp.clip(at, 0, width - 1)[:, None], axis=-1)[:, 0]
        target = jnp.where((at >= 0) & (at < width), found, target)
        return (*join(jnp.stack([normaliser, own]), jnp.stack([entropy, ours])), target), z

    low = place(jnp.full(len(x), LOWEST), ROWS)
    results, kept = each(tied, x, kernel, step, (low, jnp.zeros_like(low), low))
    return results, (x, kernel, y, temperature, *results[:2], kept)


def backward(tied, residuals, gradient):
    """d x[t d] and d kernel; with p and H: d log-sum-exp / d z = p, d H / d z = -p (log p + H)."""
    x, kernel, y, temperature, normaliser, entropy, kept = residuals
    g_normaliser, g_entropy, g_target, normaliser, entropy = (a[:, None] for a in (*gradient, normaliser, entropy))

    def step(sums, start, width):
        dx, dkernel = sums
        k = block(tied, x, kernel, start, width)
        log = (logits(tied, x, k, temperature) if kept is None else kept) - normaliser
        hit = (y - start)[:, None] == jnp.arange(width)
        dz = jnp.where(hit, g_target, 0.0) + jnp.exp(log) * (g_normaliser - g_entropy * (log + entropy))
        dz = (dz / temperature).astype(x.dtype)
        dx += product(dz, k, 1, 0 if tied else 1)
        dk = product(dz, x, 0, 0) if tied else product(x, dz, 0, 0)
        dk = place(dk.astype(kernel.dtype), *(None, "fsdp") if tied else ("fsdp", None))
        return (dx, jax.lax.dynamic_update_slice_in_dim(dkernel, dk, start, 0 if tied else 1)), None

    (dx, dkernel), _ = each(tied, x, kernel, step, (jnp.zeros(x.shape), jnp.zeros_like(kernel)))
    return dx.astype(x.dtype), dkernel, None, None


part.defvjp(forward, backward)


def each(tied, x, kernel, step, carry):
    """step(carry, start, width) -> carry, kept: for each chunk; what is kept of the chunk where there is but one."""
    s, t, mesh = kernel.shape[0 if tied else 1], len(x), jax.sharding.get_abstract_mesh().shape
    rows = mesh.get("data", 1) * mesh.get("fsdp", 1)
    t = t // rows if t % rows == 0 else t
    count = math.ceil(s / max(ELEMENTS // t, WIDTH))
    w = math.ceil(s / count / ROUND) * ROUND
    n = (s - 1) // w
    if n:
        carry, _ = jax.lax.scan(lambda c, i: (step(c, i * w, w)[0], None), carry, jnp.arange(n))
    carry, kept = step(carry, n * w, s - n * w)
    return carry, None if n else kept


def block(tied, x, kernel, start, width):
    """The kernel's part, in x's type, whole along d on each device."""
    part = jax.lax.dynamic_slice_in_dim(kernel, start, width, 0 if tied else 1)
    return place(part.astype(x.dtype), None, None)


def logits(tied, x, kernel, temperature):
    return product(x, kernel, 1, 1 if tied else 0) / temperature


def product(a, b, i, j):
    """a and b summed over a's axis i and b's axis j, float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def place(x, *axes):
    """x with its axes over the mesh's as AXES says, where a mesh is set and they divide."""
    mesh = jax.sharding.get_abstract_mesh().shape
    if "tensor" not in mesh:
        return x
    shards = [math.prod(mesh[name] for name in ([a] if isinstance(a, str) else a or ())) for a in axes]
    spec = [a if n % k == 0 else None for a, n, k in zip(axes, x.shape, shards, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*spec))
