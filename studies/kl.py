"""The KL coefficient, in a run that is long enough to over-optimise."""

from alignjax.claims import Study, mean

LAST = {"steps": 150}


def fallen(run) -> float:
    """How far the true score is under its best, each a mean of ten rollouts."""
    scores = [row["objective/true_score"] for row in run.metrics]
    means = [sum(scores[i : i + 10]) / 10 for i in range(len(scores) - 9)]
    return max(means) - means[-1]


study = Study(
    title="The KL coefficient",
    claim="""The report's KL coefficient is 0.04. What is learnt is the reward model's score; what is wanted is the true
score. 150 rollouts, two and a half times the default, let the two part.""",
    arms={
        "0.04": LAST,
        "0": LAST | {"ppo.kl_coef": 0.0},
        "0.01": LAST | {"ppo.kl_coef": 0.01},
        "0.16": LAST | {"ppo.kl_coef": 0.16},
        "0.64": LAST | {"ppo.kl_coef": 0.64},
    },
    figures={
        "score after": "score/after",
        "true score after": "true_score/after",
        "true score, fallen from its best": fallen,
        "KL after": "kl/after",
        "entropy after": "entropy/after",
        "true score, mean of training": mean("objective/true_score"),
    },
    curves=("objective/scores", "objective/true_score", "objective/kl", "policy/entropy_avg"),
)
