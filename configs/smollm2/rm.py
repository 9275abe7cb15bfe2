"""A reward model from SmolLM2-135M-Instruct on the comparisons of Anthropic's harmless-base.

python -m alignjax.data.prepare hh_harmless_base
python -m alignjax.train --config smollm2/rm.py

In place of the hub, a directory: --config.parents.model=DIR. On a GPU, train for longer: the set
has 42,000 pairs, of which 41 steps see 656.
"""

from alignjax.config import Config, Data, Optimiser, Ranking, load

VARIANTS = ("", "tiny")


def config(variant: str) -> Config:
    base = load(f"smollm2/sft.py:{variant}")
    config = Config(stage="ranking", name="smollm2-rm", steps=41, microbatch_tokens=1024)
    config.parents = base.parents
    config.model = base.model
    config.lora = base.lora
    config.optimiser = Optimiser(learning_rate=3e-4, schedule="cosine", warmup_steps=4)
    config.data = Data(
        kind="comparisons",
        train=base.data.train,
        heldout=base.data.heldout,
        batch=16,
        max_length=192,
        heldout_examples=300,
    )
    # There are no demonstrations to shift the scores by: PPO subtracts their running mean.
    config.ranking = Ranking(demonstrations="")
    if variant == "tiny":
        config.name = "smollm2-rm-tiny"
        config.steps = 4
        config.data = load("rm.py:tiny").data
    return config
