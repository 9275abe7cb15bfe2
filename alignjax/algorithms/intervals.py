"""Intervals of figures of held-out data: how far they would move with other examples."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
STANDARD_ERRORS = 1.96  # on either side of a mean: its 95 % interval


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of the share `right / total` by Wilson's score method (1927).

    `total` must be above 0. The method also holds near shares of 0 and 1. It treats pairs as
    independent; pairs from one post or problem are not quite independent, and then the interval
    is too narrow.
    """
    test = stats.binomtest(right, total)
    interval = test.proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def half_width(groups: Sequence[Sequence[float]]) -> float:
    """Return half the 95 % interval of a mean over groups of equal size.

    The values of a group belong together, as the responses to one prompt do: only the groups are
    taken as independent. There must be two groups at least.
    """
    means = [float(np.mean(group)) for group in groups]
    return STANDARD_ERRORS * float(np.std(means, ddof=1)) / math.sqrt(len(means))
