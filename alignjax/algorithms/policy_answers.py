"""Answers of a policy that was trained without rollouts to held-out prompts.

The programs are those of PPO's evaluation, so the figures of both can be compared.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms import experience, heldout
from alignjax.algorithms.greedy import GreedyAnswers
from alignjax.algorithms.ppo_data import HeldoutPrompts
from alignjax.algorithms.responding import make_responder
from alignjax.algorithms.stage import Evaluation, OpenProgress
from alignjax.config import Config
from alignjax.machine import sharding

Mesh = jax.sharding.Mesh


class PolicyAnswers:
    """The answers to held-out prompts, sampled as `config.ppo` says, and greedy ones."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        abstract_params: dict,
        *,
        prompts: HeldoutPrompts,
        end_tokens: tuple[int, ...],
        tokenizer: PreTrainedTokenizerBase,
        progress: OpenProgress,
    ):
        self.config = config
        self.mesh = mesh
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.progress = progress
        self.responder = make_responder(config, mesh, abstract_params, end_tokens)
        self.read = jax.jit(functools.partial(experience.read_roles, config, ()))
        self.figures = jax.jit(experience.response_figures)
        self.greedy = GreedyAnswers(config, self.responder, tokenizer)

    def compare(self, reference: dict, policy: dict) -> Evaluation:
        """Return the figures of both by name, and rows that show their answers side by side."""
        batches = heldout.count_batches(self.prompts.arrays, self.config.data.batch)
        with self.progress(2 * batches) as after_batch:
            before = self.evaluate(reference, reference, after_batch)
            after = self.evaluate(policy, reference, after_batch)
        figures = heldout.compare(before.figures, after.figures)
        rows = heldout.side_by_side(before.rows, after.rows)
        return Evaluation(figures=figures, rows=rows[: self.config.ppo.eval_prompts])

    def evaluate(
        self, policy: dict, reference: dict, after_batch: Callable[[], None]
    ) -> Evaluation:
        """Return the figures of a policy's answers, and an entry for each prompt."""
        answer = functools.partial(self.answer, {"policy": policy, "reference": reference})
        arrays = self.prompts.arrays
        batch_size = self.config.data.batch
        result = heldout.evaluate(answer, None, arrays, None, batch_size, after_batch=after_batch)
        result.figures.update(self.greedy.figures(policy, arrays, self.prompts.rows))
        return result

    def answer(
        self, params: dict[str, dict], batch: dict[str, np.ndarray], detailed: int
    ) -> list[dict]:
        """Answer a batch of prompts, and describe the responses; the draw is always the same."""
        rollout = self.responder.respond(params["policy"], batch)
        reading = experience.empty_reading(rollout, {}, (), self.mesh, has_value=False)
        prompt_lengths = np.repeat(batch["lengths"], self.config.ppo.samples_per_prompt)
        lengths = sharding.on_host(rollout.lengths)
        minibatches = experience.Minibatches(self.config, self.mesh, prompt_lengths, lengths)
        for minibatch in minibatches.first_epoch:
            for microbatch in minibatch:
                reading = self.read(params, rollout, reading, microbatch)
        figures = self.figures(rollout, reading)
        return heldout.describe(
            self.config,
            self.tokenizer,
            self.prompts.rows,
            batch["index"],
            rollout,
            figures,
            detailed,
        )
