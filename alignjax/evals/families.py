"""Group sequences that begin alike, so that what they share is read only once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Tokens = tuple[int, ...]


class Family(NamedTuple):
    """Sequences that begin with the same tokens."""

    shared: int  # tokens that all members begin with; 0 for sequences without a family
    members: list[int]  # numbers of the sequences


def group_families(sequences: Sequence[Tokens], worth: int) -> list[Family]:
    """Return families that hold every sequence once; each member is longer than what it shares.

    Sequences are compared with their neighbours in sorted order. Neighbours belong together if
    what they share is at least half of the longer one. A group becomes a family if that saves
    reading at least `worth` tokens. All remaining sequences are in one last family with
    `shared=0`.
    """
    families = []
    singles = []
    for group in similar_neighbours(sequences):
        saved_tokens = group.shared * (len(group.members) - 1)
        if saved_tokens >= worth:
            families.append(group)
        else:
            singles.extend(group.members)
    if singles:
        families.append(Family(0, singles))
    return families


def similar_neighbours(sequences: Sequence[Tokens]) -> list[Family]:
    """Return runs of neighbours in sorted order in which each shares half with the next."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    groups = [Family(0, [number]) for number in order[:1]]
    for number in order[1:]:
        group = groups[-1]
        previous = sequences[group.members[-1]]
        sequence = sequences[number]
        shortest = min(len(previous), len(sequence))
        shared = min(shared_length(previous, sequence), shortest - 1)
        if 2 * shared < max(len(previous), len(sequence)):
            groups.append(Family(0, [number]))
            continue
        shared_by_all = shared if len(group.members) == 1 else min(shared, group.shared)
        groups[-1] = Family(shared_by_all, [*group.members, number])
    return groups


def shared_length(first: Tokens, second: Tokens) -> int:
    """Return how many tokens two sequences share before they differ."""
    shortest = min(len(first), len(second))
    differs = np.array(first[:shortest]) != np.array(second[:shortest])
    return int(differs.argmax()) if differs.any() else shortest
