"""The number of responses to each prompt."""

from alignjax.claims import Study, mean

study = Study(
    title="Two responses for each prompt",
    claim="""The report samples two responses for each prompt and finds that this helps. Every arm
has 64 responses in a rollout, and the same number of rollouts.""",
    arms={
        "2": {},
        "1": {"data.batch": 64, "ppo.samples_per_prompt": 1},
        "4": {"data.batch": 16, "ppo.samples_per_prompt": 4},
    },
    figures={
        "true score, mean of training": mean("objective/true_score"),
        "true score after": "true_score/after",
        "the same, greedy": "true_score_greedy/after",
        "score after": "score/after",
        "KL after": "kl/after",
    },
    curves=(
        "objective/true_score",
        "objective/scores",
        "objective/kl",
        "policy/entropy_avg",
    ),
    found="""This is not confirmed here: with 64 responses in each rollout, the arms with one, two
and four responses to a prompt end within 0.01 of each other in true score, sampled and greedy,
and within the scatter between seeds in KL.""",
)
