"""The reward model: the ranking loss on a small and clean set of comparisons, from PMP (or, no_pmp, from the LM).

python -m alignjax.train --config rm.py          25 s after pmp; held-out accuracy 87 % (two seeds: 86.7, 87.6)
python -m alignjax.train --config rm.py:no_pmp   25 s after lm; 64.5 % (two seeds: 62.9, 66.0)
python -m alignjax.train --config rm.py:qwen     the report's numbers, from models/Qwen-1_8B and data/ of yours
"""

from alignjax.config import Config, Data, Model, Optimiser, Ranking

VARIANTS = ("", "no_pmp", "tiny", "qwen")


def config(variant: str) -> Config:
    c = Config(stage="ranking", name="rm", steps=100, seed=0, parents={"model": "pmp.py"})
    c.model = Model(vocab_size=512, d_model=96, layers=3, heads=4, kv_heads=4, head_size=24, d_ff=192, max_length=64)
    c.optimiser = Optimiser(learning_rate=3e-4, schedule="cosine", warmup_steps=10)
    c.data = Data(kind="comparisons", train="toy/comparisons-clean",
                  heldout="toy/comparisons-clean,toy/comparisons-noisy", batch=48, max_length=30)  # fmt: skip
    c.ranking = Ranking(demonstrations="toy/conversations")
    if variant == "no_pmp":
        c.name, c.parents = "rm-no-pmp", {"model": "lm.py"}
    if variant == "tiny":
        c.name, c.steps, c.checkpoint_every, c.sample_every, c.parents = "rm-tiny", 4, 2, 2, {"model": "pmp.py:tiny"}
        c.model = Model(vocab_size=512, d_model=32, layers=2, heads=4, kv_heads=2, head_size=8, d_ff=64, max_length=64)
        c.data.batch, c.data.examples = 8, 64
    if variant == "qwen":  # section 3.2.1; one epoch: set steps to your comparisons / 64
        c.name, c.steps, c.parents, c.microbatch_tokens = "qwen-rm", 1000, {"model": "pmp.py:qwen"}, 16384
        c.model = Model(dtype="bfloat16", remat="everything", max_length=2048)  # the rest is the checkpoint's
        c.optimiser = Optimiser(learning_rate=3e-6)  # constant; the optimiser is not stated
        c.data = Data("comparisons", "data/rm.jsonl", "data/rm-heldout.jsonl", batch=64, max_length=2048)
        c.ranking = Ranking(demonstrations="data/sft-heldout.jsonl")
    return c
