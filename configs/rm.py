"""The reward model: the ranking loss on a small and clean set of comparisons, from PMP (or, no_pmp, from the LM).

python -m alignjax.train --config rm.py
"""

from alignjax.config import Config, Data, Model, Optimiser, Ranking

VARIANTS = ("", "no_pmp", "tiny")


def config(variant: str) -> Config:
    c = Config(stage="ranking", name="rm", steps=100, seed=0, parents={"model": "pmp.py"})
    c.model = Model(vocab_size=512, d_model=128, layers=4, heads=4, kv_heads=4, head_size=32, d_ff=256, max_length=96)
    c.optimiser = Optimiser(learning_rate=2e-4, schedule="cosine", warmup_steps=10)
    c.data = Data(kind="comparisons", train="toy/comparisons-clean",
                  heldout="toy/comparisons-clean,toy/comparisons-noisy", batch=32, max_length=44)  # fmt: skip
    c.ranking = Ranking(demonstrations="toy/conversations")
    if variant == "no_pmp":
        c.name, c.parents = "rm-no-pmp", {"model": "lm.py"}
    if variant == "tiny":
        c.name, c.steps, c.checkpoint_every, c.sample_every, c.parents = "rm-tiny", 4, 2, 2, {"model": "pmp.py:tiny"}
        c.model = Model(vocab_size=512, d_model=32, layers=2, heads=4, kv_heads=2, head_size=8, d_ff=64, max_length=96)
        c.data.batch, c.data.examples = 8, 64
    return c
