"""PPO of Qwen 7B by adapters of low rank on one base that its four roles share.

python -m alignjax.train --config qwen_7b/lora_ppo.py     trains its parents first if need be
python -m alignjax.train --config qwen_7b/lora_ppo.py:qwen2.5
python -m alignjax.plan --config qwen_7b/lora_ppo.py --topology h100:1

It fits on one GPU of 80 GB, and on the 8 chips of one v5e host, where sampling needs a layout of
its own (--config.ppo.rollout_tensor=8). Policy and reference are the base with adapters, value and
reward model the base with others. So there is one base in memory, in bfloat16, and during a
rollout a copy of it with the policy's adapters added. As qwen_1_8b/ppo.py otherwise, which says
what the report states. Learning rates are ten times those for all parameters (ours), as adapters
need them.

Expect: nothing has been measured here.
"""

from alignjax.config import Config, Lora, load

VARIANTS = ("", "qwen2.5")


def config(variant: str) -> Config:
    base = load("qwen_1_8b/ppo.py")
    base.name = f"{variant or 'qwen'}-7b-lora-ppo"
    policy = f"qwen_7b/lora_sft.py:{variant}"
    reward = f"qwen_7b/lora_rm.py:{variant}"
    base.parents = {"policy": policy, "reference": policy, "value": reward, "reward": reward}
    base.lora = Lora(rank=16, alpha=32.0)
    base.optimiser.learning_rate = 1e-5
    base.value_optimiser.learning_rate = 5e-5
    base.ppo.slots = 32  # what the cache of Qwen-7B has room for: 1 GiB a response
    return base
