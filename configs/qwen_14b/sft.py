"""SFT of Qwen 14B: all as in qwen_1_8b/sft.py, whose docstring says what the report states and what to expect.

python -m alignjax.train --config qwen_14b/sft.py
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    c = load("qwen_1_8b/sft.py")
    c.name, c.parents = "qwen-14b-sft", {"model": "hf://Qwen/Qwen-14B"}
    return c
