"""PPO without a reward model: a function checks the answers to arithmetic.

python -m alignjax.train --config arithmetic.py   from a model on the Hugging Face hub

Put the problems into data/sums.jsonl. Each line has a prompt, as text or messages, and its
answer, a number, alone or after "####" as in GSM8K:

{"prompt": "Tom has 3 apples and buys 4. How many has he? End with the number.", "answer": "7"}

A tenth of the prompts is held out. No result is claimed, since it depends on your model and
data: watch objective/scores, the share of correct answers, and eval/score, the same on held-out
prompts. Training starts where Python finds this file as `configs.arithmetic`: in the directory
that holds configs/, or anywhere if alignjax is installed.
"""

import re
from decimal import Decimal

from alignjax.config import PPO, Config, Data, Model, Optimiser, load

VARIANTS = ("", "tiny")
BASE = "hf://Qwen/Qwen2.5-0.5B-Instruct"
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def config(variant: str) -> Config:
    config = Config(
        stage="ppo",
        name="arithmetic",
        steps=200,
        seed=0,
        microbatch_tokens=16384,
    )
    config.parents = {"policy": BASE, "reference": BASE, "value": BASE}
    config.model = Model(dtype="bfloat16", remat="everything", max_length=1024)
    config.optimiser = Optimiser(learning_rate=1e-6)
    config.value_optimiser = Optimiser(learning_rate=5e-6)
    config.data = Data(
        kind="prompts",
        train="data/sums.jsonl",
        heldout="data/sums.jsonl",
        batch=64,
        max_length=512,
        heldout_share=0.1,
    )
    config.ppo = PPO(
        reward_fn="configs.arithmetic:reward",
        samples_per_prompt=4,
        response_length=512,
        top_p=1.0,
        minibatches=4,
        normalise_scores="none",
        truncated_score=0.0,
        value_warmup_steps=20,
        pretrain_heldout="",
        eval_every=20,
    )
    if variant == "tiny":
        config.name = "arithmetic-tiny"
        config.steps = 4
        config.checkpoint_every = 2
        config.sample_every = 2
        config.microbatch_tokens = 4096
        config.parents = dict.fromkeys(config.parents, "sft.py:tiny")
        config.model = load("lm.py:tiny").model
        config.data.batch = 8
        config.data.max_length = 22
        config.ppo.response_length = 14
        config.ppo.value_warmup_steps = 3
        config.ppo.samples_per_prompt = 2
        config.ppo.minibatches = 2
    return config


def reward(
    prompts: list[list[dict]], responses: list[str], answer: list[str], **columns: list
) -> list[float]:
    """Return 1 for each response whose last number is the answer, else 0."""
    scores = []
    for response, right_answer in zip(responses, answer, strict=True):
        number = last_number(response)
        scores.append(float(number is not None and number == last_number(str(right_answer))))
    return scores


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text by its value: 1,000 and 1000.0 are one number."""
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
