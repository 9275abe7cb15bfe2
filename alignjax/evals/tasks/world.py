"""The embedded world (`data.toy`): held-out prompts, the same for every run and machine, with neither files nor network.

sampled, greedy: the model writes, as PPO samples (temperature 1, top-p 0.9) or its likeliest words; true_score grades words
and form, and is the headline where it samples, for that is what PPO is to raise; exact_match is whether the words are the
right ones, whatever their form. choice: which of four responses in good form the model finds likelier, of which one has the
right words and three are corrupted as in training.

Zero-shot: the prompt alone. Few-shot (1): a prompt of the training split and its ideal response go before it. In ChatML
and the world's tokenizer such an example takes 18 to 27 tokens, a prompt with its marks at most 20, a response 14: one
example makes 61 of the model's 64 tokens, two would make 70 at the least.
"""

import re

import numpy as np

from alignjax.data import toy
from alignjax.evals import local
from alignjax.evals.benchmark import Benchmark, Extraction, Headline, answered, greedy

SHOTS = 1
SEED = 0
DOCUMENTS = 200
WRONG = 3  # responses beside the right one
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.9}
TOKENS = 14  # the ideal responses end within 9


def documents(split: str, limit: int) -> list[dict]:
    """prompt, right (words), ideal (response), choices (responses) and answer (the place of the ideal one)."""
    out = []
    for i, row in enumerate(toy.examples("prompts", split, SEED, limit)):
        prompt, rng = row["prompt"][0]["content"], np.random.default_rng([SEED, i])
        ideal, wrong = toy.ideal(prompt), {}
        while len(wrong) < WRONG:
            response = toy.FORMS[0].format(" ".join(toy.corrupt(rng, prompt)))
            if response != ideal:
                wrong[response] = None
        place = int(rng.integers(WRONG + 1))
        choices = [*wrong]
        choices.insert(place, ideal)
        out.append(
            {
                "prompt": prompt,
                "right": " ".join(toy.answer(prompt)),
                "ideal": ideal,
                "choices": choices,
                "answer": place,
            }
        )
    return out


def read(**_):
    return local.dataset(test=documents("heldout", DOCUMENTS))


class Said(Extraction):
    """{"answer": the response's words without courtesies, said once, "true_score"}"""

    def answer(self, reply: str, doc: dict) -> dict:
        response = reply.strip()
        said = toy.once([w for w in re.findall(r"\w+", response) if w not in toy.COURTESY])
        return {"answer": " ".join(said), "true_score": toy.true_score(doc["prompt"], response)}


def verdict(doc: dict, results: list[dict]) -> dict:
    return {
        "exact_match": float(results[0]["answer"] == doc["right"]),
        "true_score": results[0]["true_score"],
    }


def task(setting: str, subject: str, folder: str) -> dict:
    examples = documents("train", SHOTS)
    common = {
        "task": subject,
        "custom_dataset": read,
        "test_split": "test",
        "doc_to_text": "prompt",
        "num_fewshot": SHOTS if setting == "few" else 0,
        "fewshot_config": {"sampler": "first_n", "samples": examples},
    }
    if subject == "choice":
        return {
            **common,
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
    kwargs = greedy(TOKENS, "\n") | (SAMPLED if subject == "sampled" else {})
    return {
        **common,
        "doc_to_target": "ideal",
        "generation_kwargs": kwargs,
        **answered(Said, verdict, "exact_match", "true_score", name=subject),
    }


HEADLINE = Headline("true_score", "sampled", share=False)
BENCHMARK = Benchmark(
    name="world",
    title="true score, sampled",
    shots=SHOTS,
    headline={"zero": HEADLINE, "few": HEADLINE},
    task=task,
    subjects=("sampled", "greedy", "choice"),
    more=(
        ("right words, sampled", Headline("exact_match", "sampled")),
        ("true score, greedy", Headline("true_score", "greedy", share=False)),
        ("right words, greedy", Headline("exact_match", "greedy")),
        ("right choice", Headline("acc", "none")),
    ),
)
