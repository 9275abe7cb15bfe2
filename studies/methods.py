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
    found="""One seed so far. All methods raise the true score of sampled answers, from 0.60 to
0.87 or more. Best of 16 ends below those that train (0.87). GRPO and RLOO reach 0.93 with as
little KL as PPO (0.90), which spends 25 of its 60 rollouts on the value model alone. DPO reaches
0.93 too, in a fifth of the time and without the reward model, but moves twice as far from the
reference. Greedy answers of the SFT policy are true already (0.98); DPO and PPO lose a little of
that, GRPO and RLOO nothing.""",
)
