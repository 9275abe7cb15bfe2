"""What PPO reads: prompts, and text for the pretraining gradient."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from alignjax.algorithms import lm
from alignjax.algorithms.experience import longest_sequence
from alignjax.algorithms.lm import TextMicrobatch
from alignjax.algorithms.stage import RunInputs
from alignjax.config import Config
from alignjax.data import encoding, mixture
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
    prefetch: mixture.Ahead  # step -> batch of prompts, as narrow as the longest allows

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return the prompts of a step: prompts [batch width], lengths, index [batch]."""
        return self.prefetch.get(step)


@dataclass(frozen=True, kw_only=True)
class PretrainingText:
    """Text for the pretraining gradient, and text on which the alignment tax is measured."""

    batches: mixture.Batches | None = None  # None: there is no pretraining gradient
    prefetch: mixture.Ahead | None = None  # number of the update -> microbatches
    heldout: dict[str, Any] | None = None
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
    heldout = encoding.encode(
        heldout_rows,
        "prompts",
        data.max_length,
        inputs.tokenizer,
        inputs.say,
        skip=data.on_bad_row == "skip",
    )
    batches = mixture.batches(
        config, sets, "prompts", data.max_length, data.batch, inputs.tokenizer, inputs.say
    )
    return PromptData(
        train_rows=train_rows,
        heldout_rows=heldout_rows,
        heldout=heldout,
        prefetch=mixture.Ahead(lambda step: encoding.narrowed(batches.get(step))),
    )


def load_heldout_prompts(config: Config, source: str, inputs: RunInputs) -> HeldoutPrompts:
    """Read and tokenise the held-out prompts of a source."""
    sets = mixture.sets(config, "prompts", "", source, inputs.say)
    rows = sets.heldout_rows
    arrays = encoding.encode(
        rows,
        "prompts",
        config.data.max_length,
        inputs.tokenizer,
        inputs.say,
        skip=config.data.on_bad_row == "skip",
    )
    return HeldoutPrompts(rows=rows, arrays=arrays)


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
        heldout_rows = sets.heldout_rows
        heldout = encoding.encode(
            heldout_rows,
            "text",
            length,
            inputs.tokenizer,
            inputs.say,
            skip=config.data.on_bad_row == "skip",
        )
    if not ppo.pretrain_coef:
        return PretrainingText(heldout=heldout)
    batches = mixture.batches(
        config, sets, "text", length, pretraining_rows(config), inputs.tokenizer, inputs.say
    )
    row_shards = sharding.row_shards(mesh)
    prefetch = mixture.Ahead(
        lambda update: lm.pack_minibatch(batches.get(update), config.microbatch_tokens, row_shards)
    )
    return PretrainingText(batches=batches, prefetch=prefetch, heldout=heldout, mesh=mesh)
