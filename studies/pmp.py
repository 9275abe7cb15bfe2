"""Preference model pretraining before the reward model, with more and fewer clean comparisons."""

from alignjax.claims import Study

INSIDE = "toy/comparisons-clean:tasks=copy+find+last"
OUTSIDE = "toy/comparisons-clean:tasks=join+count"
NOISY = "toy/comparisons-noisy"


def arm(pairs: int, **fields) -> dict:
    """Return the fields of a reward model that learns from so many clean comparisons."""
    return {
        "config": "rm.py",
        "data.heldout": f"{INSIDE},{OUTSIDE},{NOISY}",
        "data.train": f"{INSIDE},examples={pairs}",
        **fields,
    }


FROM_LM = {"parents.model": "lm.py"}
UNTRAINED = {"optimiser.learning_rate": 0.0, "steps": 1}

study = Study(
    title="PMP before RM",
    claim="""The report trains the reward model on a small set of clean comparisons, after PMP on
a large and noisy one. In its Table 4, PMP leads on data that the RM has not seen, and the RM
leads by far on data that it has seen. Here the RM learns from clean comparisons of three tasks
("inside"); the two other tasks are "outside". PMP has seen 24,000 noisy comparisons of all five.
Those judge the words alone. "RM alone" starts from the language model.""",
    arms={
        "PMP, then RM on 1000": arm(1000),
        "PMP, then RM on 100": arm(100),
        "PMP alone": arm(1000, **UNTRAINED),
        "RM alone on 1000": arm(1000, **FROM_LM),
    },
    figures={
        "accuracy inside": f"accuracy/{INSIDE}",
        "accuracy outside": f"accuracy/{OUTSIDE}",
        "accuracy, noisy": f"accuracy/{NOISY}",
        "loss inside": f"loss/{INSIDE}",
    },
    found="""The pattern of Table 4 holds. Outside the RM's tasks, PMP alone is ahead of PMP and
RM (94.8 against 93.7 %); inside, it is behind (84.5 against 85.5 %). Both differences exceed the
scatter between seeds. Both are only about one point: PMP does nearly all the work. With fewer
clean pairs and the same number of updates, the RM falls behind PMP inside, too (81.8 % with 300,
76.5 % with 100), because it memorises them. Without PMP, it is little better than chance outside
(59 %). Ten times the updates bring it to 74 % inside and 66 % outside, with a loss of 2: it lacks
data, not steps.""",
)
