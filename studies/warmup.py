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
different reward models. Every arm has 120 rollouts, which include the value-only updates. "none,
95 rollouts" has as many policy updates as remain after 50 value-only updates. In the arms
"changed", the value model comes from a complete PPO run under the RM, and the reward is now that
of the PMP model, which has another scale and another mean.""",
    arms={
        "50": {},
        "none": NONE,
        "none, 95 rollouts": NONE | {"steps": 95},
        "changed, 50": CHANGED,
        "changed, none": CHANGED | NONE,
    },
    figures={
        "explained variance, early": functools.partial(early_mean, name="value/explained_variance"),
        "value loss, early": functools.partial(early_mean, name="loss/value_avg"),
        "KL, early": functools.partial(early_mean, name="objective/kl"),
        "KL after": "kl/after",
        "score after": "score/after",
        "true score after": "true_score/after",
        "the same, greedy": "true_score_greedy/after",
    },
    curves=(
        "objective/true_score",
        "objective/kl",
        "value/explained_variance",
        "loss/value_avg",
    ),
    found="""The value model benefits, the policy does not. After 50 value-only updates the
values explain 56 % of the variance during the policy's first steps, without them 15 %; the value
loss is 3.0 against 5.8. Yet the early KL is no larger without them (0.26 against 0.33), and with
the same number of policy updates the end is the same (0.851 and 0.852). With the same number of
rollouts, "none" ends 0.014 higher, within the scatter between seeds. A value model of another
reward adapts quickly in any case: 50 % explained without a warm-up, 74 % with 50. These arms end
with a lower true score because PMP's preference leaves out the form. Responses of six tokens with
whitened advantages tolerate a poor value model; longer responses may not.""",
)
