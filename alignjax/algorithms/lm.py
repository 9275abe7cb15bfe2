"""Language modelling: pretraining on text, and fine-tuning (SFT) on conversations.

In pretraining every token is a target; in SFT the assistant's tokens are.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms import losses, optimisation
from alignjax.algorithms.optimisation import MinibatchUpdate, TrainState
from alignjax.algorithms.stage import (
    Evaluation,
    Program,
    RunInputs,
    State,
    StepDetails,
    StepOutput,
)
from alignjax.config import Config, Model
from alignjax.data import encoding, mixture, packing
from alignjax.machine import sharding
from alignjax.machine.profile import Phases
from alignjax.models import scoring
from alignjax.models.scoring import PackedTokens
from alignjax.weights import roles

Mesh = jax.sharding.Mesh


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TextMicrobatch:
    """Packed examples and their targets."""

    packed: PackedTokens
    targets: Int[Array, "rows targets"]  # places of target tokens in their rows
    weights: Float[Array, "rows targets"]  # sum to 1 over the minibatch; 0 on padding


@dataclass(frozen=True, kw_only=True)
class TextData:
    """What a language model trains on and is evaluated on."""

    batches: mixture.Batches
    prefetch: mixture.Ahead  # step -> list of microbatches, packed while the device works
    heldout: dict
    tokenizer: PreTrainedTokenizerBase


def pack_minibatch(
    rows: dict[str, np.ndarray], microbatch_tokens: int, row_shards: int
) -> list[TextMicrobatch]:
    """Pack examples into microbatches, as host arrays; each target counts alike.

    Args:
      rows: tokens, mask (1 on targets), segments (of an example, from 1), [examples tokens].
      microbatch_tokens: tokens of a microbatch, roughly.
      row_shards: devices that the rows of a microbatch lie over.
    """
    lengths = (rows["segments"] > 0).sum(axis=1)
    count, longest = rows["tokens"].shape
    mask = (rows["mask"] > 0) & (np.arange(longest) > 0)
    target_count = max(mask.sum(), 1)
    examples = [[number] for number in range(count)]
    microbatches = []
    for layout in packing.pack(lengths, examples, longest, microbatch_tokens, row_shards):
        targets, real = packing.targets(layout.take(mask))
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
    logprobs, entropy = scoring.token_logprobs(model, params, microbatch.packed, microbatch.targets)
    loss, metrics = losses.lm_loss(logprobs, microbatch.weights)
    return loss, metrics | {"entropy": jnp.sum(microbatch.weights * entropy)}


def heldout_loss(
    compiled_loss: Callable[[dict, TextMicrobatch], tuple[jax.Array, dict]],
    params: dict,
    rows: dict,
    batch_size: int,
    microbatch_tokens: int,
    mesh: Mesh,
) -> float:
    """Return the mean loss per target of all rows, in nats."""
    total = 0.0
    target_count = 0.0
    for part in mixture.in_order(rows, batch_size):
        part_targets = float((part["mask"][:, 1:] > 0).sum())
        part_loss = 0.0
        for microbatch in pack_minibatch(part, microbatch_tokens, sharding.row_shards(mesh)):
            loss, _ = compiled_loss(params, sharding.shard_batch(microbatch, mesh))
            part_loss += float(loss)
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


def supervised_programs(
    update: MinibatchUpdate, state: TrainState, microbatches: list[Any], mesh: Mesh
) -> Iterable[Program]:
    """Yield the two programs of a step by one loss; the largest microbatch stands for all."""
    microbatch = sharding.abstract_batch(microbatches[0], mesh)
    total = abstract_total(update.accumulate, state.params, microbatch, mesh)
    yield Program(
        name="gradient",
        calls=len(microbatches),
        function=update.accumulate,
        arguments=(total, state.params, microbatch),
    )
    yield Program(name="optimiser step", calls=1, function=update.update, arguments=(state, total))


def abstract_total(
    accumulate: optimisation.Accumulate, params: dict, microbatch: Any, mesh: Mesh
) -> optimisation.GradientSum:
    """Return the shapes of a sum over microbatches: a gradient laid out as its parameters."""
    metrics = jax.eval_shape(accumulate, None, params, microbatch).metrics
    replicated = sharding.replicated(mesh)
    metrics = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), metrics
    )
    return optimisation.GradientSum(params, metrics)


class LanguageModelling:
    """Pretraining and SFT: one model, one loss."""

    progress_metrics = ("loss",)

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        *,
        data: TextData | None = None,
        parent: Any = None,
        phases: Phases | None = None,
    ):
        self.config = config
        self.mesh = mesh
        self.data = data
        self.parent = parent
        self.phases = phases or Phases()
        self.num_steps = config.steps or (data.batches.epoch if data else 1)
        self.optimiser = optimisation.make_optimiser(config.optimiser, self.num_steps)
        abstract = optimisation.abstract_state(config.model, "lm", self.optimiser, mesh)
        self.abstract_state: State = {"model": abstract}
        loss = functools.partial(loss_fn, config.model)
        self.update = MinibatchUpdate(loss, self.optimiser, abstract)
        self.loss = jax.jit(loss)

    @classmethod
    def load(cls, config: Config, mesh: Mesh, inputs: RunInputs) -> Self:
        """Read and tokenise the data, and return a stage that can train."""
        data = load_text(config, mesh, inputs)
        parent = inputs.parents.get("model")
        return cls(config, mesh, data=data, parent=parent, phases=inputs.phases)

    @classmethod
    def plan(cls, config: Config, mesh: Mesh) -> Self:
        """Return a stage that can only be compiled."""
        return cls(config, mesh)

    def init_state(self) -> State:
        """Return the state of a fresh model, or of the parent's."""
        key = jax.random.key(self.config.seed)
        params = roles.load(self.config.model, "lm", self.mesh, key, self.parent)
        abstract = self.abstract_state["model"]
        return {"model": optimisation.place_state(params, self.optimiser, abstract)}

    def step(self, state: State, step: int) -> tuple[State, StepOutput]:
        """Take one optimiser step."""
        microbatches = [
            sharding.shard_batch(microbatch, self.mesh)
            for microbatch in self.data.prefetch.get(step)
        ]
        self.phases.mark("data", microbatches)
        model, metrics = self.update(state["model"], microbatches)
        self.phases.mark("update", model)
        output = StepOutput(
            metrics=metrics,
            details=functools.partial(self.details, step),
            batch=functools.partial(self.data.batches.get, step),
        )
        return {"model": model}, output

    def details(self, step: int) -> StepDetails:
        """Return a sample of the step's batch, every `sample_every` steps."""
        if step % self.config.sample_every:
            return StepDetails(metrics={}, samples=[])
        number = self.data.batches.order(step)[0]
        sample = describe_example(self.data.tokenizer, self.data.batches.rows, number)
        return StepDetails(metrics={}, samples=[sample])

    def finalise(self, state: State) -> State:
        """Return the state as it is."""
        return state

    def evaluate(self, state: State) -> Evaluation:
        """Return the loss on held-out targets and the number of parameters."""
        params = state["model"].params
        loss = heldout_loss(
            self.loss,
            params,
            self.data.heldout,
            self.config.data.batch,
            self.config.microbatch_tokens,
            self.mesh,
        )
        parameters = sum(x.size for x in jax.tree.leaves(params))
        return Evaluation(figures={"heldout_loss": loss, "parameters": parameters}, rows=[])

    def evaluate_midway(self, state: State) -> None:
        """Return nothing: a language model is evaluated at the end only."""
        return None

    def table(self, figures: dict[str, float]) -> list[tuple[str, str]]:
        """Return the result of a run at a glance."""
        return [
            ("parameters", f"{figures['parameters']:,}"),
            ("loss on held-out targets", f"{figures['heldout_loss']:.3f} nats a token"),
        ]

    def programs(self) -> Iterable[Program]:
        """Yield the programs of a step on examples that are as long as they may be."""
        rows = longest_rows(self.config.data.batch, self.config.data.max_length)
        microbatches = pack_minibatch(
            rows, self.config.microbatch_tokens, sharding.row_shards(self.mesh)
        )
        return supervised_programs(
            self.update, self.abstract_state["model"], microbatches, self.mesh
        )

    def resident(self) -> dict[str, Any]:
        """Return the shapes of the training state."""
        return {"state": self.abstract_state["model"]}


def load_text(config: Config, mesh: Mesh, inputs: RunInputs) -> TextData:
    """Read and tokenise what the config trains on and holds out."""
    data = config.data
    sets = mixture.sets(config, data.kind, data.train, data.heldout, inputs.say)
    heldout_rows = [row for rows in sets.heldout.values() for row in rows]
    heldout = encoding.encode(
        heldout_rows, data.kind, data.max_length, inputs.tokenizer, inputs.say
    )
    batches = mixture.batches(
        config, sets, data.kind, data.max_length, data.batch, inputs.tokenizer, inputs.say
    )
    row_shards = sharding.row_shards(mesh)
    prefetch = mixture.Ahead(
        lambda step: pack_minibatch(batches.get(step), config.microbatch_tokens, row_shards)
    )
    return TextData(batches=batches, prefetch=prefetch, heldout=heldout, tokenizer=inputs.tokenizer)
