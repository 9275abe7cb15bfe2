"""Draw tokens from logits, by temperature and top-p, without sorting the vocabulary."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

LANE_WIDTH = 128  # weights that a draw first sums up, before it searches among them
# Below this temperature, the highest logit is subtracted before the division too. XLA may fuse the
# division and the later subtraction, and for large quotients this rounds by more than 1.
LOW_TEMPERATURE = 0.01
LEAST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)  # a lower one is 0 in float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Draw:
    """The state of the search for a token among the kept ones, after some rounds."""

    round_number: int | Int[Array, ""]
    tokens: Int[Array, " rows"]
    # By lanes: the sums of the weights that are larger than the token's own.
    sums_above: Float[Array, "rows lanes"]
    rejected: Bool[Array, " rows"]  # the token is not among the kept ones: draw again


@dataclass(frozen=True, kw_only=True, eq=False)
class TopPSampler:
    """What stays the same through all rounds of a draw: the distribution and its randomness."""

    keys: Key[Array, " rows"]
    weights: Float[Array, "rows lanes lane_width"]  # unnormalised probabilities
    mass: Float[Array, " rows"]  # the sum of all weights
    top_p: float

    def chosen_weights(self, tokens: Int[Array, " rows"]) -> Float[Array, " rows"]:
        """Return each token's weight."""
        flat = self.weights.reshape(len(self.weights), -1)
        return jnp.take_along_axis(flat, tokens[:, None], axis=1)[:, 0]

    def draw_above(
        self,
        round_number: int | Int[Array, ""],
        sums: Float[Array, "rows lanes"],
        threshold: Float[Array, " rows"],
    ) -> Int[Array, " rows"]:
        """Draw tokens in proportion to the weights above a threshold, whose `sums` are by lanes."""
        uniform = jax.vmap(functools.partial(uniform_of_round, round_number))(self.keys)
        lanes, remainder = pick(sums, uniform * sums.sum(axis=-1))
        inside = jnp.take_along_axis(self.weights, lanes[:, None, None], axis=1)[:, 0]
        inside_above = jnp.where(inside > threshold[:, None], inside, 0.0)
        places, _ = pick(inside_above, remainder)
        return lanes * LANE_WIDTH + places

    def is_rejected(self, sums_above: Float[Array, "rows lanes"]) -> Bool[Array, " rows"]:
        """Return whether more probable tokens alone have the mass that is to be kept.

        There must be such tokens. Otherwise there is nothing to draw from, and the search would
        not end: the mass that is to be kept is NaN in a row that is not finite, and 0 if `top_p`
        is too small for float32.
        """
        mass_above = sums_above.sum(axis=-1)
        return (mass_above > 0) & (mass_above >= self.top_p * self.mass)

    def draw_again(self, draw: Draw) -> Draw:
        """Draw once more, among more probable tokens, in the rows whose token was rejected."""
        threshold = self.chosen_weights(draw.tokens)
        redrawn = self.draw_above(draw.round_number, draw.sums_above, threshold)
        tokens = jnp.where(draw.rejected, redrawn, draw.tokens)
        sums_above = lane_sums(self.weights, self.chosen_weights(tokens))
        return Draw(
            round_number=draw.round_number + 1,
            tokens=tokens,
            sums_above=sums_above,
            rejected=draw.rejected & self.is_rejected(sums_above),
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
    below_all = jnp.full(len(logits), -1.0)
    sums = weights.sum(axis=-1)
    mass = sums.sum(axis=-1)  # about 1 or more; NaN in a row that is not finite
    sampler = TopPSampler(keys=keys, weights=weights, mass=mass, top_p=top_p)
    tokens = sampler.draw_above(0, sums, below_all)
    if top_p < 1:
        sums_above = lane_sums(weights, sampler.chosen_weights(tokens))
        first = Draw(
            round_number=1,
            tokens=tokens,
            sums_above=sums_above,
            rejected=sampler.is_rejected(sums_above),
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


def lane_sums(
    weights: Float[Array, "rows lanes lane_width"], threshold: Float[Array, " rows"]
) -> Float[Array, "rows lanes"]:
    """Sum up the weights above each row's threshold, by lanes."""
    return jnp.where(weights > threshold[:, None, None], weights, 0.0).sum(axis=-1)


def uniform_of_round(round_number: int | Int[Array, ""], key: Key[Array, ""]) -> Float[Array, ""]:
    """Return a row's uniform number in [0, 1) for one round of its draw."""
    return jax.random.uniform(jax.random.fold_in(key, round_number))


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
    positive = weights > 0
    passed = positive & (running > target[:, None])
    last_positive = weights.shape[1] - 1 - jnp.argmax(jnp.flip(positive, axis=1), axis=1)
    place = jnp.where(passed.any(axis=1), jnp.argmax(passed, axis=1), last_positive)
    before = jnp.take_along_axis(running - weights, place[:, None], axis=1)[:, 0]
    return place, jnp.maximum(target - before, 0.0)
