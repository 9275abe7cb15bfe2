"""Preference model pretraining of Qwen 1.8B, section 3.2.1: one epoch over public comparisons.

for set in shp summarize prm800k hh_helpful_online; do python -m alignjax.data.prepare $set; done
python -m alignjax.train --config qwen_1_8b/pmp.py

The report states a constant learning rate of 3e-6, batch 64 and length 2048. Its comparisons are
not public: four of the sets of Table 4 stand for them. It does not state the optimiser (AdamW,
as in pretraining) or the number of epochs (one, as for the reward model).

Expect: nothing has been measured here at 1.8B. The report's PMP, of a larger model on its own
data, reaches 60 to 77 % on public sets.
"""

from alignjax.config import Config, Data, Model, Optimiser

SETS = "tfds/shp,tfds/summarize,tfds/prm800k,tfds/hh_helpful_online"


def config(variant: str) -> Config:
    config = Config(stage="ranking", name="qwen-1.8b-pmp", steps=0, microbatch_tokens=16384)
    config.parents = {"model": "hf://Qwen/Qwen-1_8B"}
    config.tokenizer = "hf://Qwen/Qwen2.5-0.5B"
    config.chat_template = "chatml"
    # The architecture is the checkpoint's.
    config.model = Model(dtype="bfloat16", remat="everything", max_length=2048)
    config.optimiser = Optimiser(learning_rate=3e-6)
    config.data = Data(kind="comparisons", train=SETS, heldout=SETS, batch=64, max_length=2048)
    return config
