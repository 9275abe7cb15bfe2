"""Token log-probabilities, values and scores, computed alike for every role and stage.

All of them read a packed microbatch: rows of tokens in which several sequences may stand one
after the other.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from alignjax.config import Model, UserError
from alignjax.machine.sharding import constrain
from alignjax.models import transformer, vocabulary
from alignjax.models.transformer import Activations

# What rounding may make of a figure that is 0, by the type of the computation.
SELF_CHECK_LIMITS = {"float32": 1e-4, "bfloat16": 0.1}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Sequences in rows. A token sees earlier tokens of its own segment; segment 0 is padding."""

    tokens: Int[Array, "rows width"]
    positions: Int[Array, "rows width"]  # of a token in its sequence
    segments: Int[Array, "rows width"]


class TokenReading(NamedTuple):
    """What a language model makes of target tokens."""

    logprobs: Float[Array, "shards targets"]
    entropy: Float[Array, "shards targets"]
    load_balancing: Float[Array, "shards targets"] | None  # of their sequences, see `Activations`


class ValueReading(NamedTuple):
    """What a value model makes of target tokens."""

    values: Float[Array, "shards targets"]
    load_balancing: Float[Array, "shards targets"] | None


class ScoreReading(NamedTuple):
    """What a reward model makes of sequences."""

    scores: Float[Array, "*sequences"]
    load_balancing: Float[Array, "*sequences"] | None


def read(model: Model, params: dict, packed: PackedTokens) -> Activations:
    """Run the transformer."""
    return transformer.apply(model, params, packed.tokens, packed.positions, packed.segments)


def hidden_states(
    model: Model, params: dict, packed: PackedTokens
) -> Float[Array, "rows width d_model"]:
    """Run the transformer and return its last hidden states."""
    return read(model, params, packed).hidden


def at_targets(
    array: Shaped[Array, "rows width *features"], targets: Int[Array, "shards targets"]
) -> Shaped[Array, "shards targets *features"]:
    """Select what an array has at targets: places in each device's rows, one behind the other."""
    shards, count = targets.shape
    features = array.shape[2:]
    by_shard = constrain(array.reshape(shards, -1, *features))
    places = targets.reshape(shards, count, *(1 for _ in features))
    return jnp.take_along_axis(by_shard, places, axis=1)


def before_targets(
    hidden: Float[Array, "rows width d_model"], targets: Int[Array, "shards targets"]
) -> Float[Array, "shards targets d_model"]:
    """Select the hidden state of the token before each target.

    The result for a target at the first place of a row is meaningless: such entries are padding.
    """
    return at_targets(hidden, jnp.maximum(targets - 1, 0))


def balance_at(activations: Activations, targets: Int[Array, "shards targets"]) -> Array | None:
    """Return the load-balancing loss of the sequence of each target, if there is one."""
    if activations.load_balancing is None:
        return None
    return at_targets(activations.load_balancing, targets)


def token_logprobs(
    model: Model,
    params: dict,
    packed: PackedTokens,
    targets: Int[Array, "shards targets"],
    temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, "shards targets"], Float[Array, "shards targets"]]:
    """Return log p of each target given what precedes it, and the entropy of p, in nats.

    `targets` are places of tokens, see `at_targets`. The distribution is the full one at
    `temperature`: top-p shapes the sampling only, see `sampling.rollout`.
    """
    reading = read_tokens(model, params, packed, targets, temperature)
    return reading.logprobs, reading.entropy


def read_tokens(
    model: Model,
    params: dict,
    packed: PackedTokens,
    targets: Int[Array, "shards targets"],
    temperature: float | Float[Array, ""] = 1.0,
) -> TokenReading:
    """Return what `token_logprobs` returns, and the load-balancing loss."""
    activations = read(model, params, packed)
    hidden = before_targets(activations.hidden, targets)
    labels = at_targets(packed.tokens, targets)
    kernel = params["embed"]["embedding"] if model.tied else params["head"]["kernel"]
    cap = model.logits_cap
    if model.logits_divisor != 1.0:
        # The cap comes behind the divisor: both scale with it.
        temperature = temperature * model.logits_divisor
        cap = cap * model.logits_divisor
    logprobs, entropy = vocabulary.token_logprobs(
        hidden, kernel, labels, temperature, model.tied, cap
    )
    return TokenReading(logprobs, entropy, balance_at(activations, targets))


def token_values(
    model: Model, params: dict, packed: PackedTokens, targets: Int[Array, "shards targets"]
) -> Float[Array, "shards targets"]:
    """Return the value before each target: the scalar head at the token that precedes it."""
    return read_values(model, params, packed, targets).values


def read_values(
    model: Model, params: dict, packed: PackedTokens, targets: Int[Array, "shards targets"]
) -> ValueReading:
    """Return what `token_values` returns, and the load-balancing loss."""
    activations = read(model, params, packed)
    values = transformer.scalar(params, before_targets(activations.hidden, targets))
    return ValueReading(values, balance_at(activations, targets))


def sequence_scores(
    model: Model, params: dict, packed: PackedTokens, ends: Int[Array, "*sequences"]
) -> Float[Array, "*sequences"]:
    """Return the scalar head at the last token of each sequence.

    `ends` are places of last tokens in the flattened rows. The last token of a response that
    ended is its end token.
    """
    return read_scores(model, params, packed, ends).scores


def read_scores(
    model: Model, params: dict, packed: PackedTokens, ends: Int[Array, "*sequences"]
) -> ScoreReading:
    """Return what `sequence_scores` returns, and the load-balancing loss."""
    activations = read(model, params, packed)
    scores = transformer.scalar(params, activations.hidden).reshape(-1)[ends]
    balance = activations.load_balancing
    return ScoreReading(scores, None if balance is None else balance.reshape(-1)[ends])


def score_alone(
    model: Model,
    params: dict,
    tokens: Int[Array, "sequences width"],
    lengths: Int[Array, " sequences"],
) -> Float[Array, " sequences"]:
    """Score each sequence alone in a row, behind its pads: what `sequence_scores` must equal."""
    count, width = tokens.shape
    ends = jnp.arange(1, count + 1) * width - 1
    return sequence_scores(model, params, pack_alone(tokens, lengths), ends)


def pack_alone(
    tokens: Int[Array, "sequences width"], lengths: Int[Array, " sequences"]
) -> PackedTokens:
    """Put each sequence alone in a row, behind its pads."""
    width = tokens.shape[1]
    place = jnp.arange(width) - (width - lengths[:, None])
    source = jnp.maximum(place, 0)
    return PackedTokens(
        tokens=jnp.take_along_axis(tokens, source, axis=1),
        positions=source,
        segments=(place >= 0).astype(jnp.int32),
    )


def check_packing(what: str, changes: np.ndarray, model: Model) -> None:
    """Stop the run if sequences are read otherwise among neighbours than alone.

    Rounding to 16 bits may give a token of a mixture of experts another expert, which changes some
    figures by more than rounding. A fault changes most of them, so there the median is checked.

    Args:
      what: the figure, such as "score".
      changes: of the figure, when its row's pads and neighbours change; several.
      model: that reads.

    Raises:
      UserError: with the change.
    """
    changes = np.abs(changes)
    may_reroute = model.experts and model.dtype != "float32"
    name = "median" if may_reroute else "largest"
    self_check(
        f"the {name} change of a {what} when its row's pads and neighbours change",
        float(np.median(changes) if may_reroute else changes.max()),
        model.dtype,
    )


def self_check(what: str, figure: float | jax.Array, dtype: str) -> None:
    """Stop the run if a figure that must be 0 is larger than the rounding of `dtype` explains.

    Raises:
      UserError: with the figure and the limit.
    """
    value = float(figure)
    limit = SELF_CHECK_LIMITS[dtype]
    if not value <= limit:  # also if the figure is NaN
        raise UserError(
            f"self-check at step 0: {what} is {value:.3g}, not 0 (to {limit:g} in {dtype}); stopped"
        )
