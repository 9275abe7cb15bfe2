"""PMP of Qwen 7B by adapters of low rank: as qwen_1_8b/pmp.py otherwise.

python -m alignjax.train --config qwen_7b/lora_pmp.py
python -m alignjax.train --config qwen_7b/lora_pmp.py:qwen2.5

The base is frozen, and lora_rm.py goes on with these adapters and this head. The learning rate
is ten times the report's for all parameters (ours), as adapters need one.

Expect: nothing has been measured here.
"""

from alignjax.config import Config, Lora, load

VARIANTS = {"": "hf://Qwen/Qwen-7B", "qwen2.5": "hf://Qwen/Qwen2.5-7B"}


def config(variant: str) -> Config:
    base = load("qwen_1_8b/pmp.py")
    base.name = f"{variant or 'qwen'}-7b-lora-pmp"
    base.parents = {"model": VARIANTS[variant]}
    base.lora = Lora(rank=16, alpha=32.0)
    base.optimiser.learning_rate = 3e-5
    return base
