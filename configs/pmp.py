"""Preference model pretraining: the ranking loss on a large and noisy set of comparisons.

python -m alignjax.train --config pmp.py
"""

from alignjax.config import Config, Data, Model, Optimiser

VARIANTS = ("", "tiny")


def config(variant: str) -> Config:
    c = Config(stage="ranking", name="pmp", steps=600, seed=0, parents={"model": "lm.py"})
    c.model = Model(vocab_size=512, d_model=128, layers=4, heads=4, kv_heads=4, head_size=32, d_ff=256, max_length=96)
    c.optimiser = Optimiser(learning_rate=5e-4, schedule="cosine", warmup_steps=20)
    c.data = Data(kind="comparisons", train="toy/comparisons-noisy",
                  heldout="toy/comparisons-noisy,toy/comparisons-clean", batch=32, max_length=44)  # fmt: skip
    if variant == "tiny":
        c.name, c.steps, c.checkpoint_every, c.sample_every, c.parents = "pmp-tiny", 4, 2, 2, {"model": "lm.py:tiny"}
        c.model = Model(vocab_size=512, d_model=32, layers=2, heads=4, kv_heads=2, head_size=8, d_ff=64, max_length=96)
        c.data.batch, c.data.examples = 8, 64
    return c
