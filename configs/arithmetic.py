"""PPO without a reward model: a function checks the answers to arithmetic.

python -m alignjax.train --config arithmetic.py   from a model on the Hugging Face hub and data/sums.jsonl of yours

Each line of data/sums.jsonl has a prompt, as text or messages, and its answer, a number, alone or behind "####" as in GSM8K:
{"prompt": "Tom has 3 apples and buys 4. How many has he? End with the number.", "answer": "7"}. Run it from the directory
that holds configs/, where `ppo.reward_fn` is looked for. A tenth of the prompts is held out. No result is claimed: it
depends on your model and data; watch objective/scores, the share of right answers, and eval/score, that on held-out prompts.
"""

import re
from decimal import Decimal

from alignjax.config import PPO, Config, Data, Model, Optimiser

VARIANTS = ("", "tiny")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def config(variant: str) -> Config:
    c = Config(stage="ppo", name="arithmetic", steps=200, seed=0, microbatch_tokens=16384)
    c.parents = dict.fromkeys(("policy", "reference", "value"), "hf://Qwen/Qwen2.5-0.5B-Instruct")
    c.model = Model(dtype="bfloat16", remat="everything", max_length=1024)
    c.optimiser, c.value_optimiser = Optimiser(learning_rate=1e-6), Optimiser(learning_rate=5e-6)
    c.data = Data(
        "prompts", "data/sums.jsonl", "data/sums.jsonl", batch=64, max_length=512, heldout_share=0.1
    )
    c.ppo = PPO(
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
        c.name, c.steps, c.checkpoint_every, c.sample_every, c.microbatch_tokens = (
            "arithmetic-tiny",
            4,
            2,
            2,
            4096,
        )
        c.parents = dict.fromkeys(c.parents, "sft.py:tiny")
        c.model = Model(
            vocab_size=512,
            d_model=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_size=8,
            d_ff=64,
            max_length=64,
        )
        c.data.batch, c.data.max_length, c.ppo.response_length, c.ppo.value_warmup_steps = (
            8,
            22,
            14,
            3,
        )
        c.ppo.samples_per_prompt, c.ppo.minibatches = 2, 2
    return c


def reward(prompts, responses, answer, **columns) -> list[float]:
    """1 where the last number of a response is its answer, else 0."""
    return [
        float(last_number(response) == last_number(str(right)) is not None)
        for response, right in zip(responses, answer, strict=True)
    ]


def last_number(text: str) -> Decimal | None:
    """As a value: 1,000 and 1000.0 are one number."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
