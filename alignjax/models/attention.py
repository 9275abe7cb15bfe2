"""Causal attention within segments, one query against a cache, and which kernel computes it on which backend.

Letters: b batch, t tokens, r queries of a block, s keys, n heads, k key-value heads, g = n / k, h head size.
Scores and softmax are float32. Repeated keys of grouped queries are never made.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec as P

from alignjax.config import UserError
from alignjax.machine.sharding import BATCH

WHOLE = 64  # tokens of a row up to which "xla" takes all queries against all keys
PARTS = 4  # of the queries of a longer row, each with its own keys: more give fewer scores, and a larger program
BLOCK = 128  # queries of a part whose scores "xla" makes at a time, and again for the gradient: it never has all
TILES = (
    512,
    384,
    256,
    128,
)  # of "splash": the first that divides t; 512 is MaxText's choice, not measured here
LANES = 128  # what the tiles, and so t, must be a multiple of


def self_attention(q, k, v, segments, implementation="auto", prefix=None):
    """[b t n h] in q's type, from q[b t n h], k[b t k h], v[b t k h] of q's type and segments[b t] int32.

    A token sees the tokens up to its own that hold its segment, so a row may pack several. A pad (segment 0) sees the
    pads up to its own: finite, with finite gradients, and never read. Raises UserError as `choose` does.

    By "xla" alone: segments[b t 2] name beside a token's own segment another that it sees; and all see, of a `prefix` that
    all rows share (keys[s k h], values[s k h], real[s] bool), what is real.
    """
    if prefix is not None or segments.ndim == 3:
        return xla(q, k, v, segments, prefix)
    name = choose(implementation, platform(), q.dtype, q.shape, k.shape[2], shards())
    return {"xla": xla, "cudnn": cudnn, "splash": splash}[name](q, k, v, segments)


def choose(implementation, backend, dtype, shape, kv_heads, shards=(1, 1)) -> str:
    """The name "xla", "cudnn" or "splash", for queries of shape [b t n h] and `shards` devices along b, and along n.

    "auto" is splash on a TPU and cudnn on a GPU in 16 bits, where rows and heads divide over their devices and a row
    fills a tile, and xla elsewhere. Raises UserError where another choice can't run.
    """
    b, t, _, h = shape
    rows, tensor = shards
    half = dtype in (jnp.bfloat16, jnp.float16)
    heads = (kv_heads % tensor == 0, f"mesh.tensor={tensor} to divide model.kv_heads={kv_heads}")
    needs = {
        "xla": (),
        "splash": ((backend == "tpu", f"a TPU, not {backend}"), heads),
        "cudnn": (
            (
                backend == "gpu" and half,
                f"a GPU and model.dtype='bfloat16', not {backend} and {dtype}",
            ),
            (h % 8 == 0 and h <= 128, f"model.head_size={h} to be a multiple of 8 and at most 128"),
            heads,
        ),
    }
    missing = {name: [text for holds, text in rules if not holds] for name, rules in needs.items()}
    if implementation == "auto":
        # Rows that don't divide would lie on every device, and a row shorter than a tile would be mostly pads.
        whole = b % rows == 0
        fits = {"splash": whole and t >= LANES, "cudnn": whole, "xla": True}
        return next(name for name in fits if fits[name] and not missing[name])
    if missing[implementation]:
        raise UserError(f"model.attention={implementation!r} needs {missing[implementation][0]}")
    return implementation


def check(model) -> None:
    """Raise UserError where the kernel that `model` asks for can't run on the mesh that is set."""
    shape = shards()[0], model.max_length, model.heads, model.head_size
    choose(model.attention, platform(), jnp.dtype(model.dtype), shape, model.kv_heads, shards())


def platform() -> str:
    """Of the mesh that is set, whose devices need not be here (the TPU compiler runs anywhere); else this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def shards() -> tuple[int, int]:
    """How many devices of the mesh that is set rows lie over, and how many heads; (1, 1) without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.axis_names:
        return 1, 1
    return mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]


def xla(q, k, v, segments, prefix=None):
    """By parts of the queries, each against the keys up to its end: not much over half of the scores of a long row."""
    t, of, segments = (
        q.shape[1],
        functools.partial(block, prefix),
        segments.reshape(*q.shape[:2], -1),
    )
    if t <= WHOLE:
        return of(q, k, v, segments, segments, 0)
    size = math.ceil(t / PARTS)
    if size <= BLOCK:
        return in_parts(of, size, q, k, v, segments)
    of = functools.partial(
        in_parts, functools.partial(scanned, of), math.ceil(size / BLOCK) * BLOCK
    )
    return padded(of, BLOCK, q, k, v, segments)


def in_parts(of, size, q, k, v, segments):
    """of(q, k, v, segments of q, of k, first) for `size` queries at a time, and the keys that they may see."""
    parts = []
    for i in range(0, q.shape[1], size):
        mine, seen = slice(i, i + size), slice(i + size)
        parts.append(
            of(q[:, mine], k[:, seen], v[:, seen], segments[:, mine], segments[:, seen], i)
        )
    return jnp.concatenate(parts, axis=1)


def scanned(of, q, k, v, mine, theirs, first):
    """of(q, k, v, mine, theirs, first), a block at a time; r is a multiple of BLOCK."""
    b, r = mine.shape[:2]
    cut = lambda x: x.reshape(b, -1, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    # The backward pass makes the scores of a block again: kept, they would be the [b n t t] that this is to avoid.
    @jax.checkpoint
    def one(part):
        q, mine, first = part
        return of(q, k, v, mine, theirs, first)

    y = jax.lax.map(one, (cut(q), cut(mine), first + jnp.arange(0, r, BLOCK)))
    return y.swapaxes(0, 1).reshape(q.shape)


def block(prefix, q, k, v, mine, theirs, first):
    """[b r n h] from q[b r n h], the queries from `first` on, k[b s k h], v[b s k h], and their segments, [b r c], [b s c]."""
    b, r, n, h = q.shape
    s, kv_heads = k.shape[1:3]
    mask = (mine[:, :, None] == theirs[:, None, :, :1]).any(axis=-1) & (
        jnp.arange(s) <= first + jnp.arange(r)[:, None]
    )
    # Heads in front, queries of a group in one line: XLA's CPU backend takes up to twice as long for other orders.
    grouped = q.reshape(b, r, kv_heads, -1, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)
    scores = (
        jnp.einsum("bkqh,bksh->bkqs", grouped, k.swapaxes(1, 2), preferred_element_type=jnp.float32)
        * h**-0.5
    )
    mask = jnp.tile(mask, (1, n // kv_heads, 1))[:, None]
    if prefix is None:
        y = jnp.einsum("bkqs,bksh->bkqh", softmax(scores, mask).astype(v.dtype), v.swapaxes(1, 2))
    else:
        keys, values, real = prefix
        before = (
            jnp.einsum("bkqh,skh->bkqs", grouped, keys, preferred_element_type=jnp.float32)
            * h**-0.5
        )
        real = jnp.broadcast_to(real, (*mask.shape[:3], len(real)))
        scores, mask = (
            jnp.concatenate([before, scores], axis=-1),
            jnp.concatenate([real, mask], axis=-1),
        )
        before, weights = jnp.split(softmax(scores, mask).astype(v.dtype), [len(values)], axis=-1)
        y = jnp.einsum("bkqs,skh->bkqh", before, values) + jnp.einsum(
            "bkqs,bksh->bkqh", weights, v.swapaxes(1, 2)
        )
    return y.reshape(b, kv_heads, -1, r, h).transpose(0, 3, 1, 2, 4).reshape(b, r, n, h)


def softmax(scores, mask):
    """Over the last axis where mask holds, uniform where it never does."""
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)


def padded(of, multiple, q, k, v, segments):
    """of(q, k, v, segments), with pads behind that make t a multiple, and without them again."""
    t = q.shape[1]
    widen = lambda x: jnp.pad(x, ((0, 0), (0, -t % multiple)) + ((0, 0),) * (x.ndim - 2))
    return of(*map(widen, (q, k, v, segments)))[:, :t]


def cudnn(q, k, v, segments):
    """Flash attention of cuDNN, which takes no odd t in training."""

    def even(q, k, v, segments):
        mask = jnp.tril(jnp.ones((q.shape[1],) * 2, bool)) & (
            segments[:, :, None] == segments[:, None, :]
        )
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")

    return padded(even, 2, q, k, v, segments)


def splash(q, k, v, segments):
    """Flash attention as a Pallas kernel for TPUs, interpreted (slowly) elsewhere: the tests call it on a CPU.

    XLA can't cut a kernel up over a mesh, so each device gets its rows and heads by hand. Rows that don't divide lie
    on every device, as in `sharding.constrain`; heads must divide.
    """
    here = lambda *x: padded(splash_on_one, LANES, *x)
    if shards() == (1, 1):
        return here(q, k, v, segments)
    rows = BATCH[0] if q.shape[0] % shards()[0] == 0 else None
    heads = P(rows, None, "tensor", None)
    # check_vma: a Pallas call doesn't say over which axes its results vary.
    over = jax.shard_map(
        here, in_specs=(heads, heads, heads, P(rows)), out_specs=heads, check_vma=False
    )
    return over(q, k, v, segments)


def splash_on_one(q, k, v, segments):
    t, n, h = q.shape[1:]
    tile = next(size for size in TILES if t % size == 0)
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((t, t))] * n),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_kv_compute=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_kv_dkv_compute=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() != "tpu",
    )
    row = lambda q, k, v, s: kernel(q, k, v, splash_attention_kernel.SegmentIds(s, s))
    q = (q.astype(jnp.float32) * h**-0.5).astype(q.dtype)  # which the kernel leaves to the caller
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(row)(q, k, v, segments).swapaxes(1, 2)


def cached_attention(q, blocks, masks):
    """[b n h] in q's type: one query a row, q[b n h], against blocks of (keys[b k s h], values[b k s h]) where masks[b s] hold.

    Blocks are never joined: their scores are small, they are not. The cache may be of another type than q. A row that
    may see nothing gets the mean of all values: finite, and never read.
    """
    b, n, h = q.shape
    grouped = q.reshape(b, blocks[0][0].shape[1], -1, h)
    scores = [
        jnp.einsum(
            "bkgh,bksh->bkgs", grouped, keys.astype(q.dtype), preferred_element_type=jnp.float32
        )
        for keys, _ in blocks
    ]
    mask = jnp.concatenate(masks, axis=1)[:, None, None]
    weights = softmax(jnp.concatenate(scores, axis=-1) * h**-0.5, mask).astype(q.dtype)
    y, first = jnp.zeros(grouped.shape, q.dtype), 0
    for _, values in blocks:
        mine = weights[..., first : first + values.shape[2]]
        y += jnp.einsum("bkgs,bksh->bkgh", mine, values.astype(q.dtype))
        first += values.shape[2]
    return y.reshape(b, n, h)
