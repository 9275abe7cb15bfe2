"""PPO of SmolLM2-135M on problems whose answers are checked: sums, and the last word of a list.

python -m alignjax.data.problems --out data/problems
python -m alignjax.data.prepare hh_harmless_base      text on which the loss is watched
python -m alignjax.train --config smollm2/arithmetic.py

In place of the hub, a directory: --config.parents.policy=DIR and so for reference and value. On a
GPU, --config.model.dtype=bfloat16 and a larger data.batch. docs/real_model.md shows what comes of
it.
"""

import re

from alignjax.config import PPO, Config, Data, Lora, Model, Optimiser, load

VARIANTS = ("", "tiny")
BASE = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
NUMBER = re.compile(r"\d+")
WORD = re.compile(r"[A-Za-z]+")


def config(variant: str) -> Config:
    config = Config(
        stage="ppo",
        name="smollm2-arithmetic",
        steps=45,
        seed=0,
        microbatch_tokens=1024,
        checkpoint_every=15,
    )
    config.parents = {"policy": BASE, "reference": BASE, "value": BASE}
    config.model = Model(max_length=128)
    # Adapters: half the arithmetic of an update, and one base for the three roles.
    config.lora = Lora(rank=16, alpha=32.0)
    config.optimiser = Optimiser(learning_rate=5e-4, warmup_steps=4)
    config.value_optimiser = Optimiser(learning_rate=1e-3)
    config.data = Data(
        kind="prompts",
        train="data/problems/train.jsonl",
        heldout="data/problems/heldout.jsonl",
        batch=16,
        max_length=64,
        heldout_examples=300,
    )
    config.ppo = PPO(
        reward_fn="configs.smollm2.arithmetic:reward",
        samples_per_prompt=2,
        response_length=24,
        kl_coef=0.01,
        minibatches=2,
        normalise_scores="none",
        truncated_score=0.0,
        value_warmup_steps=4,
        pretrain_heldout="tfds/hh_harmless_base",
        eval_prompts=120,
    )
    if variant == "tiny":
        config.name = "smollm2-arithmetic-tiny"
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
        config.ppo.pretrain_heldout = ""
    return config


def reward(
    prompts: list[list[dict]], responses: list[str], answer: list[str], **columns: list
) -> list[float]:
    """Return 1 for each response whose last number or word is the answer, else 0."""
    pairs = zip(responses, answer, strict=True)
    return [float(is_right(response, right_answer)) for response, right_answer in pairs]


def is_right(response: str, answer: str) -> bool:
    """Return whether the last number of a response, or its last word, is the answer."""
    pattern = NUMBER if NUMBER.fullmatch(answer) else WORD
    found = pattern.findall(response)
    return bool(found) and found[-1].lower() == answer.lower()
