"""Attention over a mask, and which kernel computes it on which backend.

Letters: b batch, t queries, s keys, n heads, k key-value heads, g = n / k, h head size.
"""

import jax
import jax.numpy as jnp

from alignjax.config import UserError


def attention(q, k, v, mask, implementation="auto"):
    """[b t n h] in q's type, from q[b t n h], k[b s k h], v[b s k h] and mask[b t s] (True: may be seen).

    Scores and softmax are float32. Repeated keys of grouped queries are never made. A query that may see nothing gets
    the mean of all values: finite, and never read. "cudnn" needs a GPU and 16-bit inputs, "auto" takes it where it can.
    """
    gpu = jax.default_backend() == "gpu"
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if implementation == "cudnn" and not (gpu and half):
        raise UserError(
            f"model.attention='cudnn' needs a GPU and model.dtype='bfloat16', not {jax.default_backend()} and {q.dtype}"
        )
    if implementation == "cudnn" or (implementation == "auto" and gpu and half and q.shape[1] > 1):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)
