"""Log-probabilities, values and scores: aligned to the token, blind to the pads and to the neighbours in a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny, words

from alignjax.config import UserError
from alignjax.models import scoring, transformer

MODEL, PARAMS = tiny()
_, SCALAR = tiny(1, "scalar")
R, TEMPERATURE = 4, 1.0
LENGTHS = np.array([[5, 4], [3, 1], [1, 3], [4, 2]])  # of prompt and response
DRAWN = words(0, 4, 9)
# How the four sequences lie in rows: (row width, (sequence, first place) of each row).
LAYOUTS = {
    "pads behind": (9, [[(0, 0)], [(1, 0)], [(2, 0)], [(3, 0)]]),
    "pads in front": (9, [[(i, 9 - n)] for i, n in enumerate(LENGTHS.sum(axis=1))]),
    "3 more in front": (12, [[(i, 12 - n)] for i, n in enumerate(LENGTHS.sum(axis=1))]),
    "7 more, both sides": (16, [[(i, 5)] for i in range(4)]),
    "packed": (16, [[(3, 0), (1, 6)], [(0, 0), (2, 12)]]),
    "in one row": (32, [[(2, 1), (0, 5), (3, 20), (1, 28)]]),
}


def laid(layout="pads behind", pad=0, drawn=DRAWN):
    """The batch of a layout, as the module's docstring has it, one token after the other; `pad` stands on pads."""
    width, lines = LAYOUTS[layout]
    tokens, segments = np.full((len(lines), width), pad), np.zeros((len(lines), width), int)
    positions, at, ends = np.zeros_like(segments), np.zeros((len(lines), 10), int), np.zeros(4, int)
    for row, line in enumerate(lines):
        targets = []
        for i, first in line:
            p, r = LENGTHS[i]
            for j in range(p + r):
                tokens[row, first + j], segments[row, first + j], positions[row, first + j] = (
                    drawn[i, j],
                    i + 1,
                    j,
                )
            targets += range(first + p, first + p + r)
            ends[i] = row * width + first + p + r - 1
        at[row, : len(targets)] = targets
    return {"tokens": tokens, "segments": segments, "positions": positions, "at": at, "ends": ends}


@jax.jit
def figures(params, scalar, batch, temperature):
    now, entropy = scoring.token_logprobs(MODEL, params, batch, temperature)
    return (
        now,
        entropy,
        scoring.token_values(MODEL, scalar, batch),
        scoring.scores(MODEL, scalar, batch),
    )


def read(layout="pads behind", pad=0, temperature=TEMPERATURE, drawn=DRAWN):
    """Log-probabilities, entropies and values [4 R] of the responses' tokens, 0 behind them, and scores [4]."""
    *tokens, scores = map(
        np.asarray, figures(PARAMS, SCALAR, laid(layout, pad, drawn), temperature)
    )
    out = np.zeros((3, 4, R), np.float32)
    for row, line in enumerate(LAYOUTS[layout][1]):
        column = 0
        for i, _ in line:
            r = LENGTHS[i, 1]
            out[:, i, :r] = [x[row, column : column + r] for x in tokens]
            column += r
    assert np.isfinite(tokens).all()
    return *out, scores


@pytest.fixture(scope="module")
def one_by_one():
    """Per row: what follows each prefix (logits over the vocabulary) and its scalar, each prefix on its own."""

    @jax.jit
    def last(tokens, n):
        segments = (jnp.arange(9) < n).astype(jnp.int32)[None]
        hidden = transformer.apply(MODEL, PARAMS, tokens, jnp.arange(9)[None], segments)[0][
            0, n - 1
        ]
        other = transformer.apply(MODEL, SCALAR, tokens, jnp.arange(9)[None], segments)[0][0, n - 1]
        return transformer.logits(MODEL, PARAMS, hidden), transformer.scalar(SCALAR, other)

    def prefixes(i, length):
        padded = np.pad(DRAWN[i, :length], (0, 9 - length))[None]
        return [last(padded, n) for n in range(1, length + 1)]

    return [prefixes(i, length) for i, length in enumerate(LENGTHS.sum(axis=1))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_figure_is_that_of_its_own_prefix(layout, one_by_one):
    """The logits before a token, the value before a token, the score at the last real one: ended, cut off, one token."""
    now, entropy, values, scores = read(layout)
    for i, (p, r) in enumerate(LENGTHS):
        for t in range(r):
            z, scalar = one_by_one[i][p + t - 1]
            logp = np.asarray(jax.nn.log_softmax(z))
            assert now[i, t] == pytest.approx(float(logp[DRAWN[i, p + t]]), abs=1e-5)
            assert entropy[i, t] == pytest.approx(float(-(np.exp(logp) * logp).sum()), abs=1e-5)
            assert values[i, t] == pytest.approx(float(scalar), abs=1e-5)
        assert scores[i] == pytest.approx(float(one_by_one[i][p + r - 1][1]), abs=1e-5)


@pytest.mark.parametrize("pad", [3, 96])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pads_and_their_ids_change_nothing(layout, pad):
    """0, 3 or 7 more pads, in front, behind, between; pads that look like a real token or like the end token."""
    for a, b in zip(read(), read(layout, pad), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for a, b in zip(read(layout), read(layout, pad), strict=True):
        assert np.array_equal(a, b)


def test_neighbours_in_a_row_change_nothing():
    """Another sequence 0 moves its own figures and no others', whatever the layout."""
    other = np.concatenate([words(5, 1, 9), DRAWN[1:]])
    for layout in ("packed", "in one row"):
        for a, b in zip(read(layout), read(layout, drawn=other), strict=True):
            assert (a[0] != b[0]).all() and np.array_equal(a[1:], b[1:])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature, one_by_one):
    now, entropy, *_ = read(temperature=temperature)
    for i, (p, r) in enumerate(LENGTHS):
        for t in range(r):
            logp = np.asarray(jax.nn.log_softmax(one_by_one[i][p + t - 1][0] / temperature))
            assert now[i, t] == pytest.approx(float(logp[DRAWN[i, p + t]]), abs=1e-5)
            assert entropy[i, t] == pytest.approx(float(-(np.exp(logp) * logp).sum()), abs=1e-5)


def test_logprobs_are_float32_whatever_the_computation():
    half, batch = tiny(dtype="bfloat16")[0], laid()

    @jax.jit
    def rounded():
        values, scores = (
            scoring.token_values(half, SCALAR, batch),
            scoring.scores(half, SCALAR, batch),
        )
        return *scoring.token_logprobs(half, PARAMS, batch), values, scores

    assert [x.dtype for x in rounded()] == [jnp.float32] * 4
    real = np.arange(10) < LENGTHS[:, 1:]
    now, full = (
        np.asarray(x[0])[real] for x in (rounded(), figures(PARAMS, SCALAR, batch, TEMPERATURE))
    )
    assert 1e-5 < np.abs(now - full).max() < 0.3


def test_a_tied_model_reads_its_embedding():
    model, params = tiny(tied=True)
    batch = laid("packed")

    @jax.jit
    def both():
        hidden = scoring.before_targets(scoring.hidden_of(model, params, batch), batch["at"])
        logp = jax.nn.log_softmax(hidden @ params["embed"]["embedding"].T)
        return scoring.token_logprobs(model, params, batch)[0], logp

    ours, logp = map(np.asarray, both())
    labels = np.take_along_axis(batch["tokens"], batch["at"], axis=1)
    np.testing.assert_allclose(
        ours, np.take_along_axis(logp, labels[..., None], -1)[..., 0], atol=1e-5
    )


def test_before_targets_by_hand():
    hidden = np.arange(10).reshape(2, 5, 1)
    at = np.array([[1, 4, 0], [3, 3, 2]])
    assert scoring.before_targets(hidden, at)[..., 0].tolist() == [[0, 3, 0], [7, 7, 6]]


def test_a_score_alone_is_that_of_its_own_prefix(one_by_one):
    """Right-padded rows are scored behind their pads; what stands behind a length, and the row's width, don't matter."""
    lengths = LENGTHS.sum(axis=1)
    alone = jax.jit(lambda tokens: scoring.score_alone(MODEL, SCALAR, tokens, lengths))
    garbage = np.where(np.arange(9) < lengths[:, None], DRAWN, 96)
    found = alone(DRAWN)
    np.testing.assert_allclose(found, [float(x[-1][1]) for x in one_by_one], atol=1e-5)
    assert np.array_equal(found, alone(garbage))
    np.testing.assert_allclose(found, alone(np.pad(DRAWN, ((0, 0), (0, 3)))), atol=2e-6)
    np.testing.assert_allclose(found, read("in one row")[3], atol=2e-6)


@pytest.mark.parametrize(
    "figure, dtype, stops",
    [
        (0.0, "float32", False),
        (1e-3, "float32", True),
        (1e-3, "bfloat16", False),
        (float("nan"), "bfloat16", True),
    ],
)
def test_a_check_allows_rounding_and_nothing_more(figure, dtype, stops):
    if stops:
        with pytest.raises(UserError, match=r"self-check at step 0: the ratio is .*, not 0"):
            scoring.check("the ratio", figure, dtype)
    else:
        scoring.check("the ratio", figure, dtype)
