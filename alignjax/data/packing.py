"""Sequences of any length in rows of few shapes: what every forward pass of training and scoring runs on.

A minibatch is a fixed set of examples; only its layout is decided here. Its sequences are packed, longest first, into
microbatches of about `budget` tokens, whose rows are as wide as the longest sequence asks. Shapes come from a short
list, so that a run compiles a bounded number of programs. (Grain's packing fills batches from a stream, and so changes
which examples a step learns from: it does not serve here.)
Letters: n sequences, m of them in a microbatch, w row width, k targets of a row.
"""

from typing import NamedTuple

import numpy as np

WIDTHS = (8, 4, 2, 1)  # a row is the longest possible sequence's length over one of these
FINE = 8  # up to so many rows every number is a shape, then four shapes for each doubling


class Layout(NamedTuple):
    """One microbatch: which token of which sequence stands where."""

    sequence: np.ndarray  # [rows w] int32, number of the sequence; -1 on pads
    place: np.ndarray  # [rows w] int32, the token's number in its sequence; 0 on pads

    @property
    def members(self) -> np.ndarray:
        """The sequences in it, in order of their numbers."""
        return np.unique(self.sequence[self.sequence >= 0])

    @property
    def real(self) -> np.ndarray:
        return self.sequence >= 0

    def take(self, array: np.ndarray) -> np.ndarray:
        """array[n ...][sequence, place], and 0 on pads, [rows w ...]."""
        return np.where(self.real, array[np.maximum(self.sequence, 0), self.place], 0)

    def ends(self) -> np.ndarray:
        """[m] int32: where each member's last token stands, as a place in rows * w."""
        flat, last = self.sequence.reshape(-1), np.append(self.place.reshape(-1)[1:], 0) == 0
        at = np.flatnonzero((flat >= 0) & last)
        return at[np.argsort(flat[at], kind="stable")].astype(np.int32)


def width_of(length: int, longest: int) -> int:
    """The narrowest row width that holds `length` tokens, of those for sequences of up to `longest`; multiples of 8."""
    return next(w for w in (-(-longest // (8 * part)) * 8 for part in WIDTHS) if w >= length)


def rows_of(used: int, shards: int) -> int:
    """The number of rows that `used` of them are given: a multiple of the devices that rows lie over."""
    share = -(-used // shards)
    if share > FINE:
        step = 2 ** (share - 1).bit_length() // 8  # four sizes between a power of two and the next
        share = -(-share // step) * step
    return share * shards


def pack(lengths, groups, longest: int, budget: int, shards: int = 1) -> list[Layout]:
    """Microbatches that hold every group of sequences (lists of numbers into lengths[n]) whole, longest first.

    A microbatch has as many rows as `budget` tokens fill, or the fewest of `rows_of` that its sequences need; each
    sequence goes to the first row with room for it.
    """
    lengths = np.asarray(lengths)
    left = sorted(groups, key=lambda group: -max(lengths[i] for i in group))
    out = []
    while left:
        width = width_of(max(lengths[i] for i in left[0]), longest)
        most = max(budget // width // shards * shards, rows_of(len(left[0]), shards))
        free, spots, later = np.full(most, width), [], []
        for group in left:
            before, mine = free.copy(), []
            for i in group:
                row = int(np.argmax(free >= lengths[i]))
                if free[row] < lengths[i]:
                    break
                mine.append((i, row, width - free[row]))
                free[row] -= lengths[i]
            if len(mine) == len(group):
                spots += mine
            else:
                free = before
                later.append(group)
        out.append(
            layout(spots, lengths, min(rows_of(int((free < width).sum()), shards), most), width)
        )
        left = later
    return out


def layout(spots, lengths, rows: int, width: int) -> Layout:
    """The Layout with sequence i in row r from place a on, for each (i, r, a) of `spots`."""
    sequence, place = np.full((rows, width), -1, np.int32), np.zeros((rows, width), np.int32)
    for i, row, at in spots:
        sequence[row, at : at + lengths[i]] = i
        place[row, at : at + lengths[i]] = np.arange(lengths[i])
    return Layout(sequence, place)


def targets(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places [rows k] int32 of the tokens in each row where mask[rows w] holds, which of them are real [rows k]).

    k is w or one, two or three quarters of it, so that logits are made for targets alone.
    """
    width, most = mask.shape[1], int(mask.sum(axis=1).max())
    k = next(k for k in (-(-width * quarters // 4) for quarters in (1, 2, 3, 4)) if k >= most)
    at = np.argsort(~mask, axis=1, kind="stable")[:, :k].astype(np.int32)
    return at, np.take_along_axis(mask, at, axis=1)


def padded(array, n: int, fill) -> np.ndarray:
    """array[m ...] with `fill` behind, [n ...]."""
    array = np.asarray(array)
    out = np.full((n, *array.shape[1:]), fill, array.dtype)
    out[: len(array)] = array
    return out
