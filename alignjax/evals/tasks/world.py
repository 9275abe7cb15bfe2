"""The embedded world (`data.toy`): held-out prompts, the same for every run and machine.

It needs neither files nor a network. It has three tasks:

- sampled: the model writes as PPO samples (temperature 1, top-p 0.9). true_score grades words and
  form; it is the headline, because PPO is to raise it. exact_match says whether the words are the
  right ones, whatever their form.
- greedy: the same with the most likely words.
- choice: which of four responses in good form the model finds most likely. One has the right
  words; three are corrupted as in training.

Zero-shot: the prompt alone. Few-shot (1): a prompt of the training split and its ideal response
come before it. In ChatML and the world's tokenizer such an example takes 18 to 27 tokens, a prompt
with its marks at most 20 and a response 14. One example makes 61 of the model's 64 tokens; two
would make at least 70.
"""

import re

import numpy as np
from datasets import DatasetDict

from alignjax.data import toy
from alignjax.evals import local_files
from alignjax.evals.benchmark import (
    Benchmark,
    Extraction,
    Figure,
    Task,
    greedy_generation,
    judged_replies,
    mean_of,
)

SHOTS = 1
SEED = 0
DOCUMENTS = 200
WRONG_CHOICES = 3
PPO_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.9}
MAX_TOKENS = 14  # the ideal responses end within 9


def documents(split: str, limit: int) -> list[dict]:
    """Return the first `limit` documents of a split.

    A document has a prompt, the right words, the ideal response, choices (four responses) and
    answer (the place of the ideal response among them).
    """
    rows = toy.examples("prompts", split, SEED, limit)
    return [document(number, row["prompt"][0]["content"]) for number, row in enumerate(rows)]


def document(number: int, prompt: str) -> dict:
    """Return the document of a prompt; its number keys the random choices."""
    rng = np.random.default_rng([SEED, number])
    ideal = toy.ideal(prompt)
    choices = wrong_responses(rng, prompt, ideal)
    answer = int(rng.integers(WRONG_CHOICES + 1))
    choices.insert(answer, ideal)
    return {
        "prompt": prompt,
        "right": " ".join(toy.answer(prompt)),
        "ideal": ideal,
        "choices": choices,
        "answer": answer,
    }


def wrong_responses(rng: np.random.Generator, prompt: str, ideal: str) -> list[str]:
    """Return different corrupted responses in good form."""
    responses = []
    while len(responses) < WRONG_CHOICES:
        response = toy.FORMS[0].format(" ".join(toy.corrupt(rng, prompt)))
        if response != ideal and response not in responses:
            responses.append(response)
    return responses


def read_data(**_: object) -> DatasetDict:
    """Return the held-out documents as a data set."""
    return local_files.dataset(test=documents("heldout", DOCUMENTS))


class GradedResponse(Extraction):
    """Grade a response: {"answer": its words without courtesies or repetition, "true_score"}."""

    def answer(self, reply: str, doc: dict) -> dict:
        """Return the words and the true score of a response."""
        response = reply.strip()
        words = [word for word in re.findall(r"\w+", response) if word not in toy.COURTESY]
        return {
            "answer": " ".join(toy.once(words)),
            "true_score": toy.true_score(doc["prompt"], response),
        }


def judge(doc: dict, results: list[dict]) -> dict[str, float]:
    """Return whether the words are right, and the true score."""
    graded = results[0]
    return {
        "exact_match": float(graded["answer"] == doc["right"]),
        "true_score": graded["true_score"],
    }


def make_task(setting: str, subject: str, folder: str) -> Task:
    """Return the config of one task of the world."""
    task = {
        "task": subject,
        "custom_dataset": read_data,
        "test_split": "test",
        "doc_to_text": "prompt",
        "num_fewshot": SHOTS if setting == "few" else 0,
        "fewshot_config": {"sampler": "first_n", "samples": documents("train", SHOTS)},
    }
    return task | (choice_fields() if subject == "choice" else response_fields(subject))


def choice_fields() -> Task:
    """Return the fields of the task that compares the likelihoods of responses."""
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [mean_of("acc")],
        "metadata": {"version": 1.0},
    }


def response_fields(subject: str) -> Task:
    """Return the fields of a task in which the model writes, sampled or greedy."""
    generation = greedy_generation(MAX_TOKENS, "\n")
    if subject == "sampled":
        generation |= PPO_SAMPLING
    return {
        "doc_to_target": "ideal",
        "generation_kwargs": generation,
        **judged_replies(GradedResponse, judge, "exact_match", "true_score", name=subject),
    }


HEADLINE = Figure("true_score", "sampled", is_share=False)
BENCHMARK = Benchmark(
    name="world",
    title="true score, sampled",
    shots=SHOTS,
    headline={"zero": HEADLINE, "few": HEADLINE},
    make_task=make_task,
    subjects=("sampled", "greedy", "choice"),
    more_figures=(
        ("right words, sampled", Figure("exact_match", "sampled")),
        ("true score, greedy", Figure("true_score", "greedy", is_share=False)),
        ("right words, greedy", Figure("exact_match", "greedy")),
        ("right choice", Figure("acc", "none")),
    ),
)
