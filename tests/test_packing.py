"""Packing puts every sequence somewhere, whole and once, in few shapes.

A packed minibatch gives the figures and gradients of the unpacked one, sequence by sequence.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny, words

from alignjax import config as configs
from alignjax.algorithms import lm, optimisation, ranking
from alignjax.config import Mesh, Ranking, UserError
from alignjax.data import packing
from alignjax.machine import sharding
from alignjax.models import scoring, transformer

LONGEST = 512


def log_normal(seed, n=32):
    """Return lengths as of chats: median 96, sigma 0.6."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(96), 0.6, n))
    return np.clip(lengths, 2, LONGEST).astype(int)


def pairs(n=32):
    return [[i, i + 1] for i in range(0, n, 2)]


def assert_is_partition(layouts, lengths, groups):
    """Check that every sequence is in one row of one microbatch, in one piece and in order.

    The sequences of a group must be in the same microbatch.
    """
    microbatch_of = {}
    for number, layout in enumerate(layouts):
        assert layout.sequence.dtype == layout.place.dtype == np.int32
        assert not layout.place[~layout.real].any() and layout.real.any()
        for i in np.unique(layout.sequence[layout.real]):
            assert i not in microbatch_of
            rows, columns = np.nonzero(layout.sequence == i)
            assert len(set(rows)) == 1 and np.array_equal(
                columns, columns[0] + np.arange(lengths[i])
            )
            assert np.array_equal(layout.place[rows, columns], np.arange(lengths[i]))
            microbatch_of[int(i)] = number
        members = [i for i, microbatch in microbatch_of.items() if microbatch == number]
        assert layout.members.tolist() == sorted(members)
    assert sorted(microbatch_of) == sorted(i for group in groups for i in group)
    assert all(len({microbatch_of[i] for i in group}) == 1 for group in groups)


def shapes_of(longest, budget, shards, group):
    """Return all shapes that a microbatch may have: each width with each number of rows."""
    out = set()
    for width in (packing.width_of(n, longest) for n in range(1, longest + 1)):
        most = max(budget // width // shards * shards, packing.rows_of(group, shards))
        out |= {(min(packing.rows_of(n, shards), most), width) for n in range(1, most + 1)}
    return out


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("budget", [4096, 1000, 1])
def test_packing_is_a_partition_in_few_shapes(budget, shards):
    """A budget of one token still gives as many rows as a pair needs."""
    allowed, seen = shapes_of(LONGEST, budget, shards, 2), set()
    assert len(allowed) <= 4 * 20
    for seed in range(20):
        lengths = log_normal(seed)
        for groups, n in ((pairs(), 2), ([[i] for i in range(0, 32, 3)], 1)):
            layouts = packing.pack(lengths, groups, LONGEST, budget, shards)
            assert_is_partition(layouts, lengths, groups)
            shapes = {layout.sequence.shape for layout in layouts}
            assert all(
                rows % shards == 0 and width in (64, 128, 256, 512) for rows, width in shapes
            )
            assert all(
                rows * width <= max(budget, packing.rows_of(n, shards) * width)
                for rows, width in shapes
            )
            seen |= shapes
    assert seen <= allowed | shapes_of(LONGEST, budget, shards, 1)


@pytest.mark.parametrize("budget, share, worst", [(4096, 0.9, 0.75), (512, 0.85, 0.75)])
def test_few_tokens_are_pads(budget, share, worst):
    """In 200 batches of 16 pairs; rows of full length would be filled to a fifth."""
    real = []
    used = []
    for seed in range(200):
        lengths = log_normal(seed)
        layouts = packing.pack(lengths, pairs(), LONGEST, budget)
        real.append(lengths.sum())
        used.append(sum(layout.sequence.size for layout in layouts))
    real = np.array(real)
    used = np.array(used)
    assert real.sum() / (200 * 32 * LONGEST) < 0.25
    assert real.sum() / used.sum() > share and (real / used).min() > worst


def test_packing_repeats_to_the_bit_and_takes_the_longest_first():
    lengths = log_normal(0)
    once, again = (packing.pack(lengths, pairs(), LONGEST, 1024) for _ in range(2))
    assert len(once) > 2 and all(map(np.array_equal, jax.tree.leaves(once), jax.tree.leaves(again)))
    longest = [max(lengths[layout.members]) for layout in once]
    assert longest == sorted(longest, reverse=True) and longest[0] == lengths.max()


@pytest.mark.parametrize(
    "lengths, groups, longest, budget, shards, shapes",
    [
        (
            [500, *[10] * 20],
            [[i] for i in range(21)],
            512,
            512,
            1,
            [(1, 512), (4, 64)],  # one fits beside the long one, and six fit in a row of 64
        ),
        ([500, *[10] * 20], [[i] for i in range(21)], 512, 1024, 1, [(2, 512)]),
        ([30, 30], [[0, 1]], 32, 32, 1, [(2, 32)]),  # a pair that is longer than the budget
        ([30, 30], [[0], [1]], 32, 32, 1, [(1, 32), (1, 32)]),
        ([4, 12], [[0, 1]], 32, 32, 1, [(1, 16)]),  # both in one row
        ([30, 30, 30, 3, 3], [[0, 1, 2], [3, 4]], 32, 32, 2, [(4, 32)]),
        ([8, 8, 8], [[0], [1], [2]], 64, 0, 1, [(1, 8)] * 3),
        ([32], [[0]], 32, 4096, 8, [(8, 32)]),
        ([5, 1, 9], [[2]], 9, 100, 1, [(1, 16)]),  # the others are in no group
        ([5], [], 9, 100, 1, []),
    ],
)
def test_shapes_by_hand(lengths, groups, longest, budget, shards, shapes):
    layouts = packing.pack(lengths, groups, longest, budget, shards)
    assert_is_partition(layouts, lengths, groups)
    assert [layout.sequence.shape for layout in layouts] == shapes


@pytest.mark.parametrize(
    "longest, widths",
    [(512, (64, 128, 256, 512)), (100, (16, 32, 56, 104)), (9, (8, 16)), (1, (8,))],
)
def test_widths_by_hand(longest, widths):
    width_of = [packing.width_of(n, longest) for n in range(1, longest + 1)]
    assert sorted(set(width_of)) == list(widths) and width_of == sorted(width_of)
    assert all(width >= n for n, width in enumerate(width_of, 1))
    assert all(packing.width_of(width, longest) == width for width in widths if width <= longest)


def test_numbers_of_rows_by_hand():
    """Every number up to 8, then four for each doubling; with several devices, on each of them."""
    assert sorted({packing.rows_of(n, 1) for n in range(1, 65)}) == [
        *range(1, 9),
        10,
        12,
        14,
        16,
        20,
        24,
        28,
        32,
        40,
        48,
        56,
        64,
    ]
    assert [packing.rows_of(n, 4) for n in (1, 4, 5, 32, 33, 41, 65)] == [4, 4, 8, 32, 40, 48, 80]
    for shards in (1, 3):
        assert all(n <= packing.rows_of(n, shards) < 1.25 * n + shards for n in range(1, 2000))


def test_a_layout_by_hand():
    """The rows hold sequences 2 and 0 and a pad, then 1 and 4, then only pads; 3 is not here."""
    layout = packing.Layout(
        np.array([[2, 2, 0, -1], [1, 1, 1, 4], [-1] * 4]),
        np.array([[0, 1, 0, 0], [0, 1, 2, 0], [0] * 4]),
    )
    assert layout.members.tolist() == [0, 1, 2, 4]
    assert layout.ends().tolist() == [2, 6, 1, 7] and layout.ends().dtype == np.int32
    assert layout.real.tolist() == [[True] * 3 + [False], [True] * 4, [False] * 4]
    array = np.arange(15).reshape(5, 3) + 100
    assert layout.take(array).tolist() == [[106, 107, 100, 0], [103, 104, 105, 112], [0, 0, 0, 0]]
    assert layout.take(array > 105).tolist() == [
        [True, True, False, False],
        [False] * 3 + [True],
        [False] * 4,
    ]


def test_layouts_of_spots_by_hand():
    layout = packing.layout(
        [packing.Spot(*spot) for spot in ((1, 0, 0), (0, 0, 3), (2, 1, 0))],
        [2, 3, 1],
        packing.Shape(2, 6, 5),
    )
    assert layout.target_room == 5
    assert layout.sequence.tolist() == [[1, 1, 1, 0, 0, -1], [2, -1, -1, -1, -1, -1]]
    assert layout.place.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6]


@pytest.mark.parametrize("shards, room, k", [(1, 0, 5), (1, 8, 8), (2, 0, 3), (2, 4, 4)])
def test_the_places_of_targets_are_those_of_each_devices_rows(shards, room, k):
    """Of four rows of three, each of two devices has two."""
    mask = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
    places, real = packing.targets(mask, shards, room)
    assert places.shape == real.shape == (shards, k) and places.dtype == np.int32
    wanted = [[1, 3, 9, 10, 11]] if shards == 1 else [[1, 3], [3, 4, 5]]
    for device in range(shards):
        assert places[device][real[device]].tolist() == wanted[device]
    assert packing.at_targets(mask, places)[real].all()
    assert not packing.at_targets(mask, places)[~real].any()


def test_a_minibatch_without_targets_has_room_for_one():
    places, real = packing.targets(np.zeros((2, 8), bool))
    assert places.shape == (1, 1) and not real.any()


def test_padded_by_hand():
    assert packing.padded([[1, 2]], 3, 7).tolist() == [[1, 2], [7, 7], [7, 7]]
    assert packing.padded(np.array([1.5], np.float32), 2, 0).dtype == np.float32


# From a minibatch to its gradient. With these lengths, rows hold one sequence, several, and pads.

MODEL, PARAMS = tiny()
_, SCALAR = tiny(1, "scalar")
T = 24  # tokens of the longest sequence
SIZES = np.array([24, 17, 12, 9, 6, 5, 2])
DOCUMENTS = [(10, 14), (3, 8, 6), (12,), (9,), (6,), (5,), (2,)]  # of each example
BUDGETS = [1000, 48, 1]  # one microbatch, several, and a row at a time


def text():
    """Return seven examples, the first two of several documents.

    The first token of a document or of a row is never a target.
    """
    rng = np.random.default_rng(0)
    segments = np.zeros((7, T), int)
    mask = rng.integers(0, 2, (7, T))
    for i, sizes in enumerate(DOCUMENTS):
        segments[i, : sum(sizes)] = np.repeat(np.arange(len(sizes)) + 1, sizes)
        mask[i, np.cumsum((0, *sizes))[:-1]] = i == 2
    mask[6] = 0  # an example without a target
    return {"tokens": words(1, 7, T), "mask": mask * (segments > 0), "segments": segments}


def targets_of(batch):
    """Return (example, place) [2 shards targets] of a microbatch's targets, and which are real."""
    segments = packing.at_targets(batch.packed.segments, batch.targets)
    places = packing.at_targets(batch.packed.positions, batch.targets)
    return np.stack([segments // (T + 1), places]), batch.weights > 0


@jax.jit
def read_text(params, batch):
    return scoring.token_logprobs(MODEL, params, batch.packed, batch.targets)


def fill_pads(batch, token):
    """Return a microbatch with another token on its pads."""
    packed = batch.packed
    tokens = np.where(packed.segments > 0, packed.tokens, token)
    return dataclasses.replace(batch, packed=dataclasses.replace(packed, tokens=tokens))


def same_arrays(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def documents():
    """Read each document alone in a row.

    Return the log-probabilities [7 T] of all tokens, and the gradient of their weighted mean.
    """
    rows = text()
    places = []  # of each document: its example, and its tokens there
    for i, sizes in enumerate(DOCUMENTS):
        firsts = np.cumsum((0, *sizes))
        places += [(i, first + np.arange(n)) for n, first in zip(sizes, firsts, strict=False)]

    def alone(name):
        parts = [rows[name][i, at] for i, at in places]
        return np.stack([np.pad(part, (0, T - len(part))) for part in parts])

    tokens = alone("tokens")
    segments = alone("segments")
    mask = alone("mask")
    weights = mask[:, 1:] / mask[:, 1:].sum()

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def mean(params):
        at = np.tile(np.arange(T), (len(tokens), 1))
        hidden = transformer.apply(MODEL, params, tokens, at, (segments > 0).astype(int)).hidden
        logp = jax.nn.log_softmax(transformer.logits(MODEL, params, hidden[:, :-1]))
        logp = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(weights * logp), logp

    grads, logp = mean(PARAMS)
    logprobs = np.zeros((7, T), np.float32)
    for (i, at), row in zip(places, np.asarray(logp), strict=True):
        logprobs[i, at[1:]] = row[: len(at) - 1]
    return logprobs, grads


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("budget", BUDGETS)
def test_packed_text_is_each_document_alone(budget, shards, documents):
    """Each target comes once, all with one weight, and has the log-probability it has alone."""
    rows = text()
    seen = []
    batches = lm.pack_minibatch(rows, budget, shards)
    for batch in batches:
        (example, place), real = targets_of(batch)
        seen += np.stack([example[real], place[real]], axis=1).tolist()
        assert set(batch.weights[real].tolist()) <= {np.float32(1) / (rows["mask"][:, 1:].sum())}
        assert len(batch.packed.tokens) % shards == 0
        if shards == 1:
            logprobs = np.asarray(read_text(PARAMS, batch)[0])
            wanted = documents[0][example, place]
            np.testing.assert_allclose(logprobs[real], wanted[real], atol=1e-5)
    rows["mask"][:, 0] = 0
    assert sorted(seen) == np.argwhere(rows["mask"]).tolist()
    assert sum(float(batch.weights.sum()) for batch in batches) == pytest.approx(1, abs=1e-6)
    assert len(batches) > 1 or budget == 1000


def gradient(loss_fn, params, batches):
    return optimisation.Accumulate(loss_fn)(params, batches)


def assert_close(ours, theirs):
    """Compare up to float32's rounding of sums of parts in another order."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("budget", BUDGETS)
def test_packed_text_has_the_gradient_of_each_document_alone(budget, documents):
    rows = text()
    grads, metrics = gradient(
        functools.partial(lm.loss_fn, MODEL), PARAMS, lm.pack_minibatch(rows, budget, 1)
    )
    assert_close(grads, documents[1])
    targets = rows["mask"] * (np.arange(T) > 0) > 0
    assert metrics["loss"] == pytest.approx(-documents[0][targets].mean(), rel=1e-5)


def test_pads_and_neighbours_do_not_change_the_figures_of_text():
    """Anything may stand behind an example and in a row's pads.

    Other tokens in example 3, which has 9, change only its own figures.
    """
    rows = text()
    garbage = rows | {"tokens": np.where(rows["segments"] > 0, rows["tokens"], 96)}
    other = rows | {"tokens": rows["tokens"].copy()}
    other["tokens"][3] = words(9, T)
    moved = 0
    for budget in BUDGETS:
        parts = [lm.pack_minibatch(x, budget, 1) for x in (rows, garbage, other)]
        for plain, same, changed in zip(*parts, strict=True):
            assert same_arrays(plain, same)
            (example, _), real = targets_of(plain)
            of_example_3 = example[real] == 3
            filled = fill_pads(plain, 96)
            readings = [read_text(PARAMS, batch) for batch in (plain, filled, changed)]
            for figures in zip(*readings, strict=True):  # of each kind of figure
                before, with_pads, after = (np.asarray(figure)[real] for figure in figures)
                assert np.array_equal(before, with_pads)
                assert np.array_equal(before[~of_example_3], after[~of_example_3])
                assert (before[of_example_3] != after[of_example_3]).all()
                moved += of_example_3.sum()
    assert moved == 2 * 3 * text()["mask"][3, 1:].sum() > 0


def comparisons():
    """Return seven pairs of responses of all sizes."""
    return {
        "chosen": words(2, 7, T),
        "chosen_length": SIZES,
        "rejected": words(3, 7, T),
        "rejected_length": np.roll(SIZES, 2)[::-1],
        "margin": np.linspace(0, 1, 7).astype(np.float32),
    }


@jax.jit
def read_pairs(params, batch):
    return ranking.score_pairs(MODEL, params, batch)


class AloneReading(NamedTuple):
    """Scores [7 2], and loss and gradient of the ranking loss with margins and centring."""

    scores: np.ndarray
    loss: jax.Array
    grads: dict


@pytest.fixture(scope="module")
def responses() -> AloneReading:
    """Read each response alone in a row."""
    tokens, lengths = ranking.interleave(comparisons())
    assert np.array_equal(tokens[2::2], comparisons()["chosen"][1:])
    assert lengths[1] == comparisons()["rejected_length"][0]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        at = np.tile(np.arange(T), (14, 1))
        real = (at < lengths[:, None]).astype(int)
        hidden = transformer.apply(MODEL, params, tokens, at, real).hidden
        scores = transformer.scalar(params, hidden)[np.arange(14), lengths - 1].reshape(7, 2)
        difference = scores[:, 0] - scores[:, 1] - comparisons()["margin"]
        return jnp.mean(jnp.log1p(jnp.exp(-difference)) + 0.1 * scores.sum(axis=1) ** 2), scores

    (value, scores), grads = loss(SCALAR)
    return AloneReading(np.asarray(scores), value, grads)


@pytest.mark.parametrize("budget", BUDGETS)
def test_packed_pairs_are_each_response_alone(budget, responses):
    """Each pair comes once and whole, with the scores it has alone; the weights sum to 1."""
    batches = ranking.pack_minibatch(comparisons(), budget, 1)
    seen = []
    for batch in batches:
        here = batch.pair < 7
        assert batch.ends.shape == (7, 2)
        assert np.array_equal(batch.weights > 0, here)
        pair = batch.pair[here]
        seen += pair.tolist()
        assert np.array_equal(batch.margin[here], comparisons()["margin"][pair])
        scores = np.asarray(read_pairs(SCALAR, batch))
        np.testing.assert_allclose(scores[here], responses.scores[pair], atol=1e-5)
    assert sorted(seen) == list(range(7)) and (len(batches) > 1 or budget == 1000)
    assert sum(float(batch.weights.sum()) for batch in batches) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("budget", BUDGETS)
def test_packed_pairs_have_the_gradient_of_each_response_alone(budget, responses):
    loss_fn = functools.partial(ranking.loss_fn, MODEL, Ranking(margin=True, centring=0.1))
    grads, metrics = gradient(loss_fn, SCALAR, ranking.pack_minibatch(comparisons(), budget, 1))
    scores = responses.scores
    assert_close(grads, responses.grads)
    centring = 0.1 * (scores.sum(axis=1) ** 2).mean()
    assert metrics["loss"] + centring == pytest.approx(float(responses.loss), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((scores[:, 0] > scores[:, 1]).mean())
    assert metrics["mean_reward"] == pytest.approx(scores.mean(), rel=1e-4)


def test_pads_and_neighbours_do_not_change_a_score():
    """Another rejected response in pair 2 changes only its own score, whatever its row holds."""
    rows = comparisons()
    other = comparisons()
    garbage = comparisons()
    other["rejected"][2] = words(9, T)
    for side in ranking.SIDES:
        real = np.arange(T) < garbage[f"{side}_length"][:, None]
        garbage[side] = np.where(real, garbage[side], 96)
    for budget in BUDGETS:
        parts = [ranking.pack_minibatch(x, budget, 1) for x in (rows, garbage, other)]
        for plain, same, changed in zip(*parts, strict=True):
            assert same_arrays(plain, same)
            filled = fill_pads(plain, 96)
            before = np.asarray(read_pairs(SCALAR, plain))
            with_pads = np.asarray(read_pairs(SCALAR, filled))
            after = np.asarray(read_pairs(SCALAR, changed))
            here = plain.pair < 7
            assert np.array_equal(before[here], with_pads[here])
            assert np.argwhere((before != after) & here[:, None]).tolist() == [
                [i, 1] for i in np.flatnonzero(plain.pair == 2)
            ]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(Mesh())


def test_scores_over_all_devices_are_each_response_alone(mesh, responses):
    """They come in the order of the pairs, not of the microbatches; so does a mean score."""
    score_fn = jax.jit(functools.partial(ranking.score_pairs, MODEL))
    with jax.set_mesh(mesh):
        scores = ranking.score_rows(score_fn, SCALAR, comparisons(), 1, mesh)
        np.testing.assert_allclose(scores, responses.scores, atol=1e-5)
        rows = {
            "tokens": comparisons()["chosen"],
            "segments": np.arange(T) < comparisons()["chosen_length"][:, None],
        }
        mean = ranking.mean_score(score_fn, SCALAR, rows, 7, 1, mesh)
    assert mean == pytest.approx(responses.scores[:, 0].mean(), abs=1e-5)


def test_the_self_check_stops_at_a_score_that_reads_pads_or_neighbours(mesh):
    config = configs.Config(stage="ranking", model=MODEL, microbatch_tokens=1000)
    score_fn = jax.jit(functools.partial(ranking.score_pairs, MODEL))

    def leaking(params, batch):
        return score_fn(params, batch) + np.float32([0.0, 2.0])

    with jax.set_mesh(mesh):
        ranking.check_packing(config, score_fn, SCALAR, comparisons(), mesh)
        with pytest.raises(
            UserError,
            match="self-check at step 0: the largest change of a score when its row's pads and "
            "neighbours change is 2, not 0",
        ):
            ranking.check_packing(config, leaking, SCALAR, comparisons(), mesh)
