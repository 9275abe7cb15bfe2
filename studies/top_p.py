"""Top-p in the sampling of PPO."""

from alignjax import inference
from alignjax.claims import Study
from alignjax.data import toy


def asked(**settings):
    """The true score of the policy's responses to 200 held-out prompts, however its arm sampled."""

    def figure(run) -> float:
        prompts = [
            row["prompt"] for row in toy.examples("prompts", "heldout", run.config["seed"], 200)
        ]
        responses = inference.load(run.workdir).generate(
            prompts, max_tokens=run.config["ppo.response_length"], **settings
        )
        pairs = zip(prompts, responses, strict=True)
        return sum(
            toy.true_score(prompt[0]["content"], response.text) for prompt, response in pairs
        ) / len(prompts)

    return figure


study = Study(
    title="Top-p 0.9",
    claim="""The report samples with top-p 0.9 in PPO. Ratio and KL are of the full distribution in every arm. Responses are
sampled as in the arm's training where nothing else is said: before PPO that alone makes the true scores differ.""",
    arms={"0.9": {}, "1.0": {"ppo.top_p": 1.0}, "0.7": {"ppo.top_p": 0.7}},
    figures={
        "true score before": "true_score/before",
        "true score after": "true_score/after",
        "after, all at 0.9": asked(top_p=0.9),
        "after, all at 1.0": asked(top_p=1.0),
        "after, all greedy": asked(temperature=0.0),
        "score after": "score/after",
        "KL after": "kl/after",
        "entropy after": "entropy/after",
    },
    curves=("objective/true_score", "objective/scores", "objective/kl", "policy/entropy_avg"),
    found="""What a smaller top-p gives, it gives in the asking: before PPO true scores go from 0.50 at 1.0 over 0.59 at 0.9 to 0.75
at 0.7. Asked in one way, the policies differ otherwise. At 0.9 those trained at 0.9 and 1.0 are within the seeds'
scatter, at 1.0 the one trained there is ahead (0.80 against 0.76), greedily all are the same (0.94). Training at 0.7
leaves a policy that needs it (0.81 asked at 0.9): what is never sampled is never unlearnt, and its entropy stays at
0.51 nats, in place of 0.37.""",
)
