"""GRPO: the policy learns from comparing several responses to a prompt, without a value model.

python -m alignjax.train --config grpo.py        2 minutes after sft and rm on two cores

Expect a true score of 0.59 -> 0.93, a KL of 0.97 nats and a loss on text of 2.66 -> 2.16 (one
seed; 84 % of the gap to the best is closed), from as many responses as ppo.py samples. Rollout,
reward, pretraining gradient and evaluation are those of ppo.py. The other estimators without a
value model run from here too:

python -m alignjax.train --config grpo.py --config.ppo.advantage_estimator=dr_grpo
"""

from alignjax.config import PPO, Config, Data, Optimiser, load

VARIANTS = ("", "tiny")


def config(variant: str) -> Config:
    base = load(f"lm.py:{variant}")
    config = Config(stage="ppo", name="grpo", steps=60, seed=0)
    config.parents = {"policy": "sft.py", "reference": "sft.py", "reward": "rm.py"}
    config.model = base.model
    config.optimiser = Optimiser(learning_rate=1e-4, schedule="cosine")
    config.data = Data(
        kind="prompts",
        train="toy/prompts",
        heldout="toy/prompts",
        batch=16,
        max_length=22,
    )
    config.ppo = PPO(
        advantage_estimator="grpo",
        whiten_advantages=False,
        samples_per_prompt=4,
        response_length=14,
        # The paper's: the estimator k3, as a term of the loss, with this coefficient.
        kl_in="loss",
        kl_estimator="k3",
        kl_coef=0.04,
        minibatches=2,
        pretrain_coef=0.1,
        pretrain_ratio=0.25,
        eval_every=15,
    )
    if variant == "tiny":
        config.name = "grpo-tiny"
        config.steps = 4
        config.checkpoint_every = 2
        config.sample_every = 2
        config.parents = {role: f"{spec}:tiny" for role, spec in config.parents.items()}
        # The shapes of ppo.py:tiny, whose compiled programs serve.
        config.data.batch = 8
        config.data.examples = 64
        config.ppo.samples_per_prompt = 2
        config.ppo.eval_every = 2
        config.ppo.eval_prompts = 8
    return config
