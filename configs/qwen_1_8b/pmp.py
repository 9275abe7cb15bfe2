"""Preference model pretraining of Qwen 1.8B, section 3.2.1: one epoch over public comparisons of several kinds.

for set in shp summarize prm800k hh_helpful_online; do python -m alignjax.data.prepare $set; done
python -m alignjax.train --config qwen_1_8b/pmp.py

The report's: learning rate 3e-6, constant; batch 64; length 2048. Its comparisons are not public: these are four of Table
4's sets. Not stated: the optimiser (AdamW as in pretraining) and the number of epochs (one, as of the reward model). To
expect of 1.8B: nothing measured here; the report's PMP, of a larger model on its own data, has 60 to 77 % on public sets.
"""

from alignjax.config import Config, Data, Model, Optimiser


def config(variant: str) -> Config:
    c = Config(stage="ranking", name="qwen-1.8b-pmp", steps=0, microbatch_tokens=16384)
    c.parents, c.tokenizer, c.chat_template = (
        {"model": "hf://Qwen/Qwen-1_8B"},
        "hf://Qwen/Qwen2.5-0.5B",
        "chatml",
    )
    c.model = Model(
        dtype="bfloat16", remat="everything", max_length=2048
    )  # the rest is the checkpoint's
    c.optimiser = Optimiser(learning_rate=3e-6)
    sets = "tfds/shp,tfds/summarize,tfds/prm800k,tfds/hh_helpful_online"
    c.data = Data("comparisons", sets, sets, batch=64, max_length=2048)
    return c
