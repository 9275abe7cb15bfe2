"""PPO of Qwen 14B: all as in qwen_1_8b/ppo.py, whose docstring says what the report states and what to expect.

python -m alignjax.train --config qwen_14b/ppo.py
python -m alignjax.plan --config qwen_14b/ppo.py --topology v5:2x2x2      it fits on 8 v5p chips, with 25 GiB of each to spare

Sampling has a layout of its own, of 8 devices along tensor: docs/pods.md, "Layouts".
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    c = load("qwen_1_8b/ppo.py")
    c.name, c.parents = (
        "qwen-14b-ppo",
        {role: spec.replace("1_8b", "14b") for role, spec in c.parents.items()},
    )
    c.ppo.rollout_tensor = (
        8  # sampling reads all parameters at every token: split, none of them has to travel
    )
    return c
