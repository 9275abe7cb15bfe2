"""Direct preference optimisation (DPO): a policy learns from comparisons, without rewards.

It takes the comparisons of the ranking loss, packed alike. The log-probabilities of the reference
are made once, before the first step, and kept in the state, so checkpoints hold them and a resume
reads no reference. In shapes, `all_pairs` counts the pairs of a data set, `pairs` those of a
microbatch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms import comparisons, dpo_programs, heldout, optimisation
from alignjax.algorithms.comparisons import ReadPairs, Rows
from alignjax.algorithms.dpo_programs import (
    LearningPart,
    PairLogprobs,
    PreferenceMicrobatch,
    pack_minibatch,
)
from alignjax.algorithms.policy_answers import PolicyAnswers
from alignjax.algorithms.ppo_data import load_heldout_prompts
from alignjax.algorithms.stage import Evaluation, RunInputs, State, StepDetails
from alignjax.algorithms.supervised import SupervisedStage
from alignjax.config import Config
from alignjax.data import ends, mixture, packing
from alignjax.machine import sharding
from alignjax.models import lora
from alignjax.weights import roles
from alignjax.weights.role_reader import RoleReader

Mesh = jax.sharding.Mesh


class ObservedPairs(NamedTuple):
    """The reading of a microbatch, and the pairs that it is of."""

    pair: Int[Array, " pairs"]  # number in the batch
    reading: PairLogprobs


@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    """What DPO trains on and is evaluated on."""

    batches: mixture.Batches
    prefetch: mixture.Ahead  # step -> list of microbatches, packed while the device works
    heldout: dict[str, Rows]  # source -> comparisons
    ladder: packing.Ladder  # the shapes of microbatches
    tokenizer: PreTrainedTokenizerBase


class DirectPreference(SupervisedStage):
    """DPO: a policy, and a table of what the reference says of each response."""

    head = "lm"
    role = "policy"
    progress_metrics = ("loss", "rewards/accuracies")

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        *,
        answers: PolicyAnswers | None = None,
        **arguments: Any,
    ):
        super().__init__(config, mesh, **arguments)
        self.answers = answers
        data = self.data
        trained_pairs = mixture.count_of(data.batches.rows) if data else config.data.batch
        heldout_pairs = sum(map(mixture.count_of, data.heldout.values())) if data else 0
        self.abstract_state["reference"] = {
            "train": self.abstract_table(trained_pairs),
            "heldout": self.abstract_table(heldout_pairs),
        }

    def abstract_table(self, pairs: int) -> jax.ShapeDtypeStruct:
        """Return the shape of the reference's log-probabilities of so many pairs."""
        replicated = sharding.replicated(self.mesh)
        return jax.ShapeDtypeStruct((pairs, 2), np.float32, sharding=replicated)

    @classmethod
    def load(cls, config: Config, mesh: Mesh, inputs: RunInputs) -> Self:
        """Read and tokenise the data, and return a stage that can train."""
        parents = {"reference": inputs.parents["policy"], **inputs.parents}
        return cls(
            config,
            mesh,
            data=cls.load_data(config, mesh, inputs),
            reader=RoleReader(config, mesh, parents),
            phases=inputs.phases,
            answers=load_answers(config, mesh, inputs) if config.dpo.prompts else None,
        )

    @staticmethod
    def make_loss(config: Config) -> optimisation.LossFunction:
        """Return the loss of DPO."""
        return functools.partial(dpo_programs.loss_fn, config.model, config.dpo)

    @staticmethod
    def load_data(config: Config, mesh: Mesh, inputs: RunInputs) -> PreferenceData:
        """Read and tokenise the comparisons."""
        read = comparisons.load(config, inputs)
        row_shards = sharding.row_shards(mesh)
        ladder = comparisons.choose_ladder(config, read, "lm", pack_minibatch, row_shards)

        def pack_step(step: int) -> list[PreferenceMicrobatch]:
            numbers = read.batches.order(step)
            rows = {name: array[numbers] for name, array in read.batches.rows.items()}
            return pack_minibatch(
                rows, config.microbatch_tokens, row_shards, ladder, numbers=numbers
            )

        return PreferenceData(
            batches=read.batches,
            prefetch=mixture.Ahead(pack_step),
            heldout=read.heldout,
            ladder=ladder,
            tokenizer=inputs.tokenizer,
        )

    @functools.cached_property
    def read(self) -> ReadPairs:
        """Return the compiled log-probabilities of a microbatch's responses."""
        return jax.jit(functools.partial(dpo_programs.response_logprobs, self.config.model))

    @functools.cached_property
    def compare(self) -> Callable[[dict, LearningPart], PairLogprobs]:
        """Return the compiled comparison of a microbatch with the reference."""
        return jax.jit(functools.partial(dpo_programs.read_pairs, self.config.model))

    def init_state(self) -> State:
        """Return the policy of its parent, and what the reference says of all responses.

        The reference is read first, and is gone from memory before the policy is read, but for a
        base that both share.
        """
        reference = self.read_reference()
        return super().init_state() | {"reference": reference}

    def read_reference(self) -> dict[str, jax.Array]:
        """Return the reference's log-probabilities of the pairs to train on and held out."""
        params = self.load_reference()
        heldout_tables = [self.read_rows(params, rows) for rows in self.data.heldout.values()]
        tables = {
            "train": self.read_rows(params, self.data.batches.rows),
            "heldout": np.concatenate(heldout_tables),
        }
        return jax.device_put(tables, sharding.replicated(self.mesh))

    def load_reference(self) -> dict:
        """Return the parameters of the reference, read from its parent."""
        return self.reader.frozen("reference", self.config.model)

    def read_rows(self, params: dict, rows: Rows) -> Float[np.ndarray, "all_pairs 2"]:
        """Return log p of the responses of comparisons."""
        config = self.config
        return comparisons.read_all(
            self.read,
            pack_minibatch,
            params,
            rows,
            config.data.batch,
            config.microbatch_tokens,
            self.mesh,
            self.data.ladder,
        )

    def parts(self, state: State, microbatches: list[Any]) -> list[LearningPart]:
        """Return what the loss takes: each microbatch with the table of the reference."""
        return [(state["reference"]["train"], microbatch) for microbatch in microbatches]

    def observe(self, state: State, step: int, parts: list[LearningPart]) -> ObservedPairs | None:
        """Check the packing in step 0; read a microbatch every `sample_every` steps."""
        params = self.params_of(state)
        if step == 0:
            rows = self.data.batches.get(step)
            dpo_programs.check_packing(
                self.config, self.read, params, rows, self.mesh, self.data.ladder
            )
        observed = None
        if step % self.config.sample_every == 0:
            _, microbatch = parts[0]
            observed = ObservedPairs(microbatch.pair, self.compare(params, parts[0]))
        self.phases.mark("score", observed)
        return observed

    def details(self, step: int, observation: ObservedPairs | None) -> StepDetails:
        """Return the first pair of a microbatch with its implicit rewards, if it was read."""
        if observation is None:
            return StepDetails(metrics={}, samples=[])
        pair = sharding.on_host(observation.pair)[0]
        log_ratios = sharding.on_host(observation.reading.log_ratios)[0]
        number = self.data.batches.order(step)[pair]
        sample = comparisons.describe(
            self.data.tokenizer,
            self.data.batches.rows,
            number,
            "reward",
            self.config.dpo.beta * log_ratios,
        )
        return StepDetails(metrics={}, samples=[sample])

    def learned_from(self, state: State, step: int) -> dict[str, np.ndarray]:
        """Return the comparisons of a step, with the reference's log-probabilities."""
        order = self.data.batches.order(step)
        table = sharding.on_host(state["reference"]["train"])
        return self.data.batches.get(step) | {"ref_logprobs": table[order]}

    def evaluate(self, state: State) -> Evaluation:
        """Return the figures of each held-out source, and those of answers to prompts if any.

        For the answers the reference is read from its parent once more.
        """
        params = self.params_of(state)
        reference = sharding.on_host(state["reference"]["heldout"])
        figures = {}
        first = 0
        for source, rows in self.data.heldout.items():
            logprobs = self.read_rows(params, rows)
            log_ratios = logprobs - reference[first : first + len(logprobs)]
            source_figures = dpo_programs.figures_of(
                self.config.dpo, log_ratios, dpo_programs.response_lengths(rows)
            )
            figures |= {f"{name}/{source}": value for name, value in source_figures.items()}
            first += len(logprobs)
        if self.answers is None:
            return Evaluation(figures=figures, rows=[])
        answers = self.answers.compare(self.load_reference(), params)
        return Evaluation(figures=figures | answers.figures, rows=answers.rows)

    def table(self, figures: dict[str, float]) -> list[tuple[str, str]]:
        """Return the result of a run at a glance."""
        lines = [
            comparisons.accuracy_line(figures, source, "held-out implicit accuracy")
            for source in self.data.heldout
        ]
        return lines + heldout.table(figures)

    def longest_microbatches(self) -> list[PreferenceMicrobatch]:
        """Return a minibatch of comparisons that are as long as they may be."""
        rows = comparisons.longest_rows(self.config.data.batch, self.config.data.max_length)
        return pack_minibatch(rows, self.config.microbatch_tokens, sharding.row_shards(self.mesh))

    def resident(self) -> dict[str, Any]:
        """Return the shapes of the training state and of the reference's table."""
        return super().resident() | {"reference": self.abstract_state["reference"]["train"]}


def load_answers(config: Config, mesh: Mesh, inputs: RunInputs) -> PolicyAnswers:
    """Return how the policy and the reference answer the prompts that the config names."""
    end_tokens = ends.end_tokens(
        inputs.tokenizer, inputs.imported.declared_ends, config.model.vocab_size
    )
    return PolicyAnswers(
        config,
        mesh,
        lora.combine(
            roles.abstract_base(config.model, "lm", mesh, config.lora),
            roles.abstract_trained(config.model, "lm", mesh, config.lora),
        ),
        prompts=load_heldout_prompts(config, config.dpo.prompts, inputs),
        end_tokens=end_tokens,
        tokenizer=inputs.tokenizer,
        progress=inputs.evaluation_progress,
    )
