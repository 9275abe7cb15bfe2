"""The pretraining gradient: its coefficient and its volume."""

from alignjax.claims import Study
from alignjax.runs.records import Records


def arm(coefficient: float, volume: float) -> dict:
    """Return the fields of an arm; the volume is in sequences of text for each response."""
    return {"ppo.pretrain_coef": coefficient, "ppo.pretrain_ratio": volume}


def alignment_tax(run: Records) -> float:
    """Return how much the loss on held-out pretraining text has risen, in nats."""
    return run.summary["pretrain_loss/after"] - run.summary["pretrain_loss/before"]


study = Study(
    title="The pretraining gradient",
    claim="""The report adds a pretraining gradient against the alignment tax. It says that the
volume of text must be much larger than PPO's own data, that too large a coefficient impedes
alignment, and that too small a coefficient has little effect. Each arm is "coefficient x volume",
with the volume in sequences of text for each response. The tax is the loss on held-out
pretraining text after PPO minus the loss before.""",
    arms={
        "0.1 x 0.25": arm(0.1, 0.25),
        "none": arm(0, 0),
        "0.01 x 1": arm(0.01, 1),
        "0.1 x 1": arm(0.1, 1),
        "1 x 1": arm(1, 1),
        "10 x 1": arm(10, 1),
    },
    figures={
        "tax, nats": alignment_tax,
        "true score after": "true_score/after",
        "the same, greedy": "true_score_greedy/after",
        "score after": "score/after",
        "KL after": "kl/after",
    },
    curves=(
        "objective/true_score",
        "objective/kl",
        "loss/pretrain_avg",
        "pretrain/grad_norm_ratio",
    ),
    found="""Two of the three claims hold. A coefficient of 10 impedes alignment: the true score
ends at 0.75 instead of 0.85. A coefficient of 0.01 has little effect: two fifths of what 0.1 does
for the text. In between, more is better here: 1 x 1 lowers the loss by 0.81 nats, and its true
score is within the scatter between seeds. PPO by itself costs almost nothing (0.03 nats in
"none"), because it was SFT that made the text worse, and the gradient recovers that loss. The
third claim, that the volume must be much larger than PPO's, is not confirmed: at 0.1, four times
the text lowers the loss by another 0.014 nats.""",
)
