"""PPO of Qwen 14B by adapters of low rank on one base that its four roles share.

python -m alignjax.train --config qwen_14b/lora_ppo.py     trains its parents first if need be
python -m alignjax.plan --config qwen_14b/lora_ppo.py --topology h100:2

It fits on two GPUs of 80 GB. As qwen_7b/lora_ppo.py otherwise.

Expect: nothing has been measured here.
"""

from alignjax.config import Config, Lora, load


def config(variant: str) -> Config:
    base = load("qwen_1_8b/ppo.py")
    base.name = "qwen-14b-lora-ppo"
    policy = "qwen_14b/lora_sft.py"
    reward = "qwen_14b/lora_rm.py"
    base.parents = {"policy": policy, "reference": policy, "value": reward, "reward": reward}
    base.lora = Lora(rank=16, alpha=32.0)
    base.optimiser.learning_rate = 1e-5
    base.value_optimiser.learning_rate = 5e-5
    base.ppo.slots = 32  # what the cache has room for
    return base
