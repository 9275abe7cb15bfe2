"""The interface between PPO and a sampler: what a sampler is given, and what it returns.

`Sampler` is a callable, so another rollout engine can take the place of `sampling.rollout`:

    def sample(params, prompts, key, settings) -> Rollout
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignjax.config import Model


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts, each padded on the left with any token."""

    tokens: Int[Array, "prompts prompt_tokens"]
    lengths: Int[Array, " prompts"]  # tokens of each prompt, at the end of its row
    index: Int[Array, " prompts"]  # number of each prompt in its data set; keys its randomness


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How to sample: hashable, so it can be a static argument of a compiled function.

    `model` must be a copy (`dataclasses.replace`) if the config that it comes from may change.
    Each of `end_tokens` ends a response. `slots` responses decode at once; 0 decodes all of them.
    `cache_dtype` is the type of cached keys and values; "" is the type of the computation.
    """

    model: Model
    samples_per_prompt: int
    response_length: int
    temperature: float
    top_p: float
    end_tokens: tuple[int, ...]
    slots: int = 0
    cache_dtype: str = ""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampled responses. The samples of a prompt are adjacent rows.

    A row of `tokens` holds the left-padded prompt, then the response, then pads.
    """

    tokens: Int[Array, "responses tokens"]
    prompt_lengths: Int[Array, " responses"]
    lengths: Int[Array, " responses"]  # of the responses, their end tokens included
    # Full-distribution log-probabilities as the sampler computed them; 0 after the end. NaN marks
    # a token whose logits are not finite: the response ends there, and PPO does not learn from it.
    logprobs: Float[Array, "responses response_tokens"]
    truncated: Bool[Array, " responses"]  # none of the end tokens within the response's length

    @property
    def mask(self) -> Bool[Array, "responses response_tokens"]:
        """Return which places of the response hold its tokens."""
        return jnp.arange(self.logprobs.shape[1]) < self.lengths[:, None]

    @property
    def segments(self) -> Int[Array, "responses tokens"]:
        """Return 1 on the tokens of prompt and response, 0 on pads."""
        prompt_width = self.tokens.shape[1] - self.logprobs.shape[1]
        prompt = jnp.arange(prompt_width) >= prompt_width - self.prompt_lengths[:, None]
        return jnp.concatenate([prompt, self.mask], axis=1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StreamOutput:
    """The responses of a stream so far."""

    tokens: Int[Array, "responses response_tokens"]
    lengths: Int[Array, " responses"]
    live: Bool[Array, " responses"]  # the response has not ended
    logprobs: Float[Array, "responses response_tokens"]  # as in `Rollout`


Sampler = Callable[[dict, Prompts, jax.Array, SamplingSettings], Rollout]
