"""PMP of Qwen 14B by adapters of low rank: as qwen_1_8b/pmp.py otherwise.

python -m alignjax.train --config qwen_14b/lora_pmp.py

The base is frozen, and lora_rm.py goes on with these adapters and this head. The learning rate
is ten times the report's for all parameters (ours), as adapters need one.

Expect: nothing has been measured here.
"""

from alignjax.config import Config, Lora, load


def config(variant: str) -> Config:
    base = load("qwen_1_8b/pmp.py")
    base.name = "qwen-14b-lora-pmp"
    base.parents = {"model": "hf://Qwen/Qwen-14B"}
    base.lora = Lora(rank=16, alpha=32.0)
    base.optimiser.learning_rate = 3e-5
    return base
