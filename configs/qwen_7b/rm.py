"""The reward model of Qwen 7B: all as in qwen_1_8b/rm.py, whose docstring says what the report states and what to expect.

python -m alignjax.train --config qwen_7b/rm.py
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    c = load("qwen_1_8b/rm.py")
    c.name, c.parents = "qwen-7b-rm", {"model": "qwen_7b/pmp.py"}
    return c
