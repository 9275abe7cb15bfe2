"""The ranking loss, of which preference model pretraining (PMP) and RM are two configs.

A comparison is a pair of sequences, chosen and rejected. In shapes, `pairs` counts the pairs of
a batch.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms import comparisons, losses, optimisation
from alignjax.algorithms.comparisons import SIDES, ReadPairs, Rows, interleave
from alignjax.algorithms.stage import (
    Evaluation,
    RunInputs,
    State,
    StepDetails,
)
from alignjax.algorithms.supervised import SupervisedStage
from alignjax.config import Config, Model
from alignjax.config import Ranking as RankingConfig
from alignjax.data import ladders, mixture, packing, sources
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.models.scoring import PackedTokens
from alignjax.weights.score_place import notice_of_change

Mesh = jax.sharding.Mesh

CHECKED_PAIRS = 8  # pairs whose responses the check of step 0 scores once more, each alone


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PairMicrobatch:
    """Packed comparisons: chosen and rejected responses alike are sequences among others."""

    packed: PackedTokens
    ends: Int[Array, "pairs 2"]  # places of the last tokens, chosen first, in flattened rows
    margin: Float[Array, " pairs"]
    weights: Float[Array, " pairs"]  # 1 / pairs of the batch; 0 on padding
    pair: Int[Array, " pairs"]  # number in the batch; the count of pairs on padding


class ScoredPairs(NamedTuple):
    """The scores of a microbatch, and the pairs that they are of."""

    pair: Int[Array, " pairs"]
    scores: Float[Array, "pairs 2"]


@dataclass(frozen=True, kw_only=True)
class RankingData:
    """What a ranking model trains on and is evaluated on."""

    batches: mixture.Batches
    prefetch: mixture.Ahead  # step -> list of microbatches, packed while the device works
    heldout: dict[str, Rows]  # source -> comparisons
    demonstrations: dict | None  # conversations whose mean score is shifted to 0
    ladder: packing.Ladder  # the shapes of microbatches
    tokenizer: PreTrainedTokenizerBase


def pack_minibatch(
    rows: Rows,
    microbatch_tokens: int,
    row_shards: int,
    ladder: packing.Ladder = packing.fine,
    room: int = 0,
) -> list[PairMicrobatch]:
    """Pack comparisons into microbatches, as host arrays; a pair stays in one microbatch.

    Args:
      rows: chosen and rejected [pairs tokens], their lengths and margins [pairs].
      microbatch_tokens: tokens of a microbatch, roughly.
      row_shards: devices that the rows of a microbatch lie over.
      ladder: the shapes of microbatches.
      room: for how many pairs; 0: for those of `rows`.
    """
    tokens, lengths = interleave(rows)
    count = len(rows["margin"])
    room = max(room, count)
    longest = tokens.shape[1]
    microbatches = []
    for layout in comparisons.lay_out(lengths, longest, microbatch_tokens, row_shards, ladder):
        pair = layout.members[::2] // 2
        packed = PackedTokens(
            tokens=layout.take(tokens), positions=layout.place, segments=layout.sequence + 1
        )
        weights = np.full(len(pair), 1 / count, np.float32)
        microbatch = PairMicrobatch(
            packed=packed,
            ends=packing.padded(layout.ends().reshape(-1, 2), room, 0),
            margin=packing.padded(rows["margin"][pair], room, 0),
            weights=packing.padded(weights, room, 0),
            pair=packing.padded(pair, room, count),
        )
        microbatches.append(microbatch)
    return microbatches


def score_pairs(model: Model, params: dict, microbatch: PairMicrobatch) -> Float[Array, "pairs 2"]:
    """Return the scores of the chosen and rejected responses, read at their end tokens."""
    return scoring.sequence_scores(model, params, microbatch.packed, microbatch.ends)


def loss_fn(
    model: Model, ranking: RankingConfig, params: dict, microbatch: PairMicrobatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the ranking loss of a microbatch, and its metrics."""
    reading = scoring.read_scores(model, params, microbatch.packed, microbatch.ends)
    margins = microbatch.margin if ranking.margin else 0.0
    loss, metrics = losses.ranking_loss(
        reading.scores[:, 0],
        reading.scores[:, 1],
        microbatch.weights,
        margins,
        ranking.centring,
    )
    of_sequences = jnp.repeat(microbatch.weights[:, None] / 2, 2, axis=1)
    return losses.add_load_balancing(
        loss, metrics, reading.load_balancing, of_sequences, model.load_balancing_coef
    )


def score_rows(
    score_fn: ReadPairs,
    params: dict,
    rows: Rows,
    microbatch_tokens: int,
    mesh: Mesh,
    ladder: packing.Ladder = packing.fine,
    room: int = 0,
) -> np.ndarray:
    """Return the scores [pairs 2] of comparisons by a compiled `score_pairs`."""
    return comparisons.read_rows(
        score_fn, pack_minibatch, params, rows, microbatch_tokens, mesh, ladder, room
    )


def score_all(
    score_fn: ReadPairs,
    params: dict,
    rows: Rows,
    batch_size: int,
    microbatch_tokens: int,
    mesh: Mesh,
    ladder: packing.Ladder = packing.fine,
) -> np.ndarray:
    """Return the scores [pairs 2] of all rows in float64, `batch_size` pairs at a time."""
    scores = comparisons.read_all(
        score_fn, pack_minibatch, params, rows, batch_size, microbatch_tokens, mesh, ladder
    )
    return scores.astype(np.float64)


def heldout_figures(
    score_fn: ReadPairs,
    params: dict,
    rows: Rows,
    batch_size: int,
    microbatch_tokens: int,
    mesh: Mesh,
    ladder: packing.Ladder = packing.fine,
) -> dict[str, float]:
    """Return the figures of `figures_of` for all rows."""
    scores = score_all(score_fn, params, rows, batch_size, microbatch_tokens, mesh, ladder)
    return figures_of(scores[:, 0] - scores[:, 1])


def figures_of(difference: np.ndarray) -> dict[str, float]:
    """Return accuracy, share of ties (not correct), mean loss and count of comparisons.

    `difference` [pairs] is the score of the chosen response less that of the rejected one.
    """
    return {
        **comparisons.agreement(difference),
        "loss": np.logaddexp(0, -difference).mean(),
        "comparisons": len(difference),
    }


def mean_score(
    score_fn: ReadPairs,
    params: dict,
    rows: dict,
    batch_size: int,
    microbatch_tokens: int,
    mesh: Mesh,
    ladder: packing.Ladder = packing.fine,
) -> float:
    """Return the mean score of conversations at their last tokens.

    Each conversation is a pair with itself, so the program of the pairs serves.
    """
    lengths = (rows["segments"][:] > 0).sum(axis=1)
    pairs = {"margin": np.zeros(len(lengths), np.float32)}
    for side in SIDES:
        pairs[side] = rows["tokens"]
        pairs[f"{side}_length"] = lengths
    scores = score_all(score_fn, params, pairs, batch_size, microbatch_tokens, mesh, ladder)
    return float(scores[:, 0].mean())


def check_packing(
    config: Config,
    score_fn: ReadPairs,
    params: dict,
    rows: Rows,
    mesh: Mesh,
    ladder: packing.Ladder = packing.fine,
) -> None:
    """Check that some pairs score packed as they score alone, each behind its pads.

    Raises:
      UserError: with the largest difference.
    """
    some = {name: array[:CHECKED_PAIRS] for name, array in rows.items()}
    packed = score_rows(
        score_fn, params, some, config.microbatch_tokens, mesh, ladder, config.data.batch
    )
    score_alone = jax.jit(functools.partial(scoring.score_alone, config.model))
    alone = score_alone(params, *sharding.shard_batch(interleave(some), mesh))
    scoring.check_packing("score", sharding.on_host(alone).reshape(-1, 2) - packed, config.model)


def shift_scores(params: dict, amount: float) -> dict:
    """Return the parameters with `amount` added to the head's bias, and so to every score."""
    head = params["head"]
    return {**params, "head": {**head, "bias": head["bias"] + np.float32(amount)}}


class Ranking(SupervisedStage):
    """PMP and RM: one model with a scalar head, one loss."""

    head = "scalar"
    progress_metrics = ("loss", "accuracy")

    @staticmethod
    def make_loss(config: Config) -> optimisation.LossFunction:
        """Return the ranking loss."""
        return functools.partial(loss_fn, config.model, config.ranking)

    @functools.cached_property
    def score_fn(self) -> ReadPairs:
        """Return the compiled scores of a microbatch."""
        return jax.jit(functools.partial(score_pairs, self.config.model))

    @property
    def evaluation_program(self) -> ReadPairs:
        """Return the scores of a microbatch."""
        return self.score_fn

    def evaluated_microbatches(self, sampled: list[PairMicrobatch]) -> Iterable[PairMicrobatch]:
        """Yield those of which the steps make a sample, and microbatches of held-out pairs."""
        yield from sampled
        shards = sharding.row_shards(self.mesh)
        budget = self.config.microbatch_tokens
        room = self.config.data.batch
        for rows in ladders.samples(None, self.data.heldout.values(), room):
            yield from pack_minibatch(rows, budget, shards, self.data.ladder, room)

    @staticmethod
    def load_data(config: Config, mesh: Mesh, inputs: RunInputs) -> RankingData:
        """Read and tokenise the comparisons and demonstrations."""
        return load_comparisons(config, mesh, inputs)

    def observe(
        self, state: State, step: int, microbatches: list[PairMicrobatch]
    ) -> ScoredPairs | None:
        """Check the packing in step 0; score a microbatch every `sample_every` steps."""
        params = self.params_of(state)
        if step == 0:
            rows = self.data.batches.get(step)
            check_packing(self.config, self.score_fn, params, rows, self.mesh, self.data.ladder)
        scored = None
        if step % self.config.sample_every == 0:
            scores = self.score_fn(params, microbatches[0])
            scored = ScoredPairs(microbatches[0].pair, scores)
        self.phases.mark("score", scored)
        return scored

    def details(self, step: int, observation: ScoredPairs | None) -> StepDetails:
        """Return the first pair of a microbatch with its scores, if it was scored."""
        if observation is None:
            return StepDetails(metrics={}, samples=[])
        pair = sharding.on_host(observation.pair)[0]
        number = self.data.batches.order(step)[pair]
        scores = sharding.on_host(observation.scores)[0]
        sample = comparisons.describe(
            self.data.tokenizer, self.data.batches.rows, number, "score", scores
        )
        return StepDetails(metrics={}, samples=[sample])

    def finalise(self, state: State) -> State:
        """Shift all scores so that demonstrations score 0 on average, if there are any."""
        if self.data.demonstrations is None:
            return state
        score = self.demonstration_score(self.params_of(state))
        shifted = shift_scores(state["model"].params, -score)
        return {"model": state["model"]._replace(params=shifted)}

    def demonstration_score(self, params: dict) -> float:
        """Return the mean score of the demonstrations."""
        return mean_score(
            self.score_fn,
            params,
            self.data.demonstrations,
            self.config.data.batch,
            self.config.microbatch_tokens,
            self.mesh,
            self.data.ladder,
        )

    def evaluate(self, state: State) -> Evaluation:
        """Return the figures of each held-out source, and of the demonstrations."""
        params = self.params_of(state)
        figures = {}
        for source, rows in self.data.heldout.items():
            source_figures = heldout_figures(
                self.score_fn,
                params,
                rows,
                self.config.data.batch,
                self.config.microbatch_tokens,
                self.mesh,
                self.data.ladder,
            )
            figures |= {f"{name}/{source}": value for name, value in source_figures.items()}
        if self.data.demonstrations is not None:
            figures["demonstrations/score"] = self.demonstration_score(params)
            figures["shift"] = float(params["head"]["bias"][0])
        return Evaluation(figures=figures, rows=[])

    def table(self, figures: dict[str, float]) -> list[tuple[str, str]]:
        """Return the result of a run at a glance."""
        lines = [
            comparisons.accuracy_line(figures, source, "held-out accuracy")
            for source in self.data.heldout
        ]
        if self.data.demonstrations is not None:
            score = f"{figures['demonstrations/score']:z.4f}, after the shift"
            lines.append(("mean score of demonstrations", score))
        return lines

    def longest_microbatches(self) -> list[PairMicrobatch]:
        """Return a minibatch of comparisons that are as long as they may be."""
        rows = comparisons.longest_rows(self.config.data.batch, self.config.data.max_length)
        return pack_minibatch(rows, self.config.microbatch_tokens, sharding.row_shards(self.mesh))


def load_comparisons(config: Config, mesh: Mesh, inputs: RunInputs) -> RankingData:
    """Read and tokenise what the config trains on, holds out, and takes as demonstrations."""
    if "model" in inputs.parents:
        notice = notice_of_change(inputs.parents["model"], inputs.tokenizer)
        if notice:
            inputs.say(f"{config.name}: {notice}")
    read = comparisons.load(config, inputs)
    demonstrations = None
    if config.ranking.demonstrations:
        options = sources.read_options(config, "conversations", inputs.say)
        rows = sources.load(config.ranking.demonstrations, "conversations", "heldout", options)
        demonstrations = mixture.encoded(
            config,
            rows,
            "conversations",
            config.data.max_length,
            inputs.tokenizer,
            inputs.say,
        )
    row_shards = sharding.row_shards(mesh)
    ladder = comparisons.choose_ladder(config, read, "scalar", pack_minibatch, row_shards)
    prefetch = mixture.Ahead(
        lambda step: pack_minibatch(
            read.batches.get(step), config.microbatch_tokens, row_shards, ladder
        )
    )
    return RankingData(
        batches=read.batches,
        prefetch=prefetch,
        heldout=read.heldout,
        demonstrations=demonstrations,
        ladder=ladder,
        tokenizer=inputs.tokenizer,
    )
