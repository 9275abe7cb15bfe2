"""Sampling: each prompt is prefilled once, its samples decode in slots that are filled again as they finish.

Convention: sampling keeps the smallest set of tokens with mass `top_p`; log-probabilities that PPO uses, its ratio and
its KL, come from `logprobs` and are of the full distribution at the sampling temperature, on purpose: a kept set would
make the ratio jump as tokens enter and leave it. The log-probabilities returned here are those of the full
distribution too, and serve only as a check on the scorer.
Letters: b prompts, n samples of each, p prompt, r response, t = p + r, s slots, g slots filled at a time, v vocabulary,
l layers, k key-value heads, h head size, w prefix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from alignjax.machine.sharding import constrain, spec_of
from alignjax.models import transformer
from alignjax.models.attention import cached_attention, platform, shards

PARTS = 4  # of a cache's ring: a step reads the parts that hold something
LANES = 128  # weights that a draw sums up before it looks among them


class Rollout(NamedTuple):
    tokens: jax.Array  # [b*n t] int32: left-padded prompt, then the response, then pads; samples of a prompt adjacent
    prompt_lengths: jax.Array  # [b*n] int32
    lengths: jax.Array  # [b*n] int32: of the responses, their end tokens included
    logprobs: jax.Array  # [b*n r] float32, as the sampler saw them; 0 behind the end
    truncated: jax.Array  # [b*n] bool: no end token within r tokens

    @property
    def mask(self):
        """[b*n r] bool: the response's tokens."""
        return jnp.arange(self.logprobs.shape[1]) < self.lengths[:, None]

    @property
    def segments(self):
        """[b*n t] int32: 1 on real tokens, 0 on pads."""
        p = self.tokens.shape[1] - self.logprobs.shape[1]
        prompt = jnp.arange(p) >= p - self.prompt_lengths[:, None]
        return jnp.concatenate([prompt, self.mask], axis=1).astype(jnp.int32)


class Prefix(NamedTuple):
    """What all prompts begin with, read once."""

    kept: tuple  # (keys, values), each [l 1 k w h]
    real: jax.Array  # [w] bool: its tokens, behind pads
    length: jax.Array


class Slots(NamedTuple):
    """What is being decoded, and what has left. A response stays in its slot until the slot is filled again."""

    number: jax.Array  # [s] which of the b*n samples; b*n where there is none
    live: jax.Array  # [s] bool: not ended yet
    count: jax.Array  # [s] tokens of the response so far
    matched: jax.Array  # [s] how much of a stop string they end with, a state of `stops`
    tokens: jax.Array  # [s r]
    logprobs: jax.Array  # [s r]
    prompt_lengths: jax.Array  # [s]
    cache: list  # see `empty_cache`
    clock: (
        jax.Array
    )  # decode steps so far; modulo r, the place of the token in hand in every slot's ring
    left: tuple  # tokens[b*n r], logprobs[b*n r], lengths[b*n] of the samples that have left


def generate(
    model,
    params,
    prompts,
    lengths,
    index,
    key,
    *,
    samples,
    response_length,
    temperature,
    top_p,
    end,
    slots=0,
    cache_dtype="",
    prefix=None,
    stops=None,
    wanted=None,
):
    """A Rollout of `samples` responses to each of prompts[b p] (left-padded, lengths[b]).

    A sample's randomness is keyed by `key` (of the run's seed and step), its prompt's index[b], its number among the
    prompt's samples and its place in the response alone: not by batch, slots, order or devices. `slots` samples decode
    at once (0: all of them); when an eighth of the slots has ended, the next prompts take their place.

    `prefix`, of `read_prefix`, is what all prompts begin with. stops[q v], the state behind each token in each state, from
    0 on, ends a response at a state of q too (`truncated` knows the end token alone). The first `wanted` prompts, a traced
    number, are answered; without it all are.
    """
    (b, p), n, r = prompts.shape, samples, response_length
    at_once, s = slots_of(b, n, slots)
    g, whole, wanted = at_once * n, at_once == b, b if wanted is None else wanted
    draw = drawer(model, params, index, key, n, temperature, top_p)
    layers = transformer.for_decoding(model, params)

    def fill(state: Slots, first) -> Slots:
        """The prompts from `first` on in the first g free slots."""
        at = None if whole else jnp.argsort(state.live, stable=True)[:g]
        rows = first + jnp.arange(at_once)
        number = first * n + jnp.arange(g)
        number = jnp.where(
            number < wanted * n, number, b * n
        )  # behind the last prompt there is none
        return filled(
            model,
            params,
            draw,
            state,
            at,
            number,
            prompts[rows % b],
            lengths[rows % b],
            prefix,
            end,
            stops,
        )

    def turn(carry):
        """Fill g slots and decode until as many are free, or to the end once nothing is left to fill them with."""
        state, first = carry
        state, first = fill(state, first), first + at_once
        enough = jnp.where(first < wanted, s - g, 0)
        one = lambda state: step(model, params, layers, draw, state, p, prefix, end, stops)
        return jax.lax.while_loop(lambda state: state.live.sum() > enough, one, state), first

    w = 0 if prefix is None else len(prefix.real)
    carry = empty(model, b * n, s, w + p, r, cache_dtype), jnp.int32(0)
    state, _ = (
        turn(carry) if whole else jax.lax.while_loop(lambda carry: carry[1] < wanted, turn, carry)
    )
    tokens, logprobs, count = leave(state, jnp.arange(s))
    last = jnp.take_along_axis(tokens, count[:, None] - 1, axis=1)[:, 0]
    fan = lambda x: jnp.repeat(x, n, axis=0)
    return Rollout(
        jnp.concatenate([fan(prompts), tokens], axis=1), fan(lengths), count, logprobs, last != end
    )


def begin(
    model,
    params,
    prompts,
    lengths,
    index,
    key,
    *,
    response_length,
    temperature,
    top_p,
    end,
    stops=None,
) -> Slots:
    """As `generate` with one sample of each prompt begins: every response has its first token, and `proceed` adds more."""
    b, p = prompts.shape
    draw = drawer(model, params, index, key, 1, temperature, top_p)
    state = empty(model, b, b, p, response_length, "")
    return filled(
        model, params, draw, state, None, jnp.arange(b), prompts, lengths, None, end, stops
    )


def proceed(
    model,
    params,
    state: Slots,
    index,
    key,
    *,
    tokens,
    prompt_width,
    temperature,
    top_p,
    end,
    stops=None,
):
    """(the state of `begin` after up to `tokens` more of each response, its tokens[b r], count[b] and live[b] besides: the
    state may be donated to the next call before these are read)."""
    draw = drawer(model, params, index, key, 1, temperature, top_p)
    layers, until = transformer.for_decoding(model, params), state.clock + tokens
    one = lambda state: step(model, params, layers, draw, state, prompt_width, None, end, stops)
    state = jax.lax.while_loop(lambda state: state.live.any() & (state.clock < until), one, state)
    return state, (state.tokens, state.count, state.live)


def drawer(model, params, index, key, n: int, temperature, top_p):
    """draw(number, place, hidden): the tokens at `place` of samples (prompt times n, plus its sample's number), from the
    hidden states before them, and their log-probabilities."""
    fold, total = jax.vmap(jax.random.fold_in), len(index) * n
    keys = fold(
        fold(jnp.broadcast_to(key, (total,)), jnp.repeat(index, n)),
        jnp.tile(jnp.arange(n), len(index)),
    )

    def draw(number, place, hidden):
        # Each device's words first, then all of them: GSPMD would gather the kernel, to have whole rows at once.
        logits = constrain(constrain(transformer.logits(model, params, hidden), tensor=1))
        return sample(fold(keys[jnp.minimum(number, total - 1)], place), logits, temperature, top_p)

    return draw


def filled(
    model, params, draw, state: Slots, at, number, prompts, lengths, prefix, end, stops
) -> Slots:
    """The state with prompts[b p] of lengths[b] in slots at[g] (None: in all), as samples number[g], first tokens drawn."""
    (total, r), g = state.left[0].shape, len(number)
    n = g // len(prompts)
    hidden, kept = prefill(model, params, prompts, lengths, prefix)
    token, logprob = draw(number, jnp.zeros(g, jnp.int32), jnp.repeat(hidden[:, -1], n, axis=0))
    put = lambda old, x: x if at is None else old.at[at].set(x)
    begun = lambda x: jnp.zeros((g, r), x.dtype).at[:, 0].set(x)
    matched, ended = follow(stops, end, jnp.zeros(g, jnp.int32), token)
    live = (number < total) & ~ended & (r > 1)
    return Slots(
        put(state.number, number),
        put(state.live, live),
        put(state.count, jnp.ones(g, jnp.int32)),
        put(state.matched, matched),
        put(state.tokens, begun(token)),
        put(state.logprobs, begun(logprob)),
        put(state.prompt_lengths, jnp.repeat(lengths, n)),
        fill_cache(state.cache, at, kept, n),
        state.clock,
        state.left if at is None else leave(state, at),
    )


def step(model, params, layers, draw, state: Slots, p: int, prefix, end, stops) -> Slots:
    """One more token in every live slot."""
    r = state.tokens.shape[1]
    last = jnp.take_along_axis(state.tokens, state.count[:, None] - 1, axis=1)[:, 0]
    attend = reader(prompt_mask(state.prompt_lengths, p, prefix), state.clock, state.count, r)
    places = state.prompt_lengths + state.count - 1 + (0 if prefix is None else prefix.length)
    hidden, kept = transformer.decode(model, params, layers, last, places, state.cache, attend)
    token, logprob = draw(state.number, state.count, hidden)
    # Always so; but XLA sees that the cache is written to only after all of it has been read, and makes no copy.
    kept = jax.tree.map(lambda x: jnp.where((token >= 0)[:, None, None], x, 0), kept)
    here = (jnp.arange(r) == state.count[:, None]) & state.live[:, None]
    count = state.count + state.live
    matched, ended = follow(stops, end, state.matched, token)
    return state._replace(
        live=state.live & ~ended & (count < r),
        count=count,
        matched=matched,
        clock=state.clock + 1,
        tokens=jnp.where(here, token[:, None], state.tokens),
        logprobs=jnp.where(here, logprob[:, None], state.logprobs),
        cache=write(state.cache, state.clock, kept, r),
    )


def read_prefix(model, params, tokens, length) -> Prefix:
    """The Prefix of tokens[w], left-padded, of which `length` are real."""
    _, kept = prefill(model, params, tokens[None], jnp.full(1, length), None)
    return Prefix(kept, prompt_mask(length, len(tokens))[0], jnp.int32(length))


def prefill(model, params, prompts, lengths, prefix: Prefix | None):
    """hidden[b p d] of left-padded prompts[b p], lengths[b], and (keys, values) [l b k w+p h] of them and their prefix."""
    b, p = prompts.shape
    real, places = prompt_mask(lengths, p), jnp.maximum(jnp.arange(p) - (p - lengths[:, None]), 0)
    if prefix is None:
        return transformer.apply(model, params, prompts, places, real.astype(jnp.int32), keep=True)
    hidden, kept = transformer.apply(
        model,
        params,
        prompts,
        places + prefix.length,
        real.astype(jnp.int32),
        keep=True,
        prefix=transformer.PrefixCache(prefix.kept, prefix.real),
    )
    join = lambda before, x: jnp.concatenate([jnp.repeat(before, b, axis=1), x], axis=-2)
    return hidden, jax.tree.map(join, prefix.kept, kept)


def prompt_mask(lengths, p: int, prefix: Prefix | None = None):
    """[b w+p] bool: the real tokens of the prefix and of left-padded prompts, lengths[b]."""
    real = jnp.arange(p) >= p - jnp.reshape(lengths, (-1, 1))
    if prefix is None:
        return real
    return jnp.concatenate(
        [jnp.broadcast_to(prefix.real, (len(real), len(prefix.real))), real], axis=1
    )


def follow(stops, end, matched, token):
    """(the states of `stops` behind the tokens [b], whether a response ends with them [b])."""
    if stops is None:
        return matched, token == end
    matched = stops[matched, token].astype(jnp.int32)
    return matched, (token == end) | (matched == len(stops))


def slots_of(prompts: int, samples: int, slots: int) -> tuple[int, int]:
    """(prompts that are filled in at once, slots): slots in a multiple of the former's samples, an eighth of them or so."""
    wanted = -(-slots // samples)
    if not slots or wanted >= prompts:
        return prompts, prompts * samples
    at_once = max(1, wanted // 8)
    return at_once, wanted // at_once * at_once * samples


def empty(model, total: int, s: int, p: int, r: int, cache_dtype: str) -> Slots:
    """s free slots for `total` samples."""
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    left = zeros(total, r), jnp.zeros((total, r), jnp.float32), jnp.ones(total, jnp.int32)
    return Slots(
        zeros(s) + total,
        jnp.zeros(s, bool),
        zeros(s) + 1,
        zeros(s),
        zeros(s, r),
        jnp.zeros((s, r), jnp.float32),
        zeros(s),
        empty_cache(model, s, p, r, cache_dtype),
        zeros(),
        left,
    )


def leave(state: Slots, at) -> tuple:
    """`left` with what slots at[g] hold."""
    held = state.tokens, state.logprobs, state.count
    return tuple(
        x.at[state.number[at]].set(y[at], mode="drop")
        for x, y in zip(state.left, held, strict=True)
    )


def empty_cache(model, s: int, p: int, r: int, dtype: str) -> list:
    """Blocks of (keys, values), each [l s k w h]: the prompt's, w = p, then the parts of a ring of r places.

    Every slot's next token goes to the same place of the ring, the clock modulo r: one slice is written whatever the
    slots' ages, and a response, of r tokens at most, is never overwritten while it lasts. Where layers are unrolled,
    a list of layers of such blocks [s k w h].
    """
    width = -(-r // PARTS)
    shapes = [
        (s, model.kv_heads, w, model.head_size) for w in (p, *(width for _ in range(0, r, width)))
    ]
    layers = () if transformer.unrolled(model) else (model.layers,)
    axis = len(layers)
    block = lambda shape: constrain(
        jnp.zeros((*layers, *shape), dtype or model.dtype), axis, tensor=axis + 1
    )
    blocks = lambda: [(block(shape), block(shape)) for shape in shapes]
    return [blocks() for _ in range(model.layers)] if transformer.unrolled(model) else blocks()


def in_order(x):
    """An array of the cache, [... s k w h], with its axes in memory as they are named: where a step writes and where it
    reads, the TPU compiler would choose different orders, and copy the cache from one into the other at every step."""
    if platform() != "tpu":
        return x
    order, spec = Layout(tuple(range(x.ndim))), spec_of(x.shape, x.ndim - 4, x.ndim - 3)
    # Each device by itself: GSPMD would gather an array that is cut along two axes, to have it in order.
    here = lambda x: with_layout_constraint(x, order)
    return (
        here(x)
        if spec is None
        else jax.shard_map(here, in_specs=spec, out_specs=spec, check_vma=False)(x)
    )


def fill_cache(cache: list, at, kept, samples: int) -> list:
    """The cache with the prompts' keys and values, `kept` [l g/n k p h], in slots at[g] (None: in all), for each sample."""

    def put(old, x):
        x = x.astype(old.dtype)
        if at is None or shards()[0] == 1:
            x = jnp.repeat(x, samples, axis=-4)
            return x if at is None else old.at[..., at, :, :, :].set(x)
        # Chosen slot by slot, not scattered: GSPMD would gather the whole cache, to scatter into its slots.
        whose = jnp.full(old.shape[-4], -1).at[at].set(jnp.arange(len(at)))
        mine = constrain(
            jnp.take(x, jnp.maximum(whose, 0) // samples, axis=-4), old.ndim - 4, old.ndim - 3
        )
        return in_order(jnp.where((whose >= 0)[:, None, None, None], mine, old))

    def filled(blocks, kept):
        return [tuple(put(old, x) for old, x in zip(blocks[0], kept, strict=True)), *blocks[1:]]

    if isinstance(cache[0], list):
        return [filled(blocks, transformer.layer_of(kept, i)) for i, blocks in enumerate(cache)]
    return filled(cache, kept)


def write(cache: list, clock, kept, r: int) -> list:
    """The cache with a step's keys and values, `kept` as `transformer.decode` gives them, in their place of the ring."""
    place = clock % r

    def put(blocks, kept):
        width = blocks[-1][0].shape[-2]

        def one(part, old, x):
            # Parts without the place are given what they hold: every part is then written where it lies, never copied.
            start = (0,) * (old.ndim - 2) + (place % width, 0)
            has = jax.lax.dynamic_slice(old, start, (*old.shape[:-2], 1, old.shape[-1]))
            new = jnp.where(place // width == part, x[..., None, :].astype(old.dtype), has)
            return in_order(jax.lax.dynamic_update_slice(old, new, start))

        return [
            blocks[0],
            *(
                tuple(one(i, old, x) for old, x in zip(part, kept, strict=True))
                for i, part in enumerate(blocks[1:])
            ),
        ]

    if isinstance(cache[0], list):
        return [put(*both) for both in zip(cache, kept, strict=True)]
    return put(cache, kept)


def reader(prompt, clock, count, r: int):
    """attend(blocks, layer, q, k, v) of a step: of the cache all is read that is filled, the prompt's block by its mask
    [s p] and of the ring as many parts as the clock has reached, and the token in hand, which is not written yet.

    A slot sees as many of the last places as it has tokens there: count[s] less the one in hand.
    """
    ring = (clock - 1 - jnp.arange(r)) % r < count[:, None] - 1

    def attend(blocks, layer, q, k, v):
        parts, width = len(blocks) - 1, blocks[-1][0].shape[-2]
        masks = [prompt, *jnp.split(jnp.pad(ring, ((0, 0), (0, parts * width - r))), parts, axis=1)]
        here, sees = (k[:, :, None], v[:, :, None]), jnp.ones((len(q), 1), bool)

        def read(n):
            mine = blocks[:n] if layer is None else transformer.layer_of(blocks[:n], layer)
            return cached_attention(q, [*mine, here], [*masks[:n], sees])

        filled = (
            jnp.minimum(clock - 1, r - 1) // width
        )  # parts, less one; before the first write there are none
        return jax.lax.switch(filled + 1, [lambda n=n: read(n) for n in range(1, parts + 2)])

    return attend


def sample(keys, logits, temperature, top_p):
    """(token [b], its full-distribution log-probability [b]) from logits[b v]; one key a row, [b].

    Top-p without a sort: a token is among the kept (the smallest set of the most probable tokens with mass at least
    top_p; ties at its edge all stay) if what is more probable than it has less than that mass. So one is drawn from
    all and kept if that holds; if not, nothing as improbable is kept either, and the next draw is among what is more
    probable. Each round reads the vocabulary once; one or two do. Temperature 0 takes the most probable token.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1), jnp.max(jax.nn.log_softmax(logits), axis=-1)
    b, v = logits.shape
    z = logits / temperature
    top = z.max(axis=-1, keepdims=True)
    weights = jnp.pad(jnp.exp(z - top), ((0, 0), (0, -v % LANES))).reshape(b, -1, LANES)

    def chance(token):
        return jnp.take_along_axis(weights.reshape(b, -1), token[:, None], axis=1)[:, 0]

    def lanes(floor):
        """Sums of the weights above floor[b], by lanes: [b v/LANES]."""
        return jnp.where(weights > floor[:, None, None], weights, 0.0).sum(axis=-1)

    def draw(i, sums, floor):
        u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, i)))(keys)
        lane, rest = pick(sums, u * sums.sum(axis=-1))
        inside = jnp.take_along_axis(weights, lane[:, None, None], axis=1)[:, 0]
        place, _ = pick(jnp.where(inside > floor[:, None], inside, 0.0), rest)
        return lane * LANES + place

    def again(carry):
        i, token, above, pending = carry
        floor = chance(token)
        token = jnp.where(pending, draw(i, above, floor), token)
        above = lanes(chance(token))
        return i + 1, token, above, pending & (above.sum(axis=-1) >= top_p * mass)

    none = jnp.full(b, -1.0)
    sums = lanes(none)
    mass = sums.sum(axis=-1)
    token = draw(0, sums, none)
    if top_p < 1:
        above = lanes(chance(token))
        first = 1, token, above, above.sum(axis=-1) >= top_p * mass
        token = jax.lax.while_loop(lambda carry: carry[3].any(), again, first)[1]
    chosen = jnp.take_along_axis(z, token[:, None], axis=1)[:, 0]
    return token.astype(jnp.int32), jnp.minimum(chosen - top[:, 0] - jnp.log(mass), 0.0)


def pick(weights, target):
    """(where the running sum of weights[b n] passes target[b], what is left of target there): never a weight of 0.

    A running sum rounds: it may rise where a weight is 0, and end before the target.
    """
    reached, some = jnp.cumsum(weights, axis=1), weights > 0
    passed = some & (reached > target[:, None])
    last = weights.shape[1] - 1 - jnp.argmax(jnp.flip(some, axis=1), axis=1)
    at = jnp.where(passed.any(axis=1), jnp.argmax(passed, axis=1), last)
    before = jnp.take_along_axis(reached - weights, at[:, None], axis=1)[:, 0]
    return at, jnp.maximum(target - before, 0.0)
