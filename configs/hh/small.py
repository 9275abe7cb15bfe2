"""The chain on real human text, on a CPU in minutes: Anthropic's harmless-base, a small model.

python -m alignjax.data.prepare hh_harmless_base      with --manual_dir DIR if there is no network
python -m alignjax.train --config hh/small.py --workdir runs/hh/ppo
python -m alignjax.evaluate --run runs/hh/hh-rm --sets hh_harmless_base

The parents lm, sft, pmp and rm are trained first, beside the run; the tokenizer is trained on
the set. This shows that everything runs on real text, not that 1.3M parameters and some hundred
thousand words can tell which of two replies is less harmful.

On 1,200 + 300 of the set's rows, the loss on training comparisons goes from 0.69 to 0.57 (PMP)
and from 0.65 to 0.35 (RM). The held-out accuracy of the RM is 54.6 % [47.8, 61.3] of 205 pairs.
PPO takes its score from 0.20 to 0.31 at a KL of 0.4 nats.
"""

from alignjax.config import PPO, Config, Data, Model, Optimiser

VARIANTS = ("", "lm", "sft", "pmp", "rm")
SET = "tfds/hh_harmless_base"
PARENTS = {
    "lm": {},
    "sft": {"model": "hh/small.py:lm"},
    "pmp": {"model": "hh/small.py:lm"},
    "rm": {"model": "hh/small.py:pmp"},
    "ppo": {
        "policy": "hh/small.py:sft",
        "reference": "hh/small.py:sft",
        "value": "hh/small.py:rm",
        "reward": "hh/small.py:rm",
    },
}


def config(variant: str) -> Config:
    stage = variant or "ppo"
    config = Config(name=f"hh-{stage}", seed=0)
    config.parents = dict(PARENTS[stage])
    config.model = Model(
        vocab_size=2048,
        d_model=128,
        layers=4,
        heads=4,
        kv_heads=4,
        head_size=32,
        d_ff=352,
        max_length=256,
    )
    config.optimiser = Optimiser(learning_rate=1e-3, schedule="cosine", warmup_steps=10)
    config.data = Data(kind="conversations", train=SET, heldout=SET, batch=32, max_length=256)
    if stage == "lm":
        config.steps = 150
        config.data.kind = "text"
        config.data.max_length = 128
    elif stage == "sft":
        config.steps = 60
    elif stage in ("pmp", "rm"):
        config.stage = "ranking"
        config.steps = 60
        config.data.kind = "comparisons"
        config.optimiser.learning_rate = 3e-4
        if stage == "pmp":  # noisier comparisons: with the rows that are dropped by default
            config.data.train = f"{SET}:same_role=keep,empty=keep"
    else:
        config.stage = "ppo"
        config.steps = 20
        config.optimiser.learning_rate = 1e-4
        config.value_optimiser.learning_rate = 3e-4
        config.data = Data(kind="prompts", train=SET, heldout=SET, batch=16, max_length=128)
        config.ppo = PPO(
            response_length=48,
            minibatches=2,
            value_warmup_steps=6,
            pretrain_data=SET,
            pretrain_heldout=SET,
            pretrain_coef=0.1,
            pretrain_ratio=0.5,
            eval_every=5,
            eval_prompts=16,
        )
    return config
