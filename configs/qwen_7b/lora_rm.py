"""The reward model of Qwen 7B by adapters of low rank: as qwen_1_8b/rm.py otherwise.

python -m alignjax.train --config qwen_7b/lora_rm.py
python -m alignjax.train --config qwen_7b/lora_rm.py:qwen2.5

It goes on with the adapters and the head of lora_pmp.py, so the base is the hub's checkpoint, which
lora_ppo.py shares among its four roles. The learning rate is ten times the report's for all
parameters (ours), as adapters need one.

Expect: nothing has been measured here.
"""

from alignjax.config import Config, Lora, load

VARIANTS = ("", "qwen2.5")


def config(variant: str) -> Config:
    base = load("qwen_1_8b/rm.py")
    base.name = f"{variant or 'qwen'}-7b-lora-rm"
    base.parents = {"model": f"qwen_7b/lora_pmp.py:{variant}"}
    base.lora = Lora(rank=16, alpha=32.0)
    base.optimiser.learning_rate = 3e-5
    return base
