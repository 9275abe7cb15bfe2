"""PPO of Qwen 1.8B, section 3.2.2, on the prompts of Anthropic's helpful-base and data/text.jsonl of yours: {"text": ...} a line.

python -m alignjax.data.prepare hh_helpful_base
python -m alignjax.train --config qwen_1_8b/ppo.py      sft.py, pmp.py and rm.py first, if they haven't run
python -m alignjax.plan --config qwen_1_8b/ppo.py --topology v5e:2x4      it fits on the 8 chips of one v5e host; with
    --config.ppo.rollout_tensor=2 it samples faster there (docs/pods.md)

Numbers without a comment are the report's; (i) is InstructGPT's, where the report is silent. To expect: nothing measured
here. The report: too large a pretraining coefficient impedes alignment, too small a one hardly helps against the alignment
tax, and the KL penalty alone may suffice; how large it is depends on how losses are normalised, so watch the metric
pretrain/grad_norm_ratio.
"""

from alignjax.config import PPO, Config, Data, Model, Optimiser


def config(variant: str) -> Config:
    c = Config(
        stage="ppo", name="qwen-1.8b-ppo", steps=500, microbatch_tokens=16384
    )  # steps are not stated; ours
    sft, rm = "qwen_1_8b/sft.py", "qwen_1_8b/rm.py"
    c.parents = {
        "policy": sft,
        "reference": sft,
        "value": rm,
        "reward": rm,
    }  # where the value starts is not stated (i)
    c.model = Model(dtype="bfloat16", remat="everything", max_length=2048)
    c.optimiser = Optimiser(
        learning_rate=1e-6
    )  # the optimiser is not stated; AdamW as in pretraining
    c.value_optimiser = Optimiser(learning_rate=5e-6)
    prompts = "tfds/hh_helpful_base"
    c.data = Data(
        "prompts", prompts, prompts, batch=256, max_length=1024, heldout_share=0.01
    )  # 512 responses (i)
    c.ppo = PPO(
        samples_per_prompt=2,
        top_p=0.9,
        kl_coef=0.04,
        value_clip=0.15,
        value_warmup_steps=50,
        normalise_scores="mean",
    )
    c.ppo.clip, c.ppo.gamma, c.ppo.lam, c.ppo.temperature = (
        0.2,
        1.0,
        0.95,
        1.0,
    )  # (i); all four not stated
    c.ppo.epochs, c.ppo.minibatches = 1, 8  # (i): minibatches of 64; not stated
    c.ppo.response_length = 1024  # not stated; ours, to fill the context of 2048
    c.ppo.slots = 64  # of 512 responses: what the cache has room for
    c.ppo.frozen_dtype = "bfloat16"  # as they are computed
    c.ppo.pretrain_data = c.ppo.pretrain_heldout = "data/text.jsonl"
    c.ppo.pretrain_ratio = (
        8.0  # (i); the report: "significantly larger" than the volume of PPO data
    )
    c.ppo.pretrain_coef = 0.5  # not stated; ours
    c.ppo.eval_every, c.ppo.eval_prompts = 50, 256  # ours: one rollout and its scoring in 50 steps
    return c
