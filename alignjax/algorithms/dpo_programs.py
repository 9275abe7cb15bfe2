"""How DPO packs comparisons, reads them, and what it learns from them: pure functions.

In shapes, `pairs` counts the pairs of a batch, `all_pairs` those of a data set.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignjax.algorithms import comparisons, losses
from alignjax.algorithms.comparisons import SIDES, ReadPairs, Rows, interleave
from alignjax.config import DPO, Config, Model
from alignjax.data import packing
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.models.scoring import PackedTokens, TokenReading

Mesh = jax.sharding.Mesh

CHECKED_PAIRS = 8  # pairs whose responses the check of step 0 reads once more, each alone


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PreferenceMicrobatch:
    """Packed comparisons, of which the tokens of the responses are targets."""

    packed: PackedTokens
    # Places of the tokens of responses in each device's rows, see `scoring.at_targets`.
    targets: Int[Array, "shards targets"]
    # Response of each target, 2 * place of its pair + side; 2 * pairs on padding.
    owner: Int[Array, "shards targets"]
    token_weights: Float[
        Array, "shards targets"
    ]  # 1 / tokens of the batch's responses; 0 on padding
    lengths: Float[Array, "pairs 2"]  # tokens of the responses, end token included; 1 on padding
    weights: Float[Array, " pairs"]  # 1 / pairs of the batch; 0 on padding
    pair: Int[Array, " pairs"]  # number in the batch; the count of pairs on padding
    number: Int[Array, " pairs"]  # of the pair among all that are trained on; 0 on padding


# The reference's log-probabilities [all_pairs 2], and a microbatch of these pairs.
LearningPart = tuple[Float[Array, "all_pairs 2"], PreferenceMicrobatch]


class PairLogprobs(NamedTuple):
    """Log-probabilities of the responses of a microbatch, and what the reference says of them."""

    policy: Float[Array, "pairs 2"]
    log_ratios: Float[Array, "pairs 2"]
    entropy: Float[Array, ""]  # of the policy: the microbatch's share of the mean per token


def pack_minibatch(
    rows: Rows,
    microbatch_tokens: int,
    row_shards: int,
    ladder: packing.Ladder = packing.fine,
    room: int = 0,
    numbers: np.ndarray | None = None,
) -> list[PreferenceMicrobatch]:
    """Pack comparisons into microbatches, as host arrays; a pair stays in one microbatch.

    Args:
      rows: chosen and rejected [pairs tokens], their lengths and the prompts' lengths [pairs].
      microbatch_tokens: tokens of a microbatch, roughly.
      row_shards: devices that the rows of a microbatch lie over.
      ladder: the shapes of microbatches.
      room: for how many pairs; 0: for those of `rows`.
      numbers: of the pairs among all pairs; by default, those of the batch.
    """
    tokens, lengths = interleave(rows)
    prompt_lengths = np.repeat(rows["prompt_length"], 2)
    response_lengths = (lengths - prompt_lengths).reshape(-1, 2).astype(np.float32)
    place = np.arange(tokens.shape[1])
    mask = (place >= prompt_lengths[:, None]) & (place < lengths[:, None])
    count = len(rows["margin"])
    room = max(room, count)
    if numbers is None:
        numbers = np.arange(count)
    layouts = comparisons.lay_out(
        lengths,
        tokens.shape[1],
        microbatch_tokens,
        row_shards,
        ladder,
        counts=mask.sum(axis=1),
    )
    microbatches = []
    for layout in layouts:
        pair = layout.members[::2] // 2
        targets, real = packing.targets(layout.take(mask), row_shards, layout.target_room)
        sequence = packing.at_targets(layout.sequence, targets)
        owner = 2 * np.searchsorted(pair, sequence // 2) + sequence % 2
        microbatch = PreferenceMicrobatch(
            packed=PackedTokens(
                tokens=layout.take(tokens), positions=layout.place, segments=layout.sequence + 1
            ),
            targets=targets,
            owner=np.where(real, owner, 2 * room).astype(np.int32),
            token_weights=real.astype(np.float32) / max(mask.sum(), 1),
            lengths=packing.padded(response_lengths[pair], room, 1),
            weights=packing.padded(np.full(len(pair), 1 / count, np.float32), room, 0),
            pair=packing.padded(pair, room, count),
            number=packing.padded(numbers[pair].astype(np.int32), room, 0),
        )
        microbatches.append(microbatch)
    return microbatches


def sum_by_response(
    tokens: Float[Array, "shards targets"], owner: Int[Array, "shards targets"], pairs: int
) -> Float[Array, "pairs 2"]:
    """Sum a figure of tokens over each response.

    A sum over a comparison with all responses has one order on any device; a scatter has none.
    """
    is_of_response = owner[..., None] == jnp.arange(2 * pairs)
    sums = jnp.sum(jnp.where(is_of_response, tokens[..., None], 0.0), axis=(0, 1))
    return sums.reshape(pairs, 2)


def response_logprobs(
    model: Model, params: dict, microbatch: PreferenceMicrobatch
) -> Float[Array, "pairs 2"]:
    """Return log p of each response given its prompt, its end token included, in nats."""
    logprobs, _ = scoring.token_logprobs(model, params, microbatch.packed, microbatch.targets)
    return sum_by_response(logprobs, microbatch.owner, len(microbatch.pair))


def read_pairs(model: Model, params: dict, part: LearningPart) -> PairLogprobs:
    """Read a microbatch with the policy, and compare it with the reference."""
    _, microbatch = part
    reading = scoring.read_tokens(model, params, microbatch.packed, microbatch.targets)
    return compare_pairs(reading, part)


def compare_pairs(reading: TokenReading, part: LearningPart) -> PairLogprobs:
    """Compare what the policy makes of a microbatch with what the reference does."""
    reference, microbatch = part
    policy = sum_by_response(reading.logprobs, microbatch.owner, len(microbatch.pair))
    return PairLogprobs(
        policy=policy,
        log_ratios=policy - reference[microbatch.number],
        entropy=jnp.sum(microbatch.token_weights * reading.entropy),
    )


def pair_losses(
    dpo: DPO, log_ratios: Float[Array, "pairs 2"], lengths: Float[Array, "pairs 2"]
) -> Float[Array, " pairs"]:
    """Return the loss of each pair by the loss that the config names."""
    if dpo.loss == "ipo":
        return losses.ipo_losses(log_ratios, lengths, dpo.beta)
    return losses.sigmoid_losses(log_ratios, dpo.beta, dpo.label_smoothing)


def loss_fn(
    model: Model, dpo: DPO, params: dict, part: LearningPart
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of a microbatch, and its metrics."""
    _, microbatch = part
    reading = scoring.read_tokens(model, params, microbatch.packed, microbatch.targets)
    pairs = compare_pairs(reading, part)
    loss = jnp.sum(microbatch.weights * pair_losses(dpo, pairs.log_ratios, microbatch.lengths))
    metrics = losses.implicit_reward_metrics(
        pairs.policy, pairs.log_ratios, microbatch.weights, dpo.beta
    )
    metrics = {"loss": loss, **metrics, "entropy": pairs.entropy}
    return losses.add_load_balancing(
        loss,
        metrics,
        reading.load_balancing,
        microbatch.token_weights,
        model.load_balancing_coef,
    )


def response_lengths(rows: Rows) -> Float[np.ndarray, "all_pairs 2"]:
    """Return the tokens of each response, its end token included."""
    lengths = np.stack([rows[f"{side}_length"] for side in SIDES], axis=1)
    return (lengths - rows["prompt_length"][:, None]).astype(np.float32)


def figures_of(
    dpo: DPO,
    log_ratios: Float[np.ndarray, "all_pairs 2"],
    lengths: Float[np.ndarray, "all_pairs 2"],
) -> dict[str, float]:
    """Return accuracy, share of ties (not correct), margin, loss and count of comparisons."""
    difference = dpo.beta * (log_ratios[:, 0] - log_ratios[:, 1]).astype(np.float64)
    return {
        **comparisons.agreement(difference),
        "margin": difference.mean(),
        "loss": float(pair_losses(dpo, jnp.asarray(log_ratios), jnp.asarray(lengths)).mean()),
        "comparisons": len(difference),
    }


def logprobs_alone(
    model: Model,
    params: dict,
    tokens: Int[Array, "sequences width"],
    lengths: Int[Array, " sequences"],
    prompt_lengths: Int[Array, " sequences"],
) -> Float[Array, " sequences"]:
    """Read each response alone in a row, behind its pads: what `response_logprobs` must equal."""
    packed = scoring.pack_alone(tokens, lengths)
    targets = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logprobs, _ = scoring.token_logprobs(model, params, packed, targets)
    is_response = (packed.segments > 0) & (packed.positions >= prompt_lengths[:, None])
    return jnp.sum(jnp.where(is_response, logprobs, 0.0), axis=1)


def check_packing(
    config: Config,
    read: ReadPairs,
    params: dict,
    rows: Rows,
    mesh: Mesh,
    ladder: packing.Ladder = packing.fine,
) -> None:
    """Check that some responses are as probable packed as they are alone, behind their pads.

    Raises:
      UserError: with the largest difference, per token of a response.
    """
    some = {name: array[:CHECKED_PAIRS] for name, array in rows.items()}
    packed = comparisons.read_rows(
        read,
        pack_minibatch,
        params,
        some,
        config.microbatch_tokens,
        mesh,
        ladder,
        config.data.batch,
    )
    read_alone = jax.jit(functools.partial(logprobs_alone, config.model))
    sequences = (*interleave(some), np.repeat(some["prompt_length"], 2))
    alone = sharding.on_host(read_alone(params, *sharding.shard_batch(sequences, mesh)))
    changes = (alone.reshape(-1, 2) - packed) / response_lengths(some)
    scoring.check_packing("response's log-probability, per token,", changes, config.model)
