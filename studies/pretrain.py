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
        "tax, nats": lambda run: run.summary["pretrain_loss/after"] - run.summary["pretrain_loss/before"],
        "true score after": "true_score/after",
        "score after": "score/after",
        "KL after": "kl/after",
    },
    curves=("objective/true_score", "objective/kl", "loss/pretrain_avg", "pretrain/grad_norm_ratio"),
)
