"""Preference model pretraining: the ranking loss on a large and noisy set of comparisons.

python -m alignjax.train --config pmp.py         160 s after lm

Expect a held-out accuracy of 83 % on noisy comparisons, where 90 % is the best possible, and of
82 % on clean ones (five seeds: 77 to 85). The report's settings are in qwen_1_8b/pmp.py.
"""

from alignjax.config import Config, Data, Optimiser, load

VARIANTS = ("", "tiny")


def config(variant: str) -> Config:
    base = load(f"lm.py:{variant}")
    config = Config(stage="ranking", name="pmp", steps=900, seed=0)
    config.parents = {"model": "lm.py"}
    config.model = base.model
    config.optimiser = Optimiser(
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=30,
        b2=0.98,
    )
    config.data = Data(
        kind="comparisons",
        train="toy/comparisons-noisy",
        heldout="toy/comparisons-noisy,toy/comparisons-clean",
        batch=48,
        max_length=30,
    )
    if variant == "tiny":
        config.name = "pmp-tiny"
        config.steps = 4
        config.checkpoint_every = 2
        config.sample_every = 2
        config.parents = {"model": "lm.py:tiny"}
        config.data.batch = 8
        config.data.examples = 64
    return config
