"""The reward model of Qwen 1.8B, section 3.2.1: one epoch over comparisons of higher quality, from PMP.

python -m alignjax.data.prepare hh_helpful_base
python -m alignjax.train --config qwen_1_8b/rm.py       pmp.py first, if it hasn't run
python -m alignjax.evaluate --run runs/qwen-1.8b-rm --sets hh_helpful_base,hh_helpful_online,summarize,shp,prm800k

The report's: learning rate 3e-6, constant; batch 64; length 2048; one epoch. Its comparisons are not public: Anthropic's
helpful-base stands for them. To expect: nothing measured here; the pattern of Table 4 is that accuracy rises on the set
that is tuned on and may fall a little on the others. A shift brings the mean score of chosen replies to 0.
"""

from alignjax.config import Config, Data, Model, Optimiser, Ranking


def config(variant: str) -> Config:
    c = Config(stage="ranking", name="qwen-1.8b-rm", steps=0, microbatch_tokens=16384)
    c.parents = {"model": "qwen_1_8b/pmp.py"}
    c.model = Model(dtype="bfloat16", remat="everything", max_length=2048)
    c.optimiser = Optimiser(learning_rate=3e-6)
    c.data = Data(
        "comparisons", "tfds/hh_helpful_base", "tfds/hh_helpful_base", batch=64, max_length=2048
    )
    c.ranking = Ranking(demonstrations="tfds/hh_helpful_base")
    return c
