"""Value-only updates before the policy's first, also under another reward model than before."""

import functools

from alignjax.claims import Study, mean
from alignjax.runs.records import Records

CHANGED = {"parents.value": "ppo.py", "parents.reward": "pmp.py"}
NONE = {"ppo.value_warmup_steps": 0}
EARLY = 10  # rollouts
UPDATES_PER_ROLLOUT = 2


def early_mean(run: Records, name: str) -> float:
    """Return a metric's mean over the first ten rollouts that the policy learns from."""
    first = run.config["ppo.value_warmup_steps"] // UPDATES_PER_ROLLOUT
    return mean(name, first, first + EARLY)(run)


study = Study(
    title="Fifty value-only updates first",
    claim="""The report updates only the value model for the first 50 steps, so that it adapts to
different reward models. Every arm has 60 rollouts, which include the value-only updates. "none,
35 rollouts" has as many policy updates as remain after 50 value-only updates. In the arms
"changed", the value model comes from a complete PPO run under the RM, and the reward is now that
of the PMP model, which has another scale and another mean.""",
    arms={
        "50": {},
        "none": NONE,
        "none, 35 rollouts": NONE | {"steps": 35},
        "100": {"ppo.value_warmup_steps": 100},
        "changed, 50": CHANGED,
        "changed, none": CHANGED | NONE,
        "changed, 100": CHANGED | {"ppo.value_warmup_steps": 100},
    },
    figures={
        "explained variance, early": functools.partial(early_mean, name="value/explained_variance"),
        "value loss, early": functools.partial(early_mean, name="loss/value_avg"),
        "KL, early": functools.partial(early_mean, name="objective/kl"),
        "KL after": "kl/after",
        "score after": "score/after",
        "true score after": "true_score/after",
    },
    curves=(
        "objective/true_score",
        "objective/kl",
        "value/explained_variance",
        "loss/value_avg",
    ),
    found="""The value model benefits, the policy does not. After 50 value-only updates the
values explain 49 % of the variance during the policy's first steps, without them 17 %; the value
loss is 2.8 against 4.6. Yet the early KL is no larger without them (0.23 against 0.27), and with
the same number of policy updates the end is the same (0.868 and 0.874). With the same number of
rollouts, "none" ends higher, because its policy learns in all of them. 100 updates take up most
of a run of 60 rollouts and cost score. A value model of another reward adapts quickly in any
case: 56 % explained without a warm-up, 74 % with 50. Responses of six tokens with whitened
advantages tolerate a poor value model; longer responses may not.""",
)
