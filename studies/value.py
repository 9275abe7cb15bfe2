"""Clipping of the value loss, and normalisation of the scores."""

from alignjax.claims import Study, mean

NO_CLIP = {"ppo.value_clip": 1e9}

study = Study(
    title="Value clipping and score normalisation",
    claim="""The report clips the value loss at 0.15 and normalises rewards by their running mean.
In the arms without clipping, the limit is so large that it never applies.""",
    arms={
        "clip 0.15, mean": {},
        "no clip, mean": NO_CLIP,
        "clip 0.15, mean and deviation": {"ppo.normalise_scores": "mean_std"},
    },
    figures={
        "explained variance, rollouts 15-25": mean("value/explained_variance", 15, 25),
        "explained variance, last 10": mean("value/explained_variance", -10),
        "KL after": "kl/after",
        "score after": "score/after",
        "true score after": "true_score/after",
        "the same, greedy": "true_score_greedy/after",
    },
    curves=(
        "objective/true_score",
        "objective/kl",
        "value/explained_variance",
        "val/clipfrac_avg",
    ),
    found="""Neither matters here. The explained variance is the same without the clip (0.49 and
0.50 early, 0.78 and 0.77 at the end). If scores are divided by their deviation, the value model
learns more slowly at first (0.38), and catches up. The true score ends the same in all arms,
within 0.01.""",
)
