"""Read several continuations of one context in one sequence, a tree.

The context is the trunk. Each continuation is a branch that sees the trunk and itself.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from alignjax.data import packing
from alignjax.evals.families import Tokens

TRUNK = 0  # the branch number of the context


class Continuation(NamedTuple):
    """A continuation whose likelihood a request asks for."""

    request: int
    tokens: Tokens


class Question(NamedTuple):
    """A context, and the continuations that requests ask for after it."""

    context: Tokens
    continuations: list[Continuation]


class Target(NamedTuple):
    """A token whose probability is wanted."""

    place: int  # of the token before it
    label: int  # the token


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A context and its continuations as one sequence."""

    # The context, then each continuation without its last token: nothing follows that.
    tokens: list[int]
    positions: list[int]  # in the text that a branch and its trunk make
    branches: list[int]  # TRUNK, or the number of the branch, counted from 1
    targets: list[list[Target]]  # of each continuation


def build_tree(context: Tokens, continuations: list[Tokens]) -> Tree:
    """Return the tree of a context and its continuations; none may be empty."""
    tokens = list(context)
    positions = list(range(len(context)))
    branches = [TRUNK] * len(context)
    targets = []
    for labels in continuations:
        start = len(tokens)
        length = len(labels) - 1
        places = [len(context) - 1, *range(start, start + length)]
        targets.append(list(map(Target, places, labels)))
        tokens.extend(labels[:-1])
        positions.extend(range(len(context), len(context) + length))
        branches.extend([branches[-1] + 1] * length)
    return Tree(tokens=tokens, positions=positions, branches=branches, targets=targets)


class Span(NamedTuple):
    """Where the targets of one request are: in a row, from one column to before another."""

    request: int
    row: int
    columns: slice


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The targets of a microbatch."""

    rows: list[list[Target]]  # `place` is the place in the row
    spans: list[Span]  # of all requests in the microbatch

    def arrays(self, width: int) -> Int[np.ndarray, "2 rows targets"]:
        """Return places and labels, padded with 0 to `width` targets in each row."""
        padded = np.zeros((2, len(self.rows), width), np.int32)
        for number, row in enumerate(self.rows):
            padded[:, number, : len(row)] = np.array(row, np.int32).reshape(-1, 2).T
        return padded


def locate_targets(layout: packing.Layout, questions: list[Question], trees: list[Tree]) -> Targets:
    """Return where the targets of each request lie in a microbatch of trees."""
    rows = [[] for _ in layout.place]
    spans = []
    is_start = layout.real & (layout.place == 0)
    for row, start in zip(*np.nonzero(is_start), strict=True):
        number = layout.sequence[row, start]
        continuations = questions[number].continuations
        for continuation, targets in zip(continuations, trees[number].targets, strict=True):
            first = len(rows[row])
            columns = slice(first, first + len(targets))
            spans.append(Span(continuation.request, row, columns))
            rows[row] += [Target(start + target.place, target.label) for target in targets]
    return Targets(rows=rows, spans=spans)
