"""What PPO reads: prompts, and text for the pretraining gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from alignjax.algorithms import lm
from alignjax.algorithms.experience import longest_sequence, pack_minibatch
from alignjax.algorithms.lm import TextMicrobatch
from alignjax.algorithms.stage import RunInputs
from alignjax.config import Config
from alignjax.data import encoding, ladders, mixture, packing
from alignjax.machine import sharding

Mesh = jax.sharding.Mesh


@dataclass(frozen=True, kw_only=True)
class HeldoutPrompts:
    """Prompts that are only answered: as rows, and as arrays of tokens."""

    rows: list[dict]
    arrays: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PromptData:
    """The prompts of a run: as rows, and as arrays of tokens."""

    train_rows: list[dict]
    heldout_rows: list[dict]
    heldout: dict[str, Any]  # arrays
    batches: mixture.Batches
    prefetch: mixture.Ahead  # step -> batch of prompts, as narrow as the longest allows

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return the prompts of a step: prompts [batch width], lengths, index [batch]."""
        return self.prefetch.get(step)

    def lengths(self, step: int) -> np.ndarray:
        """Return the lengths of a step's prompts, [batch]."""
        return self.batches.get(step)["lengths"]


@dataclass(frozen=True, kw_only=True)
class PretrainingText:
    """Text for the pretraining gradient, and text on which the alignment tax is measured."""

    batches: mixture.Batches | None = None  # None: there is no pretraining gradient
    prefetch: mixture.Ahead | None = None  # number of the update -> microbatches
    heldout: dict[str, Any] | None = None
    ladder: packing.Ladder = packing.fine  # the shapes of microbatches
    mesh: Mesh | None = None

    def microbatches(self, update: int) -> list[TextMicrobatch]:
        """Return the text of an update, on the mesh; none without a pretraining gradient."""
        if self.prefetch is None:
            return []
        return sharding.shard_batch(self.prefetch.get(update), self.mesh)

    def rows(self, update: int) -> dict[str, np.ndarray]:
        """Return the text of an update as arrays by name."""
        return {} if self.batches is None else self.batches.get(update)


def pretraining_rows(config: Config) -> int:
    """Return how many windows of text the pretraining gradient of an update reads."""
    minibatch = config.data.batch * config.ppo.samples_per_prompt // config.ppo.minibatches
    return int(config.ppo.pretrain_ratio * minibatch)


def load_prompts(config: Config, inputs: RunInputs) -> PromptData:
    """Read and tokenise the prompts."""
    data = config.data
    sets = mixture.sets(config, "prompts", data.train, data.heldout, inputs.say)
    train_rows = [row for rows in sets.train for row in rows]
    heldout_rows = sets.heldout_rows
    heldout = mixture.encoded(
        config, heldout_rows, "prompts", data.max_length, inputs.tokenizer, inputs.say
    )
    batches = mixture.batches(
        config, sets, "prompts", data.max_length, data.batch, inputs.tokenizer, inputs.say
    )
    return PromptData(
        train_rows=train_rows,
        heldout_rows=heldout_rows,
        heldout=heldout,
        batches=batches,
        prefetch=mixture.Ahead(lambda step: encoding.narrowed(batches.get(step))),
    )


def load_heldout_prompts(config: Config, source: str, inputs: RunInputs) -> HeldoutPrompts:
    """Read and tokenise the held-out prompts of a source."""
    sets = mixture.sets(config, "prompts", "", source, inputs.say)
    rows = sets.heldout_rows
    arrays = mixture.encoded(
        config, rows, "prompts", config.data.max_length, inputs.tokenizer, inputs.say
    )
    return HeldoutPrompts(rows=rows, arrays=arrays)


def choose_ladder(
    config: Config,
    prompt_lengths: Callable[[int], np.ndarray],
    row_shards: int,
    behind: int,
) -> packing.Ladder:
    """Return the shapes of microbatches for a run's prompts with responses of any length.

    How long responses will be is not known, so those of the sample's minibatches are of all mean
    lengths up to the longest.

    Args:
      config: of the run.
      prompt_lengths: step -> lengths of its prompts.
      row_shards: devices that the rows of a microbatch lie over.
      behind: tokens behind each response that only reward models read.
    """
    ppo = config.ppo
    random = np.random.default_rng(0)
    count = ladders.sample_size(config.data.batch * ppo.samples_per_prompt)
    rollouts = []
    for number in range(count):
        prompts = np.repeat(prompt_lengths(number), ppo.samples_per_prompt)
        mean = (number + 1) / count * ppo.response_length
        lengths = np.ceil(2 * mean * random.random(len(prompts))).astype(np.int32)
        rollouts.append({"prompts": prompts, "responses": lengths.clip(1, ppo.response_length)})
    longest = np.full(len(prompts), ppo.response_length, np.int32)
    rollouts.append({"prompts": prompts, "responses": longest})
    first_minibatch = np.arange(len(prompts))[:: ppo.minibatches]
    return ladders.for_minibatches(
        rollouts,
        lambda rollout, ladder: pack_minibatch(
            config,
            rollout["prompts"],
            rollout["responses"],
            first_minibatch,
            row_shards,
            behind,
            ladder,
        ),
        ladders.costs_of(config.model, "lm", config.microbatch_tokens),
        row_shards,
    )


def load_pretraining_text(config: Config, mesh: Mesh, inputs: RunInputs) -> PretrainingText:
    """Read and tokenise the text that the config asks for: to train on, to hold out, or both."""
    ppo = config.ppo
    if not ppo.pretrain_coef and not ppo.pretrain_heldout:
        return PretrainingText()
    train = ppo.pretrain_data if ppo.pretrain_coef else ""
    sets = mixture.sets(config, "text", train, ppo.pretrain_heldout, inputs.say)
    length = longest_sequence(config)
    heldout = None
    if ppo.pretrain_heldout:
        heldout = mixture.encoded(
            config, sets.heldout_rows, "text", length, inputs.tokenizer, inputs.say
        )
    row_shards = sharding.row_shards(mesh)
    if not ppo.pretrain_coef:
        ladder = lm.choose_ladder(config, None, heldout, row_shards)
        return PretrainingText(heldout=heldout, ladder=ladder)
    batches = mixture.batches(
        config, sets, "text", length, pretraining_rows(config), inputs.tokenizer, inputs.say
    )
    ladder = lm.choose_ladder(config, batches, heldout, row_shards)
    prefetch = mixture.Ahead(
        lambda update: lm.pack_minibatch(
            batches.get(update), config.microbatch_tokens, row_shards, ladder
        )
    )
    return PretrainingText(
        batches=batches, prefetch=prefetch, heldout=heldout, ladder=ladder, mesh=mesh
    )
