"""Preference model pretraining before the reward model, as the number of clean comparisons varies."""

from alignjax.claims import Study

INSIDE, OUTSIDE = (
    "toy/comparisons-clean:tasks=copy+find+last",
    "toy/comparisons-clean:tasks=join+count",
)
ALL = {"config": "rm.py", "data.heldout": f"{INSIDE},{OUTSIDE},toy/comparisons-noisy"}


def arm(pairs: int, **fields) -> dict:
    return ALL | {"data.train": f"{INSIDE},examples={pairs}"} | fields


study = Study(
    title="PMP before RM",
    claim="""The report trains the reward model on a small set of clean comparisons after PMP on a large and noisy one; its
Table 4 has PMP ahead where the RM has seen nothing, and RM far ahead where it has. Here the RM learns from clean comparisons of
three tasks (inside); the two others are outside. PMP has seen 24,000 noisy comparisons of all five. "Alone" begins with the
language model; "long" has as many updates, at the learning rate of PMP, as PMP and RM have together.""",
    arms={
        "PMP, then RM on 1000": arm(1000),
        "PMP, then RM on 300": arm(300),
        "PMP, then RM on 100": arm(100),
        "PMP alone": arm(1000, **{"optimiser.learning_rate": 0.0, "steps": 1}),
        "RM alone on 1000": arm(1000, **{"parents.model": "lm.py"}),
        "RM alone on 1000, long": arm(
            1000, **{"parents.model": "lm.py", "steps": 1000, "optimiser.learning_rate": 1e-3}
        ),
        "RM alone on 300": arm(300, **{"parents.model": "lm.py"}),
        "RM alone on 100": arm(100, **{"parents.model": "lm.py"}),
    },
    figures={
        "accuracy inside": f"accuracy/{INSIDE}",
        "accuracy outside": f"accuracy/{OUTSIDE}",
        "accuracy, noisy": "accuracy/toy/comparisons-noisy",
        "loss inside": f"loss/{INSIDE}",
    },
    found="""The pattern of Table 4 holds. Outside the RM's tasks PMP alone is ahead of PMP and RM (94.8 against 93.7 %), inside it
is behind (84.5 against 85.5 %), each by more than the seeds' scatter. Both gaps are but a point: PMP does nearly all
the work. With fewer clean pairs, in as many updates, the RM falls behind PMP inside too (81.8 % with 300, 76.5 % with
100), as it learns them by heart. Without PMP it is little better than chance outside (59 %), and ten times the updates
bring it to 74 % inside and 66 % outside, with a loss of 2: what is lacking is data, not steps.""",
)
