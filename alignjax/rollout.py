"""Sampling: prefill once for all samples of a prompt, decode with a cache, top-p without a sort.

Convention: sampling keeps the smallest set of tokens with mass `top_p`; log-probabilities that PPO uses, its ratio and
its KL, come from `logprobs` and are of the full distribution at the sampling temperature, on purpose: a kept set would
make the ratio jump as tokens enter and leave it. The log-probabilities returned here are those of the full
distribution too, and serve only as a check on the scorer.
Letters: b prompts, n samples of each, p prompt, r response, t = p + r, v vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignjax.models import transformer


class Rollout(NamedTuple):
    tokens: jax.Array  # [b*n t] int32: left-padded prompt, then the response, then pads; samples of a prompt adjacent
    segments: jax.Array  # [b*n t] int32: 1 on real tokens, 0 on pads
    mask: jax.Array  # [b*n r] bool: the response's tokens, its end token included
    logprobs: jax.Array  # [b*n r] float32, as the sampler saw them
    truncated: jax.Array  # [b*n] bool: no end token within r tokens


def top_p_mask(probabilities, top_p):
    """[b v] bool: the smallest set of the most probable tokens with mass at least top_p; ties at its edge all stay.

    The edge is found by bisection on the bits of the probability (positive floats sort as their bits do): 31 sums over
    the vocabulary, exact, and no sort.
    """
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_, low_high):
        low, high = low_high  # mass(bits >= low) >= top_p holds throughout, mass(bits >= high) < top_p
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle[:, None], probabilities, 0.0), axis=-1) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    top = bits.max(axis=-1)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top), top + 1))
    return (bits >= low[:, None]) | (bits == top[:, None])


def sample(key, logits, temperature, top_p):
    """(token [b], its full-distribution log-probability [b]) from logits[b v]; one key a row, [b].

    Temperature 0 takes the most probable token.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1), jnp.max(jax.nn.log_softmax(logits), axis=-1)
    logprobs = jax.nn.log_softmax(logits / temperature)
    kept = logprobs
    if top_p < 1:
        kept = jnp.where(top_p_mask(jnp.exp(logprobs), top_p), logprobs, -jnp.inf)
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logprobs.shape[-1:]))(key)
    token = jnp.argmax(kept + noise, axis=-1)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


def generate(model, params, prompts, lengths, index, key, *, samples, response_length, temperature, top_p, end):
    """A Rollout of `samples` responses to each of prompts[b p] (left-padded, lengths[b]).

    A sample's randomness is keyed by `key` (of the run's seed and step), its prompt's index[b], its number among the
    prompt's samples and its place in the response alone: not by batch, layout or devices. Stops when all have ended.
    """
    b, p = prompts.shape
    segments = (jnp.arange(p) >= p - lengths[:, None]).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(p) - (p - lengths[:, None]), 0)
    cache = transformer.init_cache(model, b, p)
    hidden, cache = transformer.apply(model, params, prompts, positions, segments, cache)
    fan = lambda x: jnp.repeat(x, samples, axis=0)
    grow = ((0, 0), (0, 0), (0, response_length), (0, 0), (0, 0))
    cache = {**cache, "k": jnp.pad(jnp.repeat(cache["k"], samples, axis=1), grow),
             "v": jnp.pad(jnp.repeat(cache["v"], samples, axis=1), grow),
             "segments": jnp.pad(fan(cache["segments"]), ((0, 0), (0, response_length)))}  # fmt: skip
    rows = b * samples
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    numbers = jnp.tile(jnp.arange(samples), b)
    keys = jax.vmap(jax.random.fold_in)(fold(key, fan(index)), numbers)

    def going(carry):
        return (carry[0] < response_length) & ~jnp.all(carry[1])

    def step(carry):
        i, done, last, cache, tokens, logprobs = carry
        logits = transformer.logits(model, params, last)
        token, logprob = sample(jax.vmap(jax.random.fold_in, (0, None))(keys, i), logits, temperature, top_p)
        token = jnp.where(done, 0, token).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
        logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, jnp.where(done, 0.0, logprob)[:, None], i, axis=1)
        live = (~done).astype(jnp.int32)[:, None]
        at = (fan(lengths) + i)[:, None]
        hidden, cache = transformer.apply(model, params, token[:, None], at, live, cache)
        return i + 1, done | (token == end), hidden[:, 0], cache, tokens, logprobs

    start = (jnp.int32(0), jnp.zeros(rows, bool), fan(hidden[:, -1]), cache,
             jnp.zeros((rows, response_length), jnp.int32), jnp.zeros((rows, response_length), jnp.float32))  # fmt: skip
    _, ended, _, _, response, logprobs = jax.lax.while_loop(going, step, start)
    before = jnp.cumsum(response == end, axis=1) - (response == end)
    mask = before == 0
    return Rollout(jnp.concatenate([fan(prompts), response], axis=1),
                   jnp.concatenate([fan(segments), mask.astype(jnp.int32)], axis=1), mask, logprobs, ~ended)  # fmt: skip
