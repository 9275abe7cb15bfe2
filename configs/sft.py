"""SFT on conversations of mixed quality; only the assistant's tokens are trained.

python -m alignjax.train --config sft.py         30 s after lm; held-out loss 0.84 nats a token (three seeds: 0.82-0.88)
The report's settings are in qwen_1_8b/sft.py.
"""

from alignjax.config import Config, Data, Model, Optimiser

VARIANTS = ("", "tiny")


def config(variant: str) -> Config:
    c = Config(stage="lm", name="sft", steps=200, seed=0, parents={"model": "lm.py"})
    c.model = Model(
        vocab_size=512,
        d_model=96,
        layers=3,
        heads=4,
        kv_heads=4,
        head_size=24,
        d_ff=192,
        max_length=64,
    )
    c.optimiser = Optimiser(learning_rate=1e-3, schedule="cosine", warmup_steps=20)
    c.data = Data(
        kind="conversations",
        train="toy/conversations",
        heldout="toy/conversations",
        batch=64,
        max_length=30,
    )
    if variant == "tiny":
        c.name, c.steps, c.checkpoint_every, c.sample_every, c.parents = (
            "sft-tiny",
            4,
            2,
            2,
            {"model": "lm.py:tiny"},
        )
        c.model = Model(
            vocab_size=512,
            d_model=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_size=8,
            d_ff=64,
            max_length=64,
        )
        c.data.batch, c.data.examples = 8, 64
    return c
