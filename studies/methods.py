"""PPO beside the methods that people compare it with."""

from alignjax.claims import BestOf, Study
from alignjax.runs.records import Records


def seconds(run: Records) -> float:
    """Return the seconds of training or, for an arm that trains nothing, of answering."""
    return run.summary.get("answering_seconds", run.summary["training_seconds"])


study = Study(
    title="PPO and other methods",
    claim="""All arms begin with the same SFT policy and the same comparisons. PPO, GRPO and RLOO
learn from the reward model's score of as many responses; GRPO and RLOO need no value model. DPO
learns from the comparisons alone. Best of 16 trains nothing: it answers with the response of 16
that the reward model scores highest, so it has no greedy answers, and its KL is the upper bound
log 16 - 15/16. Seconds are those of the method's own run, without the parents, and for best of 16
those of answering the held-out prompts.""",
    arms={
        "PPO": {},
        "GRPO": {"config": "grpo.py"},
        "RLOO": {
            "config": "grpo.py",
            "ppo.advantage_estimator": "rloo",
            "ppo.kl_in": "reward",
            "ppo.kl_estimator": "k1",
        },
        "DPO": {"config": "dpo.py"},
        "best of 16": BestOf(n=16),
    },
    figures={
        "true score, sampled": "true_score/after",
        "true score, greedy": "true_score_greedy/after",
        "KL to the reference": "kl/after",
        "seconds": seconds,
    },
    curves=(
        "objective/true_score",
        "objective/kl",
        "rewards/accuracies",
        "rewards/margins",
    ),
    found="""All methods move what the policy samples and what it finds most likely: the true
score rises from 0.33 to 0.83 or more sampled, and from 0.59 to 0.88 or more greedy. PPO, GRPO and
RLOO end within 0.02 of each other, at the same KL; RLOO's lead does not exceed the scatter between
seeds. They have as many rollouts, of which PPO spends the first 25 on its value model alone. DPO
needs neither rollouts nor a reward model, and ends 0.02 below PPO, which is within the scatter
too, with 3.3 nats of KL against 2.9. Best of 16 reaches 0.75 without
training, and pays sixteen times for each answer. What a seed's SFT policy knows matters more than
the method: seeds end between 0.69 and 0.98. Other jobs shared the two cores, so seconds only tell
the order.""",
)
