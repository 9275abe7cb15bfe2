"""The KL coefficient, where the policy is trained hard enough to over-optimise."""

from alignjax.claims import Study
from alignjax.runs.records import Records

HARD = {"optimiser.learning_rate": 3e-4}
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
score, while the aim is the true score. The two only diverge if the policy is trained hard: at
three times the default learning rate. The last arm is the default run.""",
    arms={
        "0.04": HARD,
        "0": HARD | {"ppo.kl_coef": 0.0},
        "0.16": HARD | {"ppo.kl_coef": 0.16},
        "0.64": HARD | {"ppo.kl_coef": 0.64},
        "0.04, as by default": {},
    },
    figures={
        "score after": "score/after",
        "true score after": "true_score/after",
        "the same, greedy": "true_score_greedy/after",
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
    found="""Without a penalty, a policy that is trained this hard over-optimises: its learned score
is no higher than with 0.04 (5.0 and 4.9), its KL is 6.8 nats, and its true score ends at 0.70,
0.09 below its best. With 0.04 it loses 0.02 from its best and ends at 0.82. Larger coefficients
do better here: 0.64 ends at 0.89 sampled and 0.92 greedy, more than the scatter between seeds
allows for, and with the KL of a run at the default rate. So 0.04 is on the weak side in this
world; at the default rate it ends at 0.85 and 0.90.""",
)
