"""Top-p in the sampling of PPO."""

from alignjax.claims import Study, mean

study = Study(
    title="Top-p 0.9",
    claim="""The report samples with top-p 0.9 in PPO. Ratio and KL are of the full distribution in every arm. Each
arm's final figures are of responses sampled as in its training.""",
    arms={"0.9": {}, "1.0": {"ppo.top_p": 1.0}, "0.7": {"ppo.top_p": 0.7}},
    figures={
        "true score before": "true_score/before",
        "true score after": "true_score/after",
        "gap closed": "gap_closed",
        "score after": "score/after",
        "KL after": "kl/after",
        "entropy after": "entropy/after",
        "entropy, mean of training": mean("policy/entropy_avg"),
    },
    curves=("objective/true_score", "objective/scores", "objective/kl", "policy/entropy_avg"),
)
