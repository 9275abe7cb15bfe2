"""Slots: the responses that are decoded at the same time, and those that are finished."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignjax.sampling.cache import Cache, CacheKind
from alignjax.sampling.types import SamplingSettings


class SlotPlan(NamedTuple):
    """How prompts share the slots."""

    prompts_per_fill: int  # prompts that enter their slots at the same time
    slots: int  # a multiple of the samples of these prompts


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Finished:
    """The responses of a rollout, in their final order; those that have not left a slot are 0."""

    tokens: Int[Array, "responses response_tokens"]
    logprobs: Float[Array, "responses response_tokens"]
    lengths: Int[Array, " responses"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Slots:
    """The responses in the slots. One that has ended stays there until its slot is filled again."""

    response_ids: Int[Array, " slots"]  # row of the response in the rollout; their number if empty
    live: Bool[Array, " slots"]  # the response has not ended
    lengths: Int[Array, " slots"]  # tokens of the response so far
    stop_states: Int[Array, " slots"]  # state of the stop table after these tokens
    tokens: Int[Array, "slots response_tokens"]
    logprobs: Float[Array, "slots response_tokens"]
    prompt_lengths: Int[Array, " slots"]
    cache: Cache
    # Steps of decoding so far. Modulo the response length, it is the place in the ring of a
    # `RingCache` that the token in hand takes.
    clock: Int[Array, ""]
    finished: Finished


def plan_slots(num_prompts: int, samples_per_prompt: int, slots: int) -> SlotPlan:
    """Return how prompts share about `slots` slots; 0 gives each response its own slot.

    About an eighth of the slots are filled at a time.
    """
    prompts_in_slots = -(-slots // samples_per_prompt)
    if not slots or prompts_in_slots >= num_prompts:
        return SlotPlan(prompts_per_fill=num_prompts, slots=num_prompts * samples_per_prompt)
    prompts_per_fill = max(1, prompts_in_slots // 8)
    fills = prompts_in_slots // prompts_per_fill
    return SlotPlan(
        prompts_per_fill=prompts_per_fill, slots=fills * prompts_per_fill * samples_per_prompt
    )


def empty_slots(
    settings: SamplingSettings, num_responses: int, num_slots: int, cache: CacheKind
) -> Slots:
    """Return free slots, for a rollout of `num_responses` responses."""
    response_length = settings.response_length
    shape = (num_slots, response_length)
    finished = Finished(
        tokens=jnp.zeros((num_responses, response_length), jnp.int32),
        logprobs=jnp.zeros((num_responses, response_length), jnp.float32),
        lengths=jnp.ones(num_responses, jnp.int32),
    )
    return Slots(
        response_ids=jnp.full(num_slots, num_responses, jnp.int32),
        live=jnp.zeros(num_slots, bool),
        lengths=jnp.ones(num_slots, jnp.int32),
        stop_states=jnp.zeros(num_slots, jnp.int32),
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        prompt_lengths=jnp.zeros(num_slots, jnp.int32),
        cache=cache.empty(),
        clock=jnp.zeros((), jnp.int32),
        finished=finished,
    )


def retire(slots: Slots, where: Int[Array, " retired"]) -> Finished:
    """Return the finished responses together with those that the slots `where` hold.

    An empty slot's id is out of range, so what it holds is dropped.
    """
    rows = slots.response_ids[where]
    finished = slots.finished
    return dataclasses.replace(
        finished,
        tokens=finished.tokens.at[rows].set(slots.tokens[where], mode="drop"),
        logprobs=finished.logprobs.at[rows].set(slots.logprobs[where], mode="drop"),
        lengths=finished.lengths.at[rows].set(slots.lengths[where], mode="drop"),
    )


def last_tokens(
    tokens: Int[Array, "rows response_tokens"], lengths: Int[Array, " rows"]
) -> Int[Array, " rows"]:
    """Return the last token of each response."""
    return jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
