"""PPO of Qwen 7B: all as in qwen_1_8b/ppo.py, whose docstring says what the report states and what to expect.

python -m alignjax.train --config qwen_7b/ppo.py
python -m alignjax.plan --config qwen_7b/ppo.py --topology v5e:4x8      it fits on 32 v5e chips

Sampling has a layout of its own, of 8 devices along tensor: docs/pods.md, "Layouts".
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    c = load("qwen_1_8b/ppo.py")
    c.name, c.parents = (
        "qwen-7b-ppo",
        {role: spec.replace("1_8b", "7b") for role, spec in c.parents.items()},
    )
    c.ppo.rollout_tensor = (
        8  # sampling reads all parameters at every token: split, none of them has to travel
    )
    return c
