"""Top-p in the sampling of PPO."""

import functools

from alignjax import inference
from alignjax.claims import Study
from alignjax.data import toy
from alignjax.runs.records import Records

PROMPTS = 200


def true_score_sampled(run: Records, **settings) -> float:
    """Return the true score of the policy on held-out prompts, sampled with these settings."""
    examples = toy.examples("prompts", "heldout", run.config["seed"], PROMPTS)
    prompts = [example["prompt"] for example in examples]
    responses = inference.load(run.workdir).generate(
        prompts, max_tokens=run.config["ppo.response_length"], **settings
    )
    scores = [
        toy.true_score(prompt[0]["content"], response.text)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return sum(scores) / len(scores)


study = Study(
    title="Top-p 0.9",
    claim="""The report samples with top-p 0.9 in PPO. In every arm the ratio and the KL are those
of the full distribution. Unless a column says otherwise, responses are sampled as in the arm's
training, so the true scores already differ before PPO.""",
    arms={
        "0.9": {},
        "1.0": {"ppo.top_p": 1.0},
        "0.7": {"ppo.top_p": 0.7},
    },
    figures={
        "true score before": "true_score/before",
        "true score after": "true_score/after",
        "after, all at 0.9": functools.partial(true_score_sampled, top_p=0.9),
        "after, all at 1.0": functools.partial(true_score_sampled, top_p=1.0),
        "after, all greedy": functools.partial(true_score_sampled, temperature=0.0),
        "score after": "score/after",
        "KL after": "kl/after",
        "entropy after": "entropy/after",
    },
    curves=(
        "objective/true_score",
        "objective/scores",
        "objective/kl",
        "policy/entropy_avg",
    ),
    found="""The gain of a smaller top-p comes from sampling with it: before PPO, the true score
is 0.28 at 1.0, 0.33 at 0.9 and 0.46 at 0.7. If all are sampled in the same way, the policies
compare differently. At 0.9, those trained at 0.9 and 1.0 are equal (0.85). At 1.0, the one trained
at 1.0 is ahead (0.79 against 0.75). Greedily, all are within the scatter between seeds (0.88 to
0.90). Training at 0.7 produces a policy that needs 0.7 (it scores 0.81 when sampled at 0.9): what
is never sampled is never unlearnt, and the policy's entropy stays at 0.48 nats instead of 0.36.""",
)
