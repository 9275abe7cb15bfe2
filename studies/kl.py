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
    found="""Pushed so, the policy over-optimises: with 0.04 the learned score rises to 3.2, while the true score falls by 0.13 from
its best, to 0.79, and further without a penalty (0.71). 0.16 and 0.64 end at a lower learned score (2.9 and 2.8), a
true score of 0.91 and 0.93 and a third of the KL. So 0.04 stands on the weak side here, near 0.01; four seeds scatter
too widely (0.63 to 0.92 with 0.04) for an interval of these differences to leave out 0. At the default's rate nothing
much is lost in 150 rollouts: 0.02 of true score with 0.04, 0.03 without.""",
)
