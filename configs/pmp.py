"""Preference model pretraining: the ranking loss on a large and noisy set of comparisons.

python -m alignjax.train --config pmp.py         160 s after lm; held-out accuracy 79 % noisy, 88 % clean (three seeds: +-1)
The report's settings are in qwen_1_8b/pmp.py.
"""

from alignjax.config import Config, Data, Model, Optimiser

VARIANTS = ("", "tiny")


def config(variant: str) -> Config:
    c = Config(stage="ranking", name="pmp", steps=900, seed=0, parents={"model": "lm.py"})
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
    c.optimiser = Optimiser(learning_rate=1e-3, schedule="cosine", warmup_steps=30, b2=0.98)
    c.data = Data(
        kind="comparisons",
        train="toy/comparisons-noisy",
        heldout="toy/comparisons-noisy,toy/comparisons-clean",
        batch=48,
        max_length=30,
    )
    if variant == "tiny":
        c.name, c.steps, c.checkpoint_every, c.sample_every, c.parents = (
            "pmp-tiny",
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
