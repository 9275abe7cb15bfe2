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
    found="""The pattern of Table 4 holds, and by as much. The RM gains ten points over PMP on
clean comparisons of its own tasks (90.6 against 81.1 %), and falls behind PMP on the noisy ones
(81.0 against 82.8 %), whose preference is another. It also gains on clean comparisons of tasks
that it has not seen: what it learns there, the form, is the same in all tasks. A tenth of the clean
pairs does half of that. Without PMP, the RM is behind on all sets, and at chance on noisy pairs:
1,000 pairs teach the form, and not which words are right.""",
)
