"""PPO of SmolLM2-135M-Instruct against its reward model, on the prompts of harmless-base.

python -m alignjax.data.prepare hh_harmless_base
python -m alignjax.train --config smollm2/ppo.py

The reward model is trained first, in runs/smollm2-rm, unless it is there. In place of the hub, a
directory DIR: train rm.py from it first, then give --config.parents.policy=DIR, the same for
reference, and --config.parents.value=runs/smollm2-rm, the same for reward. docs/real_model.md
shows what comes of it.
"""

from alignjax.config import PPO, Config, Data, Lora, Model, Optimiser, load

VARIANTS = ("", "tiny")
BASE = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
SET = "tfds/hh_harmless_base"


def config(variant: str) -> Config:
    config = Config(
        stage="ppo",
        name="smollm2-ppo",
        steps=24,
        seed=0,
        microbatch_tokens=1024,
        checkpoint_every=12,
    )
    config.parents = {
        "policy": BASE,
        "reference": BASE,
        "value": "smollm2/rm.py",
        "reward": "smollm2/rm.py",
    }
    config.model = Model(max_length=256)
    config.lora = Lora(rank=16, alpha=32.0)
    config.optimiser = Optimiser(learning_rate=5e-4, warmup_steps=4)
    config.value_optimiser = Optimiser(learning_rate=1e-3)
    config.data = Data(
        kind="prompts",
        train=SET,
        heldout=SET,
        batch=16,
        max_length=64,
        heldout_examples=300,
    )
    config.ppo = PPO(
        samples_per_prompt=2,
        response_length=32,
        kl_coef=0.2,
        minibatches=2,
        normalise_scores="mean",
        value_warmup_steps=4,
        pretrain_data=SET,
        pretrain_heldout=SET,
        pretrain_coef=0.1,
        pretrain_ratio=0.25,
        eval_prompts=64,
    )
    if variant == "tiny":
        config.name = "smollm2-ppo-tiny"
        config.steps = 4
        config.checkpoint_every = 2
        config.sample_every = 2
        config.microbatch_tokens = 4096
        config.parents = {
            "policy": "smollm2/sft.py:tiny",
            "reference": "smollm2/sft.py:tiny",
            "value": "smollm2/rm.py:tiny",
            "reward": "smollm2/rm.py:tiny",
        }
        tiny = load("ppo.py:tiny")
        config.model = tiny.model
        config.data = tiny.data
        config.ppo = tiny.ppo
    return config
