"""PPO of Qwen 14B: as qwen_1_8b/ppo.py, which says what the report states and what to expect.

python -m alignjax.train --config qwen_14b/ppo.py
python -m alignjax.plan --config qwen_14b/ppo.py --topology v5:2x2x2

It fits on 8 v5p chips, with 25 GiB of each to spare. Sampling has a layout of its own, of 8
devices along tensor: see "Layouts" in docs/pods.md.
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    base = load("qwen_1_8b/ppo.py")
    base.name = "qwen-14b-ppo"
    base.parents = {role: spec.replace("1_8b", "14b") for role, spec in base.parents.items()}
    # Sampling reads all parameters for every token: split, none of them has to travel.
    base.ppo.rollout_tensor = 8
    return base
