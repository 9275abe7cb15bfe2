"""A run's microbatches have few shapes, chosen from its data before the first step."""

import numpy as np
import pytest

from alignjax.config import Model
from alignjax.data import ladders, packing
from alignjax.data.packing import Shape

LONGEST = 512
COSTS = ladders.costs_of(Model(), "lm", 2048)


def lengths_of(seed: int, count: int = 32) -> np.ndarray:
    """Return lengths as of chats: median 96, sigma 0.6."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(96), 0.6, count))
    return np.clip(lengths, 2, LONGEST).astype(int)


def pack(seed: int, budget: int, shards: int, ladder: packing.Ladder) -> list[packing.Layout]:
    """Pack pairs whose targets are the last third of each sequence."""
    lengths = lengths_of(seed)
    pairs = [[number, number + 1] for number in range(0, 32, 2)]
    return packing.pack(lengths, pairs, LONGEST, budget, shards, ladder, counts=lengths // 3)


def shape_of(layout: packing.Layout) -> Shape:
    return Shape(*layout.sequence.shape, layout.target_room)


def ladder_of(budget: int, shards: int) -> ladders.Rungs:
    needs = [
        shape_of(layout)
        for seed in range(64)
        for layout in pack(seed, budget, shards, packing.exact)
    ]
    return ladders.choose(needs, COSTS, shards)


@pytest.mark.parametrize(
    "budget, shards, share", [(2048, 1, 0.87), (4096, 1, 0.88), (4096, 4, 0.8)]
)
def test_batches_that_were_not_seen_have_the_same_few_shapes_and_few_pads(budget, shards, share):
    """With a shape for each number of rows, 0.91 of the tokens are real."""
    ladder = ladder_of(budget, shards)
    assert len(ladder.shapes) <= ladders.MOST
    shapes = []
    real = 0
    for seed in range(1000, 1100):
        layouts = pack(seed, budget, shards, ladder)
        placed = np.concatenate([layout.members for layout in layouts])
        assert sorted(placed) == list(range(32))
        shapes += map(shape_of, layouts)
        real += lengths_of(seed).sum()
    assert set(shapes) <= set(ladder.shapes)
    assert real / sum(shape.rows * shape.width for shape in shapes) > share
    assert all(shape.rows % shards == 0 for shape in shapes)


def test_no_microbatch_has_more_targets_on_a_device_than_its_shape_has_room_for():
    ladder = ladder_of(1024, 2)
    for seed in range(1000, 1020):
        lengths = lengths_of(seed)
        for layout in pack(seed, 1024, 2, ladder):
            last_third = layout.real & (layout.place >= (lengths - lengths // 3)[layout.sequence])
            _, real = packing.targets(last_third, 2, layout.target_room)
            assert real.sum() == last_third.sum() > 0


def test_equal_needs_have_one_shape():
    ladder = ladders.choose([Shape(8, 64, 100)] * 5, COSTS, 1)
    assert ladder.shapes == (Shape(8, 64, 104),)  # with room for a few more targets


def test_a_shape_that_saves_nothing_is_not_compiled():
    """Of rows 99 and 100, the larger one serves for both; 50 is worth a program."""
    needs = [Shape(rows, 64, 0) for rows in (50, 99, 100)]
    ladder = ladders.choose(needs, COSTS, 1)
    assert ladder.shapes == (Shape(50, 64, 0), Shape(100, 64, 0))


def test_a_ladder_does_not_depend_on_the_order_of_the_sample():
    needs = [shape_of(x) for seed in range(16) for x in pack(seed, 2048, 1, packing.exact)]
    one = ladders.choose(needs, COSTS, 1)
    assert ladders.choose(needs[::-1], COSTS, 1) == one


def test_what_no_shape_of_the_ladder_holds_gets_one_of_its_own():
    """A sequence that is longer than any of the sample costs a compilation, and no more."""
    ladder = ladders.choose([Shape(4, 64, 10)], COSTS, 1)
    (layout, *_) = packing.pack([200, 9], [[0], [1]], LONGEST, 1024, 1, ladder, counts=[150, 3])
    assert layout.sequence.shape == (1, 256) and layout.members.tolist() == [0, 1]
