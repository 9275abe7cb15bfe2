"""SFT of Qwen 1.8B, section 3.1, on data/sft.jsonl of yours: {"messages": [{"role": "user", "content": ...}, ...]} a line.

python -m alignjax.train --config qwen_1_8b/sft.py

The report's: learning rate 2e-6 after 1430 steps of warm-up, 4000 steps, batch 128, length 2048, weight decay 0.1, clip
1.0, AdamW (0.9, 0.95, 1e-8). Not stated: the schedule after the warm-up (constant here). Left out: dropout 0.1. One prompt in
a hundred is held out. To expect: nothing measured here.
"""

from alignjax.config import Config, Data, Model, Optimiser


def config(variant: str) -> Config:
    c = Config(stage="lm", name="qwen-1.8b-sft", steps=4000, microbatch_tokens=16384)
    c.parents, c.tokenizer, c.chat_template = (
        {"model": "hf://Qwen/Qwen-1_8B"},
        "hf://Qwen/Qwen2.5-0.5B",
        "chatml",
    )
    c.model = Model(
        dtype="bfloat16", remat="everything", max_length=2048
    )  # the rest is the checkpoint's
    c.optimiser = Optimiser(
        learning_rate=2e-6,
        warmup_steps=1430,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        clip_norm=1.0,
    )
    c.data = Data(
        "conversations",
        "data/sft.jsonl",
        "data/sft.jsonl",
        batch=128,
        max_length=2048,
        heldout_share=0.01,
    )
    return c
