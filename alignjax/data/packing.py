"""Sequences of any length in rows of few shapes, for the forward passes of all models.

A minibatch is a fixed set of examples; only its layout is decided here. Its
sequences are packed, longest first, into microbatches of about `budget` tokens, whose rows are as
wide as the longest sequence needs. A ladder says which shapes there are: the few of a run
(`ladders`), or a bounded list. (Grain's packing fills batches from a stream, which changes the
examples that a step learns from, so it does not serve here.)

In shapes, n is the number of sequences, m the number of those in a microbatch, w the width of a
row, s the number of devices that rows are divided over, and k the number of targets of each one.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

WIDTHS = (8, 4, 2, 1)  # a row is the longest possible sequence's length over one of these
FINE = 8  # up to so many rows every number is a shape, then four shapes for each doubling
ALIGNMENT = 8  # widths are multiples of this


class Shape(NamedTuple):
    """What decides which compiled program serves a microbatch."""

    rows: int  # a multiple of the devices that they are divided over
    width: int
    targets: int  # room for the targets of each device's rows


# (what a microbatch needs, devices that rows are divided over) -> the shapes to try, best first.
# A microbatch gets the first one that holds its longest group; the last one must.
Ladder = Callable[[Shape, int], Iterable[Shape]]


class Layout(NamedTuple):
    """One microbatch: which token of which sequence stands where."""

    sequence: np.ndarray  # [rows w] int32, number of the sequence; -1 on pads
    place: np.ndarray  # [rows w] int32, the token's number in its sequence; 0 on pads
    target_room: int = 0  # how many targets each device's rows may have

    @property
    def members(self) -> np.ndarray:
        """Return the sequences in it, in the order of their numbers."""
        return np.unique(self.sequence[self.sequence >= 0])

    @property
    def real(self) -> np.ndarray:
        """Return where there are tokens, not pads, [rows w] bool."""
        return self.sequence >= 0

    def take(self, array: np.ndarray) -> np.ndarray:
        """Return array[sequence, place] of an array [n ...], and 0 on pads, as [rows w ...]."""
        return np.where(self.real, array[np.maximum(self.sequence, 0), self.place], 0)

    def ends(self) -> np.ndarray:
        """Return where each member's last token stands, [m] int32, as a place in rows * w."""
        sequence = self.sequence.reshape(-1)
        next_place = np.append(self.place.reshape(-1)[1:], 0)
        last_tokens = np.flatnonzero((sequence >= 0) & (next_place == 0))
        by_member = np.argsort(sequence[last_tokens], kind="stable")
        return last_tokens[by_member].astype(np.int32)


class Spot(NamedTuple):
    """Where a sequence stands in a microbatch: in which row, from which place on."""

    sequence: int
    row: int
    start: int


class Targets(NamedTuple):
    """The targets of each device's rows, [s k], and which of them are real.

    A place is that in the device's rows, one behind the other.
    """

    places: np.ndarray  # int32
    real: np.ndarray  # bool


class Room:
    """What still fits in a microbatch while sequences are placed."""

    def __init__(self, shape: Shape, shards: int):
        self.width = shape.width
        self.tokens = np.full(shape.rows, shape.width)  # free in each row
        self.targets = np.full(shards, shape.targets)  # free on each device
        self.shard = np.arange(shape.rows) // (shape.rows // shards)  # of each row

    def place(self, group: Sequence[int], lengths: np.ndarray, counts: np.ndarray) -> list["Spot"]:
        """Place each sequence of a group in the first row with room, and take the room.

        If one of them finds none, nothing is placed, and the result is empty. `counts` are the
        targets of the sequences.
        """
        before = (self.tokens.copy(), self.targets.copy())
        spots = []
        for sequence in group:
            fits = self.tokens >= lengths[sequence]
            if counts[sequence]:
                fits &= (self.targets >= counts[sequence])[self.shard]
            row = int(np.argmax(fits))
            if not fits[row]:
                self.tokens, self.targets = before
                return []
            spots.append(Spot(sequence, row, self.width - self.tokens[row]))
            self.tokens[row] -= lengths[sequence]
            self.targets[self.shard[row]] -= counts[sequence]
        return spots


class Filling(NamedTuple):
    """A microbatch of a shape: where its sequences stand, and the groups that found no room."""

    spots: list[Spot]
    postponed: list[Sequence[int]]


def width_of(length: int, longest: int) -> int:
    """Return the narrowest row width that holds `length` tokens.

    The widths are fixed by the length of the longest possible sequence.
    """
    widths = [-(-longest // (ALIGNMENT * part)) * ALIGNMENT for part in WIDTHS]
    return next(width for width in widths if width >= length)


def rows_of(used: int, shards: int) -> int:
    """Return how many rows a microbatch gets that uses `used` of them.

    It is a multiple of `shards`, the number of devices that rows are divided over.
    """
    share = -(-used // shards)
    if share > FINE:
        # Four sizes between a power of two and the next.
        step = 2 ** (share - 1).bit_length() // 8
        share = -(-share // step) * step
    return share * shards


def exact(need: Shape, shards: int) -> list[Shape]:
    """Return what a microbatch needs, as it is."""
    return [need]


def fine(need: Shape, shards: int) -> list[Shape]:
    """Return a shape of a bounded list: rows as `rows_of` has them, targets in quarters."""
    rows = rows_of(need.rows, shards)
    tokens = rows // shards * need.width
    quarters = [-(-tokens * count // 4) for count in range(5)]
    targets = next(quarter for quarter in quarters if quarter >= need.targets)
    return [Shape(rows, need.width, targets)]


def pack(
    lengths: Sequence[int] | np.ndarray,
    groups: Iterable[Sequence[int]],
    longest: int,
    budget: int,
    shards: int = 1,
    ladder: Ladder = fine,
    counts: Sequence[int] | np.ndarray | None = None,
) -> list[Layout]:
    """Pack groups of sequences into microbatches, longest first; each group stays together.

    What is left after a microbatch needs some rows of the narrowest width that holds its longest
    sequence, at most as many as `budget` tokens fill. The ladder gives a shape for that need, which
    is then filled. Each sequence goes to the first row with room for it.

    Args:
      lengths: [n], of the sequences.
      groups: lists of numbers of sequences; a group is in one microbatch.
      longest: the length of the longest possible sequence.
      budget: tokens of a microbatch, pads included.
      shards: devices that rows are divided over.
      ladder: the shapes that there are.
      counts: [n], targets of the sequences; None: none.
    """
    lengths = np.asarray(lengths)
    counts = np.zeros(len(lengths), int) if counts is None else np.asarray(counts)
    remaining = sorted(groups, key=lambda group: -max(lengths[i] for i in group))
    layouts = []
    while remaining:
        need = needed(remaining, lengths, longest, budget, shards, counts)
        for shape in ladder(need, shards):
            filling = fill(remaining, lengths, shape, shards, counts)
            if filling.spots:
                break
        layouts.append(layout(filling.spots, lengths, shape))
        remaining = filling.postponed
    return layouts


def needed(
    groups: list[Sequence[int]],
    lengths: np.ndarray,
    longest: int,
    budget: int,
    shards: int,
    counts: np.ndarray,
) -> Shape:
    """Return the smallest shape for what the budget takes of groups, the longest first."""
    first_group = groups[0]
    width = width_of(max(lengths[i] for i in first_group), longest)
    rows_in_budget = budget // width // shards * shards
    most_rows = max(rows_in_budget, rows_of(len(first_group), shards))
    most = Shape(most_rows, width, most_rows * width)
    spots = fill(groups, lengths, most, shards, counts).spots
    of_row = np.zeros(most_rows, int)  # targets
    for spot in spots:
        of_row[spot.row] += counts[spot.sequence]
    used = 1 + max(spot.row for spot in spots)
    rows = -(-used // shards) * shards
    return Shape(rows, width, int(of_row[:rows].reshape(shards, -1).sum(axis=1).max()))


def fill(
    groups: list[Sequence[int]],
    lengths: np.ndarray,
    shape: Shape,
    shards: int,
    counts: np.ndarray,
) -> Filling:
    """Place what a shape has room for, the groups in their order."""
    room = Room(shape, shards)
    filling = Filling([], [])
    for group in groups:
        spots = room.place(group, lengths, counts)
        filling.spots.extend(spots)
        if not spots:
            filling.postponed.append(group)
    return filling


def layout(spots: Iterable[Spot], lengths: np.ndarray, shape: Shape) -> Layout:
    """Return the layout of a shape with each sequence at its spot."""
    sequence = np.full((shape.rows, shape.width), -1, np.int32)
    place = np.zeros((shape.rows, shape.width), np.int32)
    for spot in spots:
        length = lengths[spot.sequence]
        tokens = slice(spot.start, spot.start + length)
        sequence[spot.row, tokens] = spot.sequence
        place[spot.row, tokens] = np.arange(length)
    return Layout(sequence, place, shape.targets)


def targets(mask: np.ndarray, shards: int = 1, room: int = 0) -> Targets:
    """Return the places where mask [rows w] holds, of each device's rows by themselves.

    Logits are computed for these alone. `room` is k, the number of places; 0 is as many as there
    are.
    """
    by_shard = mask.reshape(shards, -1)
    size = room or max(int(by_shard.sum(axis=1).max()), 1)
    places = np.argsort(~by_shard, axis=1, kind="stable")[:, :size].astype(np.int32)
    return Targets(places, np.take_along_axis(by_shard, places, axis=1))


def at_targets(array: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return what array [rows w] has at targets [s k]."""
    return np.take_along_axis(array.reshape(len(targets), -1), targets, axis=1)


def padded(array: Any, count: int, fill: float) -> np.ndarray:
    """Return array [m ...] with `fill` behind it, as [count ...]."""
    array = np.asarray(array)
    filled = np.full((count, *array.shape[1:]), fill, array.dtype)
    filled[: len(array)] = array
    return filled
