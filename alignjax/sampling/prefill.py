"""Read prompts, and what they have in common, before the first token is sampled."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignjax.config import Model
from alignjax.models import transformer
from alignjax.models.transformer import Activations, Params, PrefixCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The tokens that all prompts begin with, which are read once."""

    cache: PrefixCache
    length: Int[Array, ""]  # real tokens, which come after its pads

    @property
    def width(self) -> int:
        """Return how many places it has, its pads included."""
        return len(self.cache.real)


def read_prefix(
    params: Params, tokens: Int[Array, " width"], length: Int[Array, ""], model: Model
) -> Prefix:
    """Read left-padded tokens, of which the last `length` are real, as the prefix of prompts."""
    activations = prefill(params, tokens[None], jnp.full(1, length), model)
    real = prompt_mask(length, len(tokens))[0]
    cache = PrefixCache(key_values=activations.key_values, real=real)
    return Prefix(cache=cache, length=jnp.int32(length))


def prefill(
    params: Params,
    tokens: Int[Array, "prompts prompt_width"],
    lengths: Int[Array, " prompts"],
    model: Model,
    prefix: Prefix | None = None,
) -> Activations:
    """Read left-padded prompts; the keys and values returned are those of prefix and prompt."""
    prompt_width = tokens.shape[1]
    segments = prompt_mask(lengths, prompt_width).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(prompt_width) - (prompt_width - lengths[:, None]), 0)
    if prefix is None:
        return transformer.apply(model, params, tokens, positions, segments, keep=True)
    activations = transformer.apply(
        model,
        params,
        tokens,
        positions + prefix.length,
        segments,
        keep=True,
        prefix=prefix.cache,
    )
    key_values = jax.tree.map(prepend, prefix.cache.key_values, activations.key_values)
    return activations._replace(key_values=key_values)


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
    in_prefix = jnp.broadcast_to(prefix.cache.real, (len(real), prefix.width))
    return jnp.concatenate([in_prefix, real], axis=1)
