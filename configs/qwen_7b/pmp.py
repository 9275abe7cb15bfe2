"""PMP of Qwen 7B: as qwen_1_8b/pmp.py, which says what the report states and what to expect.

python -m alignjax.train --config qwen_7b/pmp.py
"""

from alignjax.config import Config, load


def config(variant: str) -> Config:
    base = load("qwen_1_8b/pmp.py")
    base.name = "qwen-7b-pmp"
    base.parents = {"model": "hf://Qwen/Qwen-7B"}
    return base
