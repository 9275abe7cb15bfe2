"""PMP of Qwen 14B: as qwen_1_8b/pmp.py, which says what the report states and what to expect.

python -m alignjax.train --config qwen_14b/pmp.py
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    base = load("qwen_1_8b/pmp.py")
    base.name = "qwen-14b-pmp"
    base.parents = {"model": "hf://Qwen/Qwen-14B"}
    return base
