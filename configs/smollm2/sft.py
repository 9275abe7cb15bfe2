"""SFT of SmolLM2-135M-Instruct on the chosen replies of Anthropic's harmless-base.

python -m alignjax.data.prepare hh_harmless_base
python -m alignjax.train --config smollm2/sft.py

The model follows instructions already, so ppo.py does not need this run. It shows how one starts
from a model of the hub, and gives a policy that answers in the manner of the comparisons. In place
of the hub, a directory: --config.parents.model=DIR.
"""

from alignjax.config import Config, Data, Lora, Model, Optimiser, load

VARIANTS = ("", "tiny")
SET = "tfds/hh_harmless_base"


def config(variant: str) -> Config:
    config = Config(name="smollm2-sft", steps=60, microbatch_tokens=1024)
    config.parents = {"model": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"}
    config.model = Model(max_length=256)
    config.lora = Lora(rank=16, alpha=32.0)
    config.optimiser = Optimiser(learning_rate=5e-4, schedule="cosine", warmup_steps=4)
    config.data = Data(
        kind="conversations",
        train=SET,
        heldout=SET,
        batch=16,
        max_length=192,
        heldout_examples=300,
    )
    if variant == "tiny":
        config.name = "smollm2-sft-tiny"
        config.steps = 4
        config.parents = {"model": "lm.py:tiny"}
        config.model = load("lm.py:tiny").model
        config.data = load("sft.py:tiny").data
    return config
