"""Sequences of any length in rows of few shapes, for the forward passes of all models.

A minibatch is a fixed set of examples; only its layout is decided here. Its
sequences are packed, longest first, into microbatches of about `budget` tokens, whose rows are as
wide as the longest sequence needs. Shapes come from a short list, so a run compiles a bounded
number of programs. (Grain's packing fills batches from a stream, which changes the examples that a
step learns from, so it does not serve here.)

In shapes, n is the number of sequences, m the number of those in a microbatch, w the width of a
row and k the number of targets of a row.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

WIDTHS = (8, 4, 2, 1)  # a row is the longest possible sequence's length over one of these
FINE = 8  # up to so many rows every number is a shape, then four shapes for each doubling
ALIGNMENT = 8  # widths are multiples of this


class Layout(NamedTuple):
    """One microbatch: which token of which sequence stands where."""

    sequence: np.ndarray  # [rows w] int32, number of the sequence; -1 on pads
    place: np.ndarray  # [rows w] int32, the token's number in its sequence; 0 on pads

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
    """The places of the targets in each row, [rows k] int32, and which of them are real."""

    places: np.ndarray
    real: np.ndarray


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


def pack(
    lengths: Sequence[int] | np.ndarray,
    groups: Iterable[Sequence[int]],
    longest: int,
    budget: int,
    shards: int = 1,
) -> list[Layout]:
    """Pack groups of sequences into microbatches, longest first; each group stays together.

    A microbatch has as many rows as `budget` tokens fill, or the fewest of `rows_of` that its
    sequences need. Each sequence goes to the first row with room for it.

    Args:
      lengths: [n], of the sequences.
      groups: lists of numbers of sequences; a group is in one microbatch.
      longest: the length of the longest possible sequence.
      budget: tokens of a microbatch, pads included.
      shards: devices that rows are divided over.
    """
    lengths = np.asarray(lengths)
    remaining = sorted(groups, key=lambda group: -max(lengths[i] for i in group))
    layouts = []
    while remaining:
        first_group = remaining[0]
        width = width_of(max(lengths[i] for i in first_group), longest)
        rows_in_budget = budget // width // shards * shards
        most_rows = max(rows_in_budget, rows_of(len(first_group), shards))
        free = np.full(most_rows, width)  # tokens that still fit in each row
        spots = []
        postponed = []
        for group in remaining:
            group_spots = place_group(group, lengths, free, width)
            if group_spots is None:
                postponed.append(group)
            else:
                spots += group_spots
        used_rows = int((free < width).sum())
        rows = min(rows_of(used_rows, shards), most_rows)
        layouts.append(layout(spots, lengths, rows, width))
        remaining = postponed
    return layouts


def place_group(
    group: Sequence[int], lengths: np.ndarray, free: np.ndarray, width: int
) -> list[Spot] | None:
    """Place every sequence of a group in the first row with room, and take the room from `free`.

    If one of them finds no room, return None and leave `free` as it was.
    """
    free_before = free.copy()
    spots = []
    for sequence in group:
        row = int(np.argmax(free >= lengths[sequence]))
        if free[row] < lengths[sequence]:
            free[:] = free_before
            return None
        spots.append(Spot(sequence, row, width - free[row]))
        free[row] -= lengths[sequence]
    return spots


def layout(spots: Iterable[Spot], lengths: np.ndarray, rows: int, width: int) -> Layout:
    """Return the layout with each sequence at its spot."""
    sequence = np.full((rows, width), -1, np.int32)
    place = np.zeros((rows, width), np.int32)
    for spot in spots:
        length = lengths[spot.sequence]
        tokens = slice(spot.start, spot.start + length)
        sequence[spot.row, tokens] = spot.sequence
        place[spot.row, tokens] = np.arange(length)
    return Layout(sequence, place)


def targets(mask: np.ndarray) -> Targets:
    """Return the places in each row where mask [rows w] holds.

    Logits are computed for these alone.
    k is w, or one, two or three quarters of it.
    """
    width = mask.shape[1]
    most = int(mask.sum(axis=1).max())
    quarters = [-(-width * count // 4) for count in (1, 2, 3, 4)]
    size = next(quarter for quarter in quarters if quarter >= most)
    places = np.argsort(~mask, axis=1, kind="stable")[:, :size].astype(np.int32)
    return Targets(places, np.take_along_axis(mask, places, axis=1))


def padded(array: Any, count: int, fill: float) -> np.ndarray:
    """Return array [m ...] with `fill` behind it, as [count ...]."""
    array = np.asarray(array)
    filled = np.full((count, *array.shape[1:]), fill, array.dtype)
    filled[: len(array)] = array
    return filled
