"""The reward model of Qwen 1.8B, section 3.2.1: one epoch over better comparisons, after PMP.

python -m alignjax.data.prepare hh_helpful_base
python -m alignjax.train --config qwen_1_8b/rm.py       trains pmp.py first if need be
python -m alignjax.evaluate --run runs/qwen-1.8b-rm --sets hh_helpful_base,summarize,shp,prm800k

The report states a constant learning rate of 3e-6, batch 64, length 2048 and one epoch. Its
comparisons are not public: Anthropic's helpful-base stands for them. A shift brings the mean
score of chosen replies to 0.

Expect: nothing has been measured here. In Table 4, accuracy rises on the set that is tuned on
and may fall a little on the others.
"""

from alignjax.config import Config, Data, Model, Optimiser, Ranking

SET = "tfds/hh_helpful_base"


def config(variant: str) -> Config:
    config = Config(stage="ranking", name="qwen-1.8b-rm", steps=0, microbatch_tokens=16384)
    config.parents = {"model": "qwen_1_8b/pmp.py"}
    config.model = Model(dtype="bfloat16", remat="everything", max_length=2048)
    config.optimiser = Optimiser(learning_rate=3e-6)
    config.data = Data(kind="comparisons", train=SET, heldout=SET, batch=64, max_length=2048)
    config.ranking = Ranking(demonstrations=SET)
    return config
