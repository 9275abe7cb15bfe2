"""PPO of Qwen 7B: as qwen_1_8b/ppo.py, which says what the report states and what to expect.

python -m alignjax.train --config qwen_7b/ppo.py
python -m alignjax.plan --config qwen_7b/ppo.py --topology v5e:4x8

It fits on 32 v5e chips. Sampling has a layout of its own, of 8
devices along tensor: see "Layouts" in docs/pods.md.
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    base = load("qwen_1_8b/ppo.py")
    base.name = "qwen-7b-ppo"
    base.parents = {role: spec.replace("1_8b", "7b") for role, spec in base.parents.items()}
    # Sampling reads all parameters for every token: split, none of them has to travel.
    base.ppo.rollout_tensor = 8
    return base
