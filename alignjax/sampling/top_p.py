"""Draw tokens from logits, by temperature and top-p, without sorting the vocabulary."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from alignjax.models.attention import platform

LANE_WIDTH = 128  # weights that a draw first sums up, before it searches among them
# Below this temperature, the highest logit is subtracted before the division too. XLA may fuse the
# division and the later subtraction, and for large quotients this rounds by more than 1.
LOW_TEMPERATURE = 0.01
LEAST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)  # a lower one is 0 in float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Above:
    """The weights that are larger than the one of a row's token."""

    weight: Float[Array, " rows"]  # of the token itself
    sums: Float[Array, "rows lanes"]
    mass: Float[Array, " rows"]  # the sum of all sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Draw:
    """The state of the search for a token among the kept ones, after some rounds."""

    rounds: Int[Array, " rows"]  # the same in all rows
    tokens: Int[Array, " rows"]
    above: Above
    rejected: Bool[Array, " rows"]  # the token is not among the kept ones: draw again


@dataclass(frozen=True, kw_only=True, eq=False)
class TopPSampler:
    """What stays the same through all rounds of a draw: the distribution and its randomness."""

    keys: Key[Array, " rows"]
    weights: Float[Array, "rows lanes lane_width"]  # unnormalised probabilities
    mass: Float[Array, " rows"]  # the sum of all weights
    top_p: float

    def draw_above(self, rounds: Int[Array, " rows"], above: Above) -> Int[Array, " rows"]:
        """Draw tokens in proportion to the weights above those of other tokens."""
        uniform = jax.vmap(uniform_of_round)(self.keys, rounds)
        lanes, remainder = pick(above.sums, uniform * above.mass)
        inside = jnp.take_along_axis(self.weights, lanes[:, None, None], axis=1)[:, 0]
        inside_above = jnp.where(inside > above.weight[:, None], inside, 0.0)
        places, _ = pick(inside_above, remainder)
        return lanes * LANE_WIDTH + places

    def above(self, tokens: Int[Array, " rows"]) -> Above:
        """Sum up the weights that are larger than those of the tokens."""
        flat = self.weights.reshape(len(self.weights), -1)
        weight = jnp.take_along_axis(flat, tokens[:, None], axis=1)[:, 0]
        larger = jnp.where(self.weights > weight[:, None, None], self.weights, 0.0)
        sums = summed_once(larger.sum(axis=-1))
        return Above(weight=weight, sums=sums, mass=sums.sum(axis=-1))

    def is_rejected(self, above: Above) -> Bool[Array, " rows"]:
        """Return whether more probable tokens alone have the mass that is to be kept.

        There must be such tokens. Otherwise there is nothing to draw from, and the search would
        not end: the mass that is to be kept is NaN in a row that is not finite, and 0 if `top_p`
        is too small for float32.
        """
        return (above.mass > 0) & (above.mass >= self.top_p * self.mass)

    def draw_again(self, draw: Draw) -> Draw:
        """Draw once more, among more probable tokens, in the rows whose token was rejected."""
        redrawn = self.draw_above(draw.rounds, draw.above)
        tokens = jnp.where(draw.rejected, redrawn, draw.tokens)
        above = self.above(tokens)
        return Draw(
            rounds=draw.rounds + 1,
            tokens=tokens,
            above=above,
            rejected=draw.rejected & self.is_rejected(above),
        )


def sample_tokens(
    keys: Key[Array, " rows"],
    logits: Float[Array, "rows vocabulary"],
    temperature: float,
    top_p: float,
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """Return a token for each row, and its log-probability in the full distribution.

    Top-p needs no sort. The kept tokens are the smallest set of the most probable tokens whose
    mass is at least `top_p`; ties at its edge all stay. A token is therefore kept if the tokens
    that are more probable have less than that mass. One token is drawn from the whole
    vocabulary, and returned if this holds. If not, no token as improbable as this one is kept
    either, so the next draw is among the more probable ones. Each round reads the vocabulary
    once; one or two rounds are enough. They end on any input, because each draws among tokens
    that are more probable than the last one. Temperature 0 takes the most probable token.

    A row that is not finite gets some token of the vocabulary, and NaN as its log-probability. Such
    a row has NaN or +inf, or nothing but -inf, or numbers that overflow when they are divided by
    the temperature. A single -inf only excludes its token.
    """
    if temperature < LEAST_TEMPERATURE:
        return take_highest(logits)
    if temperature < LOW_TEMPERATURE:
        logits -= logits.max(axis=-1, keepdims=True)
    scaled = logits / temperature
    highest = scaled.max(axis=-1, keepdims=True)
    weights = split_into_lanes(jnp.exp(scaled - highest))
    sums = weights.sum(axis=-1)
    if platform() == "gpu":  # elsewhere XLA does not read the weights again
        sums = summed_once(sums)
    mass = sums.sum(axis=-1)  # about 1 or more; NaN in a row that is not finite
    sampler = TopPSampler(keys=keys, weights=weights, mass=mass, top_p=top_p)
    all_words = Above(weight=jnp.full(len(logits), -1.0), sums=sums, mass=mass)
    rounds = jnp.zeros(len(logits), jnp.int32)
    tokens = sampler.draw_above(rounds, all_words)
    if top_p < 1:
        above = sampler.above(tokens)
        first = Draw(
            rounds=rounds + 1,
            tokens=tokens,
            above=above,
            rejected=sampler.is_rejected(above),
        )
        tokens = jax.lax.while_loop(any_rejected, sampler.draw_again, first).tokens
    finite = jnp.isfinite(mass) & (mass > 0)
    tokens = jnp.where(finite, tokens, 0)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=1)[:, 0]
    logprobs = jnp.minimum(chosen - highest[:, 0] - jnp.log(mass), 0.0)
    return tokens.astype(jnp.int32), jnp.where(finite, logprobs, jnp.nan)


def take_highest(
    logits: Float[Array, "rows vocabulary"],
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """Return the most probable token of each row, and its log-probability."""
    tokens = jnp.argmax(logits, axis=-1)
    # Not the highest of the log-probabilities: XLA's maximum may ignore NaN.
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
    return tokens.astype(jnp.int32), logprobs


def split_into_lanes(
    weights: Float[Array, "rows vocabulary"],
) -> Float[Array, "rows lanes lane_width"]:
    """Pad the vocabulary with weights of 0, and split it into lanes."""
    rows, vocabulary = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocabulary % LANE_WIDTH)))
    return padded.reshape(rows, -1, LANE_WIDTH)


def summed_once(sums: Float[Array, "rows lanes"]) -> Float[Array, "rows lanes"]:
    """Return sums by lanes, of which the sum is taken next.

    Without a barrier XLA would make that one a sum over the whole vocabulary of its own.
    """
    return jax.lax.optimization_barrier(sums)


def uniform_of_round(key: Key[Array, ""], number: Int[Array, ""]) -> Float[Array, ""]:
    """Return a row's uniform number in [0, 1) for one round of its draw."""
    return jax.random.uniform(jax.random.fold_in(key, number))


def any_rejected(draw: Draw) -> Bool[Array, ""]:
    """Return whether some row still needs another draw."""
    return draw.rejected.any()


def pick(
    weights: Float[Array, "rows choices"], target: Float[Array, " rows"]
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """Return where the running sum of the weights passes the target, and what then remains.

    It never picks a weight of 0. A running sum is subject to rounding: it may rise at a weight of
    0, and it may end before the target, in which case the last positive weight is picked.
    """
    running = jnp.cumsum(weights, axis=1)
    place = first_or_last(weights > 0, running > target[:, None])
    before = jnp.take_along_axis(running - weights, place[:, None], axis=1)[:, 0]
    return place, jnp.maximum(target - before, 0.0)


def first_or_last(
    positive: Bool[Array, "rows choices"], passed: Bool[Array, "rows choices"]
) -> Int[Array, " rows"]:
    """Return the first choice that is positive and passed, or the last positive one.

    It is the last choice if none is positive. This is one reduction: choices that have passed rank
    above all others, the first of them highest; then come positive ones, the last of them highest.
    """
    count = positive.shape[1]
    choices = jnp.arange(count)
    rank = jnp.where(positive & passed, 2 * count - choices, jnp.where(positive, choices + 1, 0))
    best = rank.max(axis=1)
    last_positive = jnp.where(best > 0, best - 1, count - 1)
    return jnp.where(best > count, 2 * count - best, last_positive)
