"""SFT of Qwen 7B by adapters of low rank: as qwen_1_8b/sft.py otherwise.

python -m alignjax.train --config qwen_7b/lora_sft.py
python -m alignjax.train --config qwen_7b/lora_sft.py:qwen2.5

The base is frozen, and lora_ppo.py goes on with these adapters. The learning rate is ten times
the report's for all parameters (ours), as adapters need one.

Expect: nothing has been measured here.
"""

from alignjax.config import Config, Lora, load

VARIANTS = {"": "hf://Qwen/Qwen-7B", "qwen2.5": "hf://Qwen/Qwen2.5-7B"}


def config(variant: str) -> Config:
    base = load("qwen_1_8b/sft.py")
    base.name = f"{variant or 'qwen'}-7b-lora-sft"
    base.parents = {"model": VARIANTS[variant]}
    base.lora = Lora(rank=16, alpha=32.0)
    base.optimiser.learning_rate = 2e-5
    return base
