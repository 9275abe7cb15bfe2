"""The pretraining gradient: its coefficient and its volume."""

from alignjax.claims import Study


def arm(coef: float, ratio: float) -> dict:
    return {"ppo.pretrain_coef": coef, "ppo.pretrain_ratio": ratio}


study = Study(
    title="The pretraining gradient",
    claim="""The report adds a pretraining gradient against the alignment tax, and says that the volume of text must be much
larger than PPO's own data, that too large a coefficient impedes alignment, and that too small a one does little. An arm is
"coefficient x volume": the volume is in sequences of text for each response. The tax is the loss on held-out
pretraining text after PPO, less that before.""",
    arms={
        "0.1 x 0.25": arm(0.1, 0.25),
        "none": arm(0, 0),
        "0.01 x 1": arm(0.01, 1),
        "0.1 x 1": arm(0.1, 1),
        "0.1 x 4": arm(0.1, 4),
        "1 x 0.25": arm(1, 0.25),
        "1 x 1": arm(1, 1),
        "10 x 1": arm(10, 1),
    },
    figures={
        "tax, nats": lambda run: (
            run.summary["pretrain_loss/after"] - run.summary["pretrain_loss/before"]
        ),
        "true score after": "true_score/after",
        "score after": "score/after",
        "KL after": "kl/after",
    },
    curves=(
        "objective/true_score",
        "objective/kl",
        "loss/pretrain_avg",
        "pretrain/grad_norm_ratio",
    ),
    found="""Two of the three hold. A coefficient of 10 impedes: the true score ends at 0.62 in place of 0.87. One of 0.01 does
little: a third of what 0.1 does for the text. In between is a trade: 1 x 1 lowers the loss by 0.71 nats, for 0.03 of
true score. PPO by itself costs next to nothing here (0.015 nats in "none"), for it was SFT that cost the text; the
gradient brings that back, at 0.1 without harm to the score. That the volume must be much larger than PPO's is not seen:
at 0.1, sixteen times the text lowers the loss by 0.03 nats more; at 1, four times the text does more for the text and
harms the score less.""",
)
