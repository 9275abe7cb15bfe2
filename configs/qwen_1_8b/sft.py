"""SFT of Qwen 1.8B, section 3.1, on data/sft.jsonl of yours.

python -m alignjax.train --config qwen_1_8b/sft.py

Each line of the file has {"messages": [{"role": "user", "content": ...}, ...]}. One prompt in a
hundred is held out.

The report states a learning rate of 2e-6 after 1430 steps of warm-up, 4000 steps, batch 128,
length 2048, weight decay 0.1, clip 1.0, and AdamW (0.9, 0.95, 1e-8). It does not state the
schedule after the warm-up (constant here). Its dropout of 0.1 is left out.

Expect: nothing has been measured here.
"""

from alignjax.config import Config, Data, Model, Optimiser


def config(variant: str) -> Config:
    config = Config(stage="lm", name="qwen-1.8b-sft", steps=4000, microbatch_tokens=16384)
    config.parents = {"model": "hf://Qwen/Qwen-1_8B"}
    config.tokenizer = "hf://Qwen/Qwen2.5-0.5B"
    config.chat_template = "chatml"
    # The architecture is the checkpoint's.
    config.model = Model(dtype="bfloat16", remat="everything", max_length=2048)
    config.optimiser = Optimiser(
        learning_rate=2e-6,
        warmup_steps=1430,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        clip_norm=1.0,
    )
    config.data = Data(
        kind="conversations",
        train="data/sft.jsonl",
        heldout="data/sft.jsonl",
        batch=128,
        max_length=2048,
        heldout_share=0.01,
    )
    return config
