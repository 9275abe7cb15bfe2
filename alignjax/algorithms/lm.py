"""Language modelling: pretraining on text, and fine-tuning (SFT) on conversations.

In pretraining every token is a target; in SFT the assistant's tokens are.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms import losses, optimisation
from alignjax.algorithms.stage import (
    Evaluation,
    RunInputs,
    State,
    StepDetails,
)
from alignjax.algorithms.supervised import SupervisedStage
from alignjax.config import Config, Model
from alignjax.data import ladders, mixture, packing
from alignjax.machine import sharding
from alignjax.models import lora, scoring
from alignjax.models.scoring import PackedTokens

Mesh = jax.sharding.Mesh


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TextMicrobatch:
    """Packed examples and their targets."""

    packed: PackedTokens
    # Places of target tokens in each device's rows, see `scoring.at_targets`.
    targets: Int[Array, "shards targets"]
    weights: Float[Array, "shards targets"]  # sum to 1 over the minibatch; 0 on padding


@dataclass(frozen=True, kw_only=True)
class TextData:
    """What a language model trains on and is evaluated on."""

    batches: mixture.Batches
    prefetch: mixture.Ahead  # step -> list of microbatches, packed while the device works
    heldout: dict
    ladder: packing.Ladder  # the shapes of microbatches
    tokenizer: PreTrainedTokenizerBase


def pack_minibatch(
    rows: dict[str, np.ndarray],
    microbatch_tokens: int,
    row_shards: int,
    ladder: packing.Ladder = packing.fine,
) -> list[TextMicrobatch]:
    """Pack examples into microbatches, as host arrays; each target counts alike.

    Args:
      rows: tokens, mask (1 on targets), segments (of an example, from 1), [examples tokens].
      microbatch_tokens: tokens of a microbatch, roughly.
      row_shards: devices that the rows of a microbatch lie over.
      ladder: the shapes of microbatches.
    """
    lengths = (rows["segments"] > 0).sum(axis=1)
    count, longest = rows["tokens"].shape
    mask = (rows["mask"] > 0) & (np.arange(longest) > 0)
    target_count = max(mask.sum(), 1)
    examples = [[number] for number in range(count)]
    layouts = packing.pack(
        lengths,
        examples,
        longest,
        microbatch_tokens,
        row_shards,
        ladder,
        counts=mask.sum(axis=1),
    )
    microbatches = []
    for layout in layouts:
        targets, real = packing.targets(layout.take(mask), row_shards, layout.target_room)
        # Segments of different examples in a row must differ.
        segments = layout.sequence * (longest + 1) + layout.take(rows["segments"])
        packed = PackedTokens(
            tokens=layout.take(rows["tokens"]),
            positions=layout.place,
            segments=np.where(layout.real, segments, 0),
        )
        weights = real.astype(np.float32) / target_count
        microbatches.append(TextMicrobatch(packed=packed, targets=targets, weights=weights))
    return microbatches


def loss_fn(
    model: Model, params: dict, microbatch: TextMicrobatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted next-token loss of a microbatch, and its metrics."""
    weights = microbatch.weights
    reading = scoring.read_tokens(model, params, microbatch.packed, microbatch.targets)
    loss, metrics = losses.lm_loss(reading.logprobs, weights)
    metrics |= {"entropy": jnp.sum(weights * reading.entropy)}
    return losses.add_load_balancing(
        loss, metrics, reading.load_balancing, weights, model.load_balancing_coef
    )


def heldout_loss(
    compiled_loss: Callable[[dict, TextMicrobatch], tuple[jax.Array, dict]],
    params: dict,
    rows: dict,
    batch_size: int,
    microbatch_tokens: int,
    mesh: Mesh,
    ladder: packing.Ladder = packing.fine,
) -> float:
    """Return the mean loss per target of all rows, in nats."""
    row_shards = sharding.row_shards(mesh)
    total = 0.0
    target_count = 0.0
    for part in mixture.in_order(rows, batch_size):
        part_targets = float((part["mask"][:, 1:] > 0).sum())
        part_loss = 0.0
        for microbatch in pack_minibatch(part, microbatch_tokens, row_shards, ladder):
            _, metrics = compiled_loss(params, sharding.shard_batch(microbatch, mesh))
            part_loss += float(metrics["loss"])
        total += part_targets * part_loss
        target_count += part_targets
    return total / target_count


def describe_example(tokenizer: PreTrainedTokenizerBase, rows: dict, number: int) -> dict[str, str]:
    """Return an example as text, and the part of it that is trained."""
    tokens = rows["tokens"][number]
    real = rows["segments"][number] > 0
    trained = rows["mask"][number] > 0
    return {"text": tokenizer.decode(tokens[real]), "targets": tokenizer.decode(tokens[trained])}


def longest_rows(count: int, length: int) -> dict[str, np.ndarray]:
    """Return rows of text that are as long as they may be, for planning."""
    ones = np.ones((count, length), np.int32)
    return {"tokens": ones, "mask": ones, "segments": ones}


class LanguageModelling(SupervisedStage):
    """Pretraining and SFT: one model, one loss."""

    head = "lm"
    progress_metrics = ("loss",)

    @staticmethod
    def make_loss(config: Config) -> optimisation.LossFunction:
        """Return the next-token loss."""
        return functools.partial(loss_fn, config.model)

    @functools.cached_property
    def compiled_loss(self) -> Callable[[dict, TextMicrobatch], tuple[jax.Array, dict]]:
        """Return the loss without its gradient, for held-out text."""
        return jax.jit(self.loss_fn)

    @property
    def evaluation_program(self) -> Callable[[dict, TextMicrobatch], tuple[jax.Array, dict]]:
        """Return the loss of held-out text."""
        return self.compiled_loss

    def evaluated_microbatches(self, sampled: list[TextMicrobatch]) -> Iterable[TextMicrobatch]:
        """Yield microbatches of held-out text."""
        shards = sharding.row_shards(self.mesh)
        budget = self.config.microbatch_tokens
        for rows in ladders.samples(None, [self.data.heldout], self.config.data.batch):
            yield from pack_minibatch(rows, budget, shards, self.data.ladder)

    @staticmethod
    def load_data(config: Config, mesh: Mesh, inputs: RunInputs) -> TextData:
        """Read and tokenise what the config trains on and holds out."""
        return load_text(config, mesh, inputs)

    def details(self, step: int, observation: None) -> StepDetails:
        """Return a sample of the step's batch, every `sample_every` steps."""
        if step % self.config.sample_every:
            return StepDetails(metrics={}, samples=[])
        number = self.data.batches.order(step)[0]
        sample = describe_example(self.data.tokenizer, self.data.batches.rows, number)
        return StepDetails(metrics={}, samples=[sample])

    def evaluate(self, state: State) -> Evaluation:
        """Return the loss on held-out targets and the number of parameters."""
        params = self.params_of(state)
        loss = heldout_loss(
            self.compiled_loss,
            params,
            self.data.heldout,
            self.config.data.batch,
            self.config.microbatch_tokens,
            self.mesh,
            self.data.ladder,
        )
        figures = {"heldout_loss": loss, "parameters": lora.count(params)}
        if self.base is not None:
            figures["trained_parameters"] = lora.count(state["model"].params)
        return Evaluation(figures=figures, rows=[])

    def table(self, figures: dict[str, float]) -> list[tuple[str, str]]:
        """Return the result of a run at a glance."""
        parameters = f"{figures['parameters']:,}"
        if "trained_parameters" in figures:
            parameters += f", of which {figures['trained_parameters']:,} are trained"
        return [
            ("parameters", parameters),
            ("loss on held-out targets", f"{figures['heldout_loss']:.3f} nats a token"),
        ]

    def longest_microbatches(self) -> list[TextMicrobatch]:
        """Return a minibatch of examples that are as long as they may be."""
        rows = longest_rows(self.config.data.batch, self.config.data.max_length)
        return pack_minibatch(rows, self.config.microbatch_tokens, sharding.row_shards(self.mesh))


def load_text(config: Config, mesh: Mesh, inputs: RunInputs) -> TextData:
    """Read and tokenise what the config trains on and holds out."""
    data = config.data
    sets = mixture.sets(config, data.kind, data.train, data.heldout, inputs.say)
    heldout = mixture.encoded(
        config, sets.heldout_rows, data.kind, data.max_length, inputs.tokenizer, inputs.say
    )
    batches = mixture.batches(
        config, sets, data.kind, data.max_length, data.batch, inputs.tokenizer, inputs.say
    )
    row_shards = sharding.row_shards(mesh)
    ladder = choose_ladder(config, batches, heldout, row_shards)
    prefetch = mixture.Ahead(
        lambda step: pack_minibatch(batches.get(step), config.microbatch_tokens, row_shards, ladder)
    )
    return TextData(
        batches=batches,
        prefetch=prefetch,
        heldout=heldout,
        ladder=ladder,
        tokenizer=inputs.tokenizer,
    )


def choose_ladder(
    config: Config, batches: mixture.Batches | None, heldout: dict | None, row_shards: int
) -> packing.Ladder:
    """Return the shapes for the text that a run trains on and holds out."""
    return ladders.for_minibatches(
        ladders.samples(batches, [heldout] if heldout else [], config.data.batch),
        lambda rows, ladder: pack_minibatch(rows, config.microbatch_tokens, row_shards, ladder),
        ladders.costs_of(config.model, "lm", config.microbatch_tokens),
        row_shards,
    )
