"""Clipping of the value loss, and normalisation of the scores."""

from alignjax.claims import Study, mean

study = Study(
    title="Value clipping and score normalisation",
    claim="""The report clips the value loss at 0.15 and normalises rewards by their running mean. Without clipping the
limit is so far that it never binds.""",
    arms={
        "clip 0.15, mean": {},
        "no clip, mean": {"ppo.value_clip": 1e9},
        "clip 0.15, none": {"ppo.normalise_scores": "none"},
        "clip 0.15, mean and deviation": {"ppo.normalise_scores": "mean_std"},
        "no clip, mean and deviation": {"ppo.normalise_scores": "mean_std", "ppo.value_clip": 1e9},
    },
    figures={
        "explained variance, rollouts 15-25": mean("value/explained_variance", 15, 25),
        "explained variance, last 10": mean("value/explained_variance", -10),
        "KL after": "kl/after",
        "score after": "score/after",
        "true score after": "true_score/after",
    },
    curves=("objective/true_score", "objective/kl", "value/explained_variance", "val/clipfrac_avg"),
    found="""Neither matters here. Without the clip the explained variance is the same (0.456 and 0.451), without the running mean
too. Dividing by the deviation makes the value model learn more slowly (0.38 explained in place of 0.45). The true score
ends the same in all arms, within 0.005.""",
)
