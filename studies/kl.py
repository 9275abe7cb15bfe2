"""The KL coefficient, where the policy is pushed hard enough to over-optimise."""

from alignjax.claims import Study

HARD = {"steps": 150, "optimiser.learning_rate": 3e-4}


def fallen(run) -> float:
    """How far the true score is under its best at the end, each a mean of ten rollouts."""
    scores = [row["objective/true_score"] for row in run.metrics]
    means = [sum(scores[i : i + 10]) / 10 for i in range(len(scores) - 9)]
    return max(means) - means[-1]


study = Study(
    title="The KL coefficient",
    claim="""The report's KL coefficient is 0.04. What is learnt is the reward model's score; what is wanted is the true
score. For the two to part the policy has to be pushed: 150 rollouts in place of 60, and three times the default's learning
rate. The last two arms keep the default's rate.""",
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
        "true score, fallen from its best": fallen,
        "KL after": "kl/after",
        "entropy after": "entropy/after",
    },
    curves=("objective/scores", "objective/true_score", "objective/kl", "policy/entropy_avg"),
)
