"""PPO of Qwen 1.8B, section 3.2.2, on the prompts of Anthropic's helpful-base.

python -m alignjax.data.prepare hh_helpful_base
python -m alignjax.train --config qwen_1_8b/ppo.py      trains its parents first if need be
python -m alignjax.plan --config qwen_1_8b/ppo.py --topology v5e:2x4

Put text for the pretraining gradient into data/text.jsonl: {"text": ...} on each line. The run
fits on the 8 chips of one v5e host; with --config.ppo.rollout_tensor=2 it samples faster there
(docs/pods.md).

Numbers without a comment are the report's; (i) marks InstructGPT's, where the report is silent.

Expect: nothing has been measured here. The report says that too large a pretraining coefficient
impedes alignment, that one too small hardly helps against the alignment tax, and that the KL
penalty alone may suffice. How large it is depends on how losses are normalised, so watch the
metric pretrain/grad_norm_ratio.
"""

from alignjax.config import PPO, Config, Data, Model, Optimiser

PROMPTS = "tfds/hh_helpful_base"
TEXT = "data/text.jsonl"


def config(variant: str) -> Config:
    config = Config(stage="ppo", name="qwen-1.8b-ppo", microbatch_tokens=16384)
    config.steps = 500  # ours; not stated
    config.parents = {
        "policy": "qwen_1_8b/sft.py",
        "reference": "qwen_1_8b/sft.py",
        "value": "qwen_1_8b/rm.py",  # (i); where the value model starts is not stated
        "reward": "qwen_1_8b/rm.py",
    }
    config.model = Model(dtype="bfloat16", remat="everything", max_length=2048)
    # The optimiser is not stated: AdamW, as in pretraining.
    config.optimiser = Optimiser(learning_rate=1e-6)
    config.value_optimiser = Optimiser(learning_rate=5e-6)
    config.data = Data(
        kind="prompts",
        train=PROMPTS,
        heldout=PROMPTS,
        batch=256,  # (i): 512 responses
        max_length=1024,
        heldout_share=0.01,
    )
    config.ppo = PPO(
        samples_per_prompt=2,
        response_length=1024,  # ours, to fill the context of 2048; not stated
        temperature=1.0,  # (i)
        top_p=0.9,
        kl_coef=0.04,
        clip=0.2,  # (i)
        value_clip=0.15,
        gamma=1.0,  # (i)
        lam=0.95,  # (i)
        epochs=1,  # (i)
        minibatches=8,  # (i): minibatches of 64
        value_warmup_steps=50,
        normalise_scores="mean",
        pretrain_data=TEXT,
        pretrain_heldout=TEXT,
        pretrain_coef=0.5,  # ours; not stated
        pretrain_ratio=8.0,  # (i); the report: "significantly larger" than the PPO data
        slots=64,  # of 512 responses: what the cache has room for
        frozen_dtype="bfloat16",  # as they are computed
        eval_every=50,  # ours
        eval_prompts=256,  # ours: a rollout and its scoring every 50 steps
    )
    return config
