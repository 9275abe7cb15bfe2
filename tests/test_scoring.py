"""Log-probabilities, values and scores: right to the token, whatever the pads and neighbours."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny, words

from alignjax.config import UserError
from alignjax.models import scoring, transformer
from alignjax.models.scoring import PackedTokens

MODEL, PARAMS = tiny()
_, SCALAR = tiny(1, "scalar")
RESPONSE_LENGTH = 4
PROMPTS_AND_RESPONSES = np.array([[5, 4], [3, 1], [1, 3], [4, 2]])  # tokens of each
LENGTHS = PROMPTS_AND_RESPONSES.sum(axis=1)
DRAWN = words(0, 4, 9)
# How the four sequences lie in rows: (row width, (sequence, first place) of each row).
LAYOUTS = {
    "pads behind": (9, [[(0, 0)], [(1, 0)], [(2, 0)], [(3, 0)]]),
    "pads in front": (9, [[(i, 9 - length)] for i, length in enumerate(LENGTHS)]),
    "3 more in front": (12, [[(i, 12 - length)] for i, length in enumerate(LENGTHS)]),
    "7 more, both sides": (16, [[(i, 5)] for i in range(4)]),
    "packed": (16, [[(3, 0), (1, 6)], [(0, 0), (2, 12)]]),
    "in one row": (32, [[(2, 1), (0, 5), (3, 20), (1, 28)]]),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences in a layout, their response tokens as targets, and their last tokens."""

    packed: PackedTokens
    targets: np.ndarray
    ends: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the model makes of the sequences; the first three per response token."""

    logprobs: jax.Array
    entropy: jax.Array
    values: jax.Array
    scores: jax.Array


def lay_out(layout="pads behind", pad=0, drawn=DRAWN) -> Batch:
    """Write the sequences token by token into the rows of a layout; `pad` stands on pads."""
    width, lines = LAYOUTS[layout]
    tokens = np.full((len(lines), width), pad)
    segments = np.zeros((len(lines), width), int)
    positions = np.zeros_like(segments)
    targets = np.zeros((len(lines), 10), int)
    ends = np.zeros(4, int)
    for row, line in enumerate(lines):
        places = []
        for sequence, first in line:
            prompt, response = PROMPTS_AND_RESPONSES[sequence]
            for place in range(prompt + response):
                tokens[row, first + place] = drawn[sequence, place]
                segments[row, first + place] = sequence + 1
                positions[row, first + place] = place
            places += range(first + prompt, first + prompt + response)
            ends[sequence] = row * width + first + prompt + response - 1
        targets[row, : len(places)] = places
    packed = PackedTokens(tokens=tokens, positions=positions, segments=segments)
    return Batch(packed=packed, targets=targets, ends=ends)


@jax.jit
def figures_of(params, scalar_params, batch: Batch, temperature) -> Figures:
    logprobs, entropy = scoring.token_logprobs(
        MODEL, params, batch.packed, batch.targets, temperature
    )
    return Figures(
        logprobs=logprobs,
        entropy=entropy,
        values=scoring.token_values(MODEL, scalar_params, batch.packed, batch.targets),
        scores=scoring.sequence_scores(MODEL, scalar_params, batch.packed, batch.ends),
    )


def read(layout="pads behind", pad=0, temperature=1.0, drawn=DRAWN) -> Figures:
    """Return the figures by sequence: those of tokens [4 RESPONSE_LENGTH], 0 after the response."""
    batch = lay_out(layout, pad, drawn)
    found = jax.device_get(figures_of(PARAMS, SCALAR, batch, temperature))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))

    def by_sequence(rows):
        figures = np.zeros((4, RESPONSE_LENGTH), np.float32)
        for row, line in enumerate(LAYOUTS[layout][1]):
            column = 0
            for sequence, _ in line:
                length = PROMPTS_AND_RESPONSES[sequence, 1]
                figures[sequence, :length] = rows[row, column : column + length]
                column += length
        return figures

    return Figures(
        logprobs=by_sequence(found.logprobs),
        entropy=by_sequence(found.entropy),
        values=by_sequence(found.values),
        scores=found.scores,
    )


@pytest.fixture(scope="module")
def one_by_one():
    """For each sequence and prefix: (logits of the next token, scalar), each prefix on its own."""

    @jax.jit
    def last(tokens, length):
        places = jnp.arange(9)[None]
        segments = (jnp.arange(9) < length).astype(jnp.int32)[None]
        hidden = transformer.apply(MODEL, PARAMS, tokens, places, segments)[0]
        scalar_hidden = transformer.apply(MODEL, SCALAR, tokens, places, segments)[0]
        logits = transformer.logits(MODEL, PARAMS, hidden[0, length - 1])
        return logits, transformer.scalar(SCALAR, scalar_hidden[0, length - 1])

    def prefixes(sequence, length):
        padded = np.pad(DRAWN[sequence, :length], (0, 9 - length))[None]
        return [last(padded, size) for size in range(1, length + 1)]

    return [prefixes(sequence, length) for sequence, length in enumerate(LENGTHS)]


def assert_entropy_and_logprob(figures, sequence, place, logprobs):
    """Compare a token's figures with log-probabilities over the vocabulary."""
    prompt = PROMPTS_AND_RESPONSES[sequence, 0]
    token = DRAWN[sequence, prompt + place]
    entropy = float(-(np.exp(logprobs) * logprobs).sum())
    assert figures.logprobs[sequence, place] == pytest.approx(float(logprobs[token]), abs=1e-5)
    assert figures.entropy[sequence, place] == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_figure_is_that_of_its_own_prefix(layout, one_by_one):
    """Logits and value before a token, score at the last token: ended, truncated, one token."""
    figures = read(layout)
    for sequence, (prompt, response) in enumerate(PROMPTS_AND_RESPONSES):
        for place in range(response):
            logits, scalar = one_by_one[sequence][prompt + place - 1]
            logprobs = np.asarray(jax.nn.log_softmax(logits))
            assert_entropy_and_logprob(figures, sequence, place, logprobs)
            assert figures.values[sequence, place] == pytest.approx(float(scalar), abs=1e-5)
        last_scalar = one_by_one[sequence][prompt + response - 1][1]
        assert figures.scores[sequence] == pytest.approx(float(last_scalar), abs=1e-5)


@pytest.mark.parametrize("pad", [3, 96])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pads_and_their_ids_change_nothing(layout, pad):
    """0, 3 or 7 more pads, on both sides or between, even like a real token or the end token."""
    padded = jax.tree.leaves(read(layout, pad))
    for plain, other in zip(jax.tree.leaves(read()), padded, strict=True):
        np.testing.assert_allclose(plain, other, atol=2e-6)
    for plain, other in zip(jax.tree.leaves(read(layout)), padded, strict=True):
        assert np.array_equal(plain, other)


def test_neighbours_in_a_row_change_nothing():
    """Another sequence 0 changes its own figures and no others, whatever the layout."""
    changed = np.concatenate([words(5, 1, 9), DRAWN[1:]])
    for layout in ("packed", "in one row"):
        before = jax.tree.leaves(read(layout))
        after = jax.tree.leaves(read(layout, drawn=changed))
        for one, other in zip(before, after, strict=True):
            assert (one[0] != other[0]).all()
            assert np.array_equal(one[1:], other[1:])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature, one_by_one):
    figures = read(temperature=temperature)
    for sequence, (prompt, response) in enumerate(PROMPTS_AND_RESPONSES):
        for place in range(response):
            logits = one_by_one[sequence][prompt + place - 1][0]
            logprobs = np.asarray(jax.nn.log_softmax(logits / temperature))
            assert_entropy_and_logprob(figures, sequence, place, logprobs)


def test_logprobs_are_float32_whatever_the_computation():
    half = tiny(dtype="bfloat16")[0]
    batch = lay_out()

    @jax.jit
    def rounded():
        logprobs, entropy = scoring.token_logprobs(half, PARAMS, batch.packed, batch.targets)
        return Figures(
            logprobs=logprobs,
            entropy=entropy,
            values=scoring.token_values(half, SCALAR, batch.packed, batch.targets),
            scores=scoring.sequence_scores(half, SCALAR, batch.packed, batch.ends),
        )

    assert [x.dtype for x in jax.tree.leaves(rounded())] == [jnp.float32] * 4
    real = np.arange(10) < PROMPTS_AND_RESPONSES[:, 1:]
    half_logprobs = np.asarray(rounded().logprobs)[real]
    full_logprobs = np.asarray(figures_of(PARAMS, SCALAR, batch, 1.0).logprobs)[real]
    assert 1e-5 < np.abs(half_logprobs - full_logprobs).max() < 0.3


def test_a_tied_model_reads_its_embedding():
    model, params = tiny(tied=True)
    batch = lay_out("packed")

    @jax.jit
    def by_embedding():
        hidden = scoring.hidden_states(model, params, batch.packed)
        hidden = scoring.before_targets(hidden, batch.targets)
        return jax.nn.log_softmax(hidden @ params["embed"]["embedding"].T)

    @jax.jit
    def by_scoring():
        return scoring.token_logprobs(model, params, batch.packed, batch.targets)[0]

    labels = np.take_along_axis(batch.packed.tokens, batch.targets, axis=1)
    expected = np.take_along_axis(np.asarray(by_embedding()), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(by_scoring(), expected, atol=1e-5)


def test_before_targets_by_hand():
    hidden = np.arange(10.0, dtype=np.float32).reshape(2, 5, 1)
    targets = np.array([[1, 4, 0], [3, 3, 2]])
    selected = scoring.before_targets(hidden, targets)[..., 0]
    assert selected.tolist() == [[0, 3, 0], [7, 7, 6]]


def test_a_score_alone_is_that_of_its_own_prefix(one_by_one):
    """Right-padded rows are scored behind their pads, whatever stands after them or how wide."""
    alone = jax.jit(lambda tokens: scoring.score_alone(MODEL, SCALAR, tokens, LENGTHS))
    garbage = np.where(np.arange(9) < LENGTHS[:, None], DRAWN, 96)
    scores = alone(DRAWN)
    expected = [float(prefixes[-1][1]) for prefixes in one_by_one]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.array_equal(scores, alone(garbage))
    np.testing.assert_allclose(scores, alone(np.pad(DRAWN, ((0, 0), (0, 3)))), atol=2e-6)
    np.testing.assert_allclose(scores, read("in one row").scores, atol=2e-6)


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
            scoring.self_check("the ratio", figure, dtype)
    else:
        scoring.self_check("the ratio", figure, dtype)
