"""Read prompts, and what they have in common, before the first token is sampled."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignjax.config import Model
from alignjax.models import transformer

KeyValues = tuple[
    Float[Array, "layers rows kv_heads width head_size"],
    Float[Array, "layers rows kv_heads width head_size"],
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The tokens that all prompts begin with, which are read once."""

    key_values: KeyValues  # of one row
    real: Bool[Array, " width"]  # False on the pads in front of its tokens
    length: Int[Array, ""]


def read_prefix(
    params: dict, tokens: Int[Array, " width"], length: Int[Array, ""], model: Model
) -> Prefix:
    """Read left-padded tokens, of which the last `length` are real, as the prefix of prompts."""
    _, key_values = prefill(params, tokens[None], jnp.full(1, length), model)
    return Prefix(
        key_values=key_values,
        real=prompt_mask(length, len(tokens))[0],
        length=jnp.int32(length),
    )


def prefill(
    params: dict,
    tokens: Int[Array, "prompts prompt_width"],
    lengths: Int[Array, " prompts"],
    model: Model,
    prefix: Prefix | None = None,
) -> tuple[Float[Array, "prompts prompt_width d_model"], KeyValues]:
    """Return hidden states of left-padded prompts, and keys and values of prefix and prompts."""
    prompt_width = tokens.shape[1]
    segments = prompt_mask(lengths, prompt_width).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(prompt_width) - (prompt_width - lengths[:, None]), 0)
    if prefix is None:
        return transformer.apply(model, params, tokens, positions, segments, keep=True)
    hidden, key_values = transformer.apply(
        model,
        params,
        tokens,
        positions + prefix.length,
        segments,
        keep=True,
        prefix=(prefix.key_values, prefix.real),
    )
    prefix_keys, prefix_values = prefix.key_values
    keys, values = key_values
    return hidden, (prepend(prefix_keys, keys), prepend(prefix_values, values))


def prepend(
    shared: Float[Array, "layers 1 kv_heads prefix_width head_size"],
    own: Float[Array, "layers prompts kv_heads prompt_width head_size"],
) -> Float[Array, "layers prompts kv_heads width head_size"]:
    """Put the prefix's keys, or values, in front of each prompt's own."""
    return jnp.concatenate([jnp.repeat(shared, own.shape[1], axis=1), own], axis=-2)


def prompt_mask(
    lengths: Int[Array, "*prompts"], prompt_width: int, prefix: Prefix | None = None
) -> Bool[Array, "prompts width"]:
    """Return which places of the prefix and of left-padded prompts hold real tokens."""
    real = jnp.arange(prompt_width) >= prompt_width - jnp.reshape(lengths, (-1, 1))
    if prefix is None:
        return real
    in_prefix = jnp.broadcast_to(prefix.real, (len(real), len(prefix.real)))
    return jnp.concatenate([in_prefix, real], axis=1)


def prefix_width(prefix: Prefix | None) -> int:
    """Return how many places of the cache a prefix takes."""
    return 0 if prefix is None else len(prefix.real)
