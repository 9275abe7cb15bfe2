"""The reward model of Qwen 14B by adapters of low rank: as qwen_1_8b/rm.py otherwise.

python -m alignjax.train --config qwen_14b/lora_rm.py

It goes on with the adapters and the head of lora_pmp.py, so the base is the hub's checkpoint, which
lora_ppo.py shares among its four roles. The learning rate is ten times the report's for all
parameters (ours), as adapters need one.

Expect: nothing has been measured here.
"""

from alignjax.config import Config, Lora, load


def config(variant: str) -> Config:
    base = load("qwen_1_8b/rm.py")
    base.name = "qwen-14b-lora-rm"
    base.parents = {"model": "qwen_14b/lora_pmp.py"}
    base.lora = Lora(rank=16, alpha=32.0)
    base.optimiser.learning_rate = 3e-5
    return base
