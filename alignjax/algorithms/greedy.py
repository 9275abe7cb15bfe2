"""Greedy answers to held-out prompts: the most probable token each time, without a draw."""

import dataclasses
import functools

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms import heldout
from alignjax.algorithms.responding import Responder, prompts_of
from alignjax.config import Config
from alignjax.machine import sharding
from alignjax.sampling import rollout


class GreedyAnswers:
    """The greedy answers of a policy to held-out prompts of the embedded world.

    They are always made by our own sampler, also in a run with another one. It runs where the
    `responder` of the run does, on parameters in the same layout.
    """

    def __init__(
        self,
        config: Config,
        responder: Responder,
        tokenizer: PreTrainedTokenizerBase,
    ):
        settings = dataclasses.replace(responder.settings, temperature=0.0, samples_per_prompt=1)
        self.has_true_score = heldout.has_true_score(config)
        self.batch_size = config.data.batch
        self.mesh = responder.mesh
        self.tokenizer = tokenizer
        self.place_params = responder.place_params
        self.sample = jax.jit(functools.partial(rollout.generate, settings=settings))

    def figures(self, policy: dict, prompts: dict, rows: list[dict]) -> dict[str, float]:
        """Return how the world grades the answers: the means, and half their 95 % intervals.

        There is nothing to grade by if the prompts are not of the embedded world.

        Args:
          policy: its parameters.
          prompts: arrays of prompts, as `encoding.encode` makes them.
          rows: rows of the prompts' data set.
        """
        if not self.has_true_score:
            return {}
        entries = []
        count = len(prompts["index"])
        with jax.set_mesh(self.mesh):
            params = self.place_params(policy)
            for first, batch in heldout.whole_batches(prompts, self.batch_size, count):
                entries += self.grade_batch(params, batch, rows)[: count - first]
        return heldout.means(entries) | heldout.half_widths(entries)

    def grade_batch(
        self, params: dict, batch: dict[str, np.ndarray], rows: list[dict]
    ) -> list[dict[str, list[float]]]:
        """Return the grades of the answer to each prompt of a batch."""
        prompts = sharding.shard_batch(prompts_of(batch), self.mesh)
        answers = self.sample(params, prompts, jax.random.key(0))  # nothing is drawn
        texts = heldout.response_texts(self.tokenizer, answers)
        questions = [rows[number]["prompt"][-1]["content"] for number in batch["index"]]
        return [
            {f"{name}_greedy": grade for name, grade in heldout.grades(question, [text]).items()}
            for question, text in zip(questions, texts, strict=True)
        ]
