"""The KL coefficient, where the policy is trained hard enough to over-optimise."""

from alignjax.claims import Study
from alignjax.runs.records import Records

HARD = {
    "steps": 150,
    "optimiser.learning_rate": 3e-4,
}
WINDOW = 10  # rollouts


def drop_from_best(run: Records) -> float:
    """Return how far the true score ends below its best, each a mean over ten rollouts."""
    scores = [row["objective/true_score"] for row in run.metrics]
    windows = [scores[start : start + WINDOW] for start in range(len(scores) - WINDOW + 1)]
    means = [sum(window) / WINDOW for window in windows]
    return max(means) - means[-1]


study = Study(
    title="The KL coefficient",
    claim="""The report uses a KL coefficient of 0.04. The policy learns from the reward model's
score, while the aim is the true score. The two only diverge if the policy is trained hard: with
150 rollouts instead of 60, and three times the default learning rate. The last two arms keep the
default rate.""",
    arms={
        "0.04": HARD,
        "0": HARD | {"ppo.kl_coef": 0.0},
        "0.01": HARD | {"ppo.kl_coef": 0.01},
        "0.16": HARD | {"ppo.kl_coef": 0.16},
        "0.64": HARD | {"ppo.kl_coef": 0.64},
        "0.04, default rate": {"steps": 150},
        "0, default rate": {"steps": 150, "ppo.kl_coef": 0.0},
    },
    figures={
        "score after": "score/after",
        "true score after": "true_score/after",
        "true score, fallen from its best": drop_from_best,
        "KL after": "kl/after",
        "entropy after": "entropy/after",
    },
    curves=(
        "objective/scores",
        "objective/true_score",
        "objective/kl",
        "policy/entropy_avg",
    ),
    found="""Trained this hard, the policy over-optimises: with 0.04 the learned score rises to
3.2, while the true score falls by 0.13 from its best, to 0.79. Without a penalty it falls further
(0.71). With 0.16 and 0.64 it ends with a lower learned score (2.9 and 2.8), a true score of 0.91
and 0.93, and a third of the KL. So 0.04 is on the weak side here, close to 0.01. Four seeds
scatter too widely (0.63 to 0.92 with 0.04) for the intervals of these differences to exclude 0.
At the default rate, 150 rollouts lose little: 0.02 of true score with 0.04, and 0.03 without a
penalty.""",
)
