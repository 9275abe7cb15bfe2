"""GRPO: the policy learns from comparing several responses to a prompt, without a value model.

python -m alignjax.train --config grpo.py        40 s after sft and rm on two cores

Expect a true score of 0.34 -> 0.86 of sampled answers and 0.59 -> 0.90 of greedy ones, a KL of 3.0
nats and a loss on text of 2.75 -> 2.09 (five seeds), from as many responses as ppo.py samples.
Rollout, reward, pretraining gradient and evaluation are those of ppo.py. The other estimators
without a value model run from here too:

python -m alignjax.train --config grpo.py --config.ppo.advantage_estimator=dr_grpo
"""

from alignjax.config import PPO, Config, Optimiser, load

VARIANTS = ("", "tiny")


def config(variant: str) -> Config:
    config = load(f"ppo.py:{variant}")
    config.name = "grpo-tiny" if variant == "tiny" else "grpo"
    del config.parents["value"]
    config.value_optimiser = Optimiser()
    config.ppo.advantage_estimator = "grpo"
    config.ppo.whiten_advantages = False
    # The paper's: the estimator k3, as a term of the loss, with this coefficient.
    config.ppo.kl_in = "loss"
    config.ppo.kl_estimator = "k3"
    config.ppo.kl_coef = 0.04
    if variant == "tiny":
        # The shapes of ppo.py:tiny, whose compiled programs serve.
        config.ppo.value_warmup_steps = PPO().value_warmup_steps
    else:
        config.data.batch = 16
        config.ppo.samples_per_prompt = 4
    return config
