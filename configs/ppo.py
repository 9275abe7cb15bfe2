"""PPO on the embedded world.

python -m alignjax.train --config ppo.py
"""

from alignjax.config import PPO, Config, Data, Model, Optimiser

VARIANTS = ("", "tiny", "qwen")


def config(variant: str) -> Config:
    c = Config(stage="ppo", name="ppo", steps=150, seed=0)
    c.parents = {"policy": "sft.py", "reference": "sft.py", "value": "rm.py", "reward": "rm.py"}
    c.model = Model(vocab_size=512, d_model=128, layers=4, heads=4, kv_heads=4, head_size=32, d_ff=256, max_length=96)
    c.optimiser = Optimiser(learning_rate=1e-4)
    c.value_optimiser = Optimiser(learning_rate=3e-4)
    c.data = Data(kind="prompts", train="toy/prompts", heldout="toy/prompts", batch=32, max_length=28)
    c.ppo = PPO(response_length=16, minibatches=2, pretrain_coef=0.1, pretrain_ratio=0.25)
    if variant == "tiny":
        c.name, c.steps, c.checkpoint_every, c.sample_every, c.parents = "ppo-tiny", 4, 2, 2, {role: spec + ":tiny" for role, spec in c.parents.items()}
        c.model = Model(vocab_size=512, d_model=32, layers=2, heads=4, kv_heads=2, head_size=8, d_ff=64, max_length=96)
        c.data.batch, c.data.examples = 8, 64
        c.ppo.value_warmup_steps = 3
    return c
