"""The reward model of Qwen 7B: as qwen_1_8b/rm.py, which says what the report states.

python -m alignjax.train --config qwen_7b/rm.py
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    base = load("qwen_1_8b/rm.py")
    base.name = "qwen-7b-rm"
    base.parents = {"model": "qwen_7b/pmp.py"}
    return base
