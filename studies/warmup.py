"""Value-only updates before the policy's first, also where the reward model is another than the value model learnt from."""

from alignjax.claims import Study, mean

CHANGED = {"parents.value": "ppo.py", "parents.reward": "pmp.py"}


def early(name: str):
    """The metric's mean over the ten rollouts that the policy first learns from; two updates each."""
    return lambda run: mean(name, start := run.config["ppo.value_warmup_steps"] // 2, start + 10)(
        run
    )


study = Study(
    title="Fifty value-only updates first",
    claim="""The report updates the value model alone for the first 50 steps, so that it adapts to different reward models.
Every arm has 60 rollouts, of which value-only updates take their share; "none, 35 rollouts" has as many policy updates as
50 leave. In the arms "changed" the value model comes from a whole run of PPO under the RM, and the reward is now that
of the PMP model, which has another scale and another mean.""",
    arms={
        "50": {},
        "none": {"ppo.value_warmup_steps": 0},
        "none, 35 rollouts": {"ppo.value_warmup_steps": 0, "steps": 35},
        "100": {"ppo.value_warmup_steps": 100},
        "changed, 50": CHANGED,
        "changed, none": CHANGED | {"ppo.value_warmup_steps": 0},
        "changed, 100": CHANGED | {"ppo.value_warmup_steps": 100},
    },
    figures={
        "explained variance, early": early("value/explained_variance"),
        "value loss, early": early("loss/value_avg"),
        "KL, early": early("objective/kl"),
        "KL after": "kl/after",
        "score after": "score/after",
        "true score after": "true_score/after",
    },
    curves=("objective/true_score", "objective/kl", "value/explained_variance", "loss/value_avg"),
    found="""The value model gains by it, the policy doesn't. After 50 value-only updates the values explain 49 % of the variance
while the policy takes its first steps, without them 17 %; the value loss is 2.8 against 4.6. Yet early KL is no larger
without (0.23 against 0.27), and with as many policy updates the end is the same (0.868 and 0.874). At equal rollouts
"none" ends higher, for its policy learns in all of them; 100 updates take most of a run of 60 rollouts, and cost the
score. A value model of another reward adapts quickly whatever is done: 56 % explained without a warm-up, 74 % with 50.
Responses of six tokens with whitened advantages forgive a poor value model; longer ones may not.""",
)
