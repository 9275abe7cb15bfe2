"""Preference model pretraining of Qwen 7B: all as in qwen_1_8b/pmp.py, whose docstring says what the report states and what to expect.

python -m alignjax.train --config qwen_7b/pmp.py
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    c = load("qwen_1_8b/pmp.py")
    c.name, c.parents = "qwen-7b-pmp", {"model": "hf://Qwen/Qwen-7B"}
    return c
