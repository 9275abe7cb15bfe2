"""The few shapes that the microbatches of a run have, chosen before its first step.

Each shape is a program to compile, and a microbatch that is smaller than its shape computes pads.
The shapes are chosen from what a sample of minibatches needs, so they follow from config and data
alone: a resumed run finds the same ones.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignjax.config import Model
from alignjax.data import mixture
from alignjax.data.packing import Ladder, Shape, exact, fine

Rows = dict[str, Any]  # arrays of some examples, as `encoding.encode` makes them

MOST = 4  # shapes
WORTH = 0.01  # another shape must save this share of the computation
CLASSES = 16  # needs of targets are told apart to this share of a microbatch's tokens
EXAMPLES = 4096  # in a sample, about
FEWEST_BATCHES = 4  # in a sample
MOST_BATCHES = 64  # in a sample
HELDOUT_PARTS = 4  # of each held-out set, in a sample
SPARE = 32  # a shape has room for one more target for so many
# What one more microbatch costs, as a share of the tokens of a full one: its gradient is added to
# the others', and a small one leaves an accelerator idle.
SHARE_OF_A_CALL = 1 / 16


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What parts of a microbatch cost, in multiplications."""

    call: float  # of a microbatch, in tokens
    token: float
    neighbour: float  # of a token, for each place of its row
    target: float

    def of(self, shapes: np.ndarray, shards: int) -> np.ndarray:
        """Return the costs of shapes [... 3], whose targets are those of each of `shards`."""
        shapes = np.asarray(shapes, float)
        rows = shapes[..., 0]
        width = shapes[..., 1]
        targets = shapes[..., 2]
        tokens = rows * width + self.call
        return (
            tokens * self.token + rows * width**2 * self.neighbour + shards * targets * self.target
        )


def costs_of(model: Model, head: str, microbatch_tokens: int) -> Costs:
    """Return the costs of a role's microbatches; its `head` is "lm" or "scalar"."""
    heads = model.heads * model.head_size
    kv_heads = model.kv_heads * model.head_size
    feed_forward = 3 * model.d_model * model.d_ff
    if model.experts:
        feed_forward *= model.experts_per_token
    layer = 2 * model.d_model * (heads + kv_heads) + feed_forward
    words = model.vocab_size if head == "lm" else 0
    return Costs(
        call=SHARE_OF_A_CALL * microbatch_tokens,
        token=model.layers * layer,
        neighbour=2 * model.layers * heads,
        target=words * model.d_model,
    )


class Options:
    """What one or two microbatches of the shapes of a ladder hold together, and cost."""

    def __init__(self, shapes: np.ndarray, costs: Costs, shards: int):
        one, other = np.triu_indices(len(shapes))
        pairs = np.stack([shapes[one], shapes[other]])  # [2 pairs 3]
        tokens = pairs[..., 0] * pairs[..., 1]
        single = costs.of(shapes, shards)
        self.tokens = np.concatenate([shapes[:, 0] * shapes[:, 1], tokens.sum(axis=0)])
        self.width = np.concatenate([shapes[:, 1], pairs[..., 1].min(axis=0)])
        self.targets = np.concatenate([shapes[:, 2], pairs[..., 2].sum(axis=0)])
        self.cost = np.concatenate([single, single[one] + single[other]])
        larger = np.where(tokens[0] >= tokens[1], one, other)
        self.first = np.concatenate([np.arange(len(shapes)), larger])  # the shape to fill first

    def costs_for(self, needs: np.ndarray) -> np.ndarray:
        """Return what each option costs for each of the needs [n 3], as [n options].

        What stands in narrow rows fits into fewer rows that are wider. An option that is too small
        costs infinity.
        """
        rows = needs[:, :1]
        width = needs[:, 1:2]
        targets = needs[:, 2:]
        holds = (self.tokens >= rows * width) & (self.width >= width) & (self.targets >= targets)
        return np.where(holds, self.cost, np.inf)


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """A ladder of a few shapes."""

    shapes: tuple[Shape, ...]
    costs: Costs

    def __call__(self, need: Shape, shards: int) -> Iterator[Shape]:
        """Yield the cheapest shape that has what is needed, or the larger one of two such.

        The other shapes of sufficient width follow, those first that cost the least for what they
        take. A shape of `fine`, which a run has not compiled yet, is the last resort.
        """
        shapes = np.array(self.shapes)
        options = Options(shapes, self.costs, shards)
        cost = options.costs_for(np.array([need]))[0]
        if np.isfinite(cost).any():
            yield self.shapes[options.first[np.argmin(cost)]]
        taken = np.minimum(shapes[:, 0] * shapes[:, 1], need.rows * need.width)
        price = self.costs.of(shapes, shards) / taken
        for place in np.argsort(price, kind="stable"):
            if self.shapes[place].width >= need.width:
                yield self.shapes[place]
        yield from fine(need, shards)


class Choice:
    """The search for the ladder that costs the least for the needs of a sample."""

    def __init__(self, needs: Iterable[Shape], costs: Costs, shards: int):
        self.costs = costs
        self.shards = shards
        uses: dict[tuple, int] = {}
        largest: dict[tuple, np.ndarray] = {}
        for need in needs:
            part = CLASSES * shards * need.targets // (need.rows * need.width)
            name = (need.rows, need.width, part)
            uses[name] = uses.get(name, 0) + 1
            largest[name] = np.maximum(largest.get(name, 0), need)
        self.needs = np.array(list(largest.values()))
        self.uses = np.array(list(uses.values()))
        half_rows = -(-self.needs[:, 0] // (2 * shards)) * shards
        half_targets = -(-self.needs[:, 2] // 2)
        halves = np.stack([half_rows, self.needs[:, 1], half_targets], axis=1)
        self.candidates = np.unique(np.concatenate([self.needs, halves]), axis=0)

    def spent(self, ladder: np.ndarray) -> float:
        """Return the cost of all needs, infinity if the ladder [shapes 3] does not hold them."""
        cost = Options(ladder, self.costs, self.shards).costs_for(self.needs).min(axis=1)
        return float((self.uses * cost).sum())

    def covering(self) -> np.ndarray:
        """Return the ladder of one shape that holds each need."""
        width = self.needs[:, 1].max()
        tokens = (self.needs[:, 0] * self.needs[:, 1]).max()
        rows = -(-tokens // (width * self.shards)) * self.shards
        return np.array([[rows, width, self.needs[:, 2].max()]])

    def extended(self, ladder: np.ndarray) -> np.ndarray:
        """Return the best ladder of one more shape, and then of others in each place."""
        ladder = self.best([np.vstack([ladder, candidate]) for candidate in self.candidates])
        for place in range(len(ladder)):
            others = np.delete(ladder, place, axis=0)
            changed = [np.vstack([others, candidate]) for candidate in self.candidates]
            ladder = self.best([ladder, *changed])
        return ladder

    def best(self, ladders: list[np.ndarray]) -> np.ndarray:
        """Return the ladder that costs the least, the first of equals."""
        return ladders[int(np.argmin([self.spent(ladder) for ladder in ladders]))]


def choose(needs: Iterable[Shape], costs: Costs, shards: int, most: int = MOST) -> Rungs:
    """Return a ladder of at most so many shapes that costs little for these needs.

    A shape is added as long as this saves WORTH of the computation.
    """
    choice = Choice(needs, costs, shards)
    ladder = choice.covering()
    while len(ladder) < most:
        extended = choice.extended(ladder)
        if choice.spent(extended) > (1 - WORTH) * choice.spent(ladder):
            break
        ladder = extended
    shapes = [
        with_spare_targets(Shape(*shape), shards) for shape in np.unique(ladder, axis=0).tolist()
    ]
    return Rungs(shapes=tuple(shapes), costs=costs)


def with_spare_targets(shape: Shape, shards: int) -> Shape:
    """Return a shape with room for a few more targets than the sample had."""
    targets = shape.targets + -(-shape.targets // SPARE)
    return shape._replace(targets=min(targets, shape.rows // shards * shape.width))


def shape_of(microbatch: Any) -> Shape:
    """Return the shape of a microbatch, which may have `targets`.

    Its rows are those of `packed`, or of `sequence` if only their places are known.
    """
    if hasattr(microbatch, "packed"):
        rows, width = microbatch.packed.tokens.shape
    else:
        rows, width = microbatch.sequence.shape
    targets = getattr(microbatch, "targets", None)
    return Shape(rows, width, 0 if targets is None else targets.shape[1])


def sample_size(examples: int) -> int:
    """Return how many minibatches of so many examples a sample has."""
    return min(max(EXAMPLES // examples, FEWEST_BATCHES), MOST_BATCHES)


def samples(
    batches: mixture.Batches | None, heldout: Iterable[Rows], heldout_batch: int
) -> Iterator[Rows]:
    """Yield the first minibatches of a run, and the first parts of what is held out."""
    if batches is not None:
        yield from map(batches.get, range(sample_size(batches.batch)))
    for rows in heldout:
        yield from itertools.islice(mixture.in_order(rows, heldout_batch), HELDOUT_PARTS)


def for_minibatches(
    minibatches: Iterable[Rows],
    pack: Callable[[Rows, Ladder], list],
    costs: Costs,
    shards: int,
) -> Ladder:
    """Return the ladder for minibatches like these, which `pack(minibatch, ladder)` packs."""
    needs = [
        shape_of(microbatch) for minibatch in minibatches for microbatch in pack(minibatch, exact)
    ]
    return choose(needs, costs, shards)
