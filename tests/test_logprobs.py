"""Log-probabilities, values and scores: aligned to the token, blind to the pads, chunked or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny, words

from alignjax import logprobs
from alignjax.config import UserError
from alignjax.models import transformer

MODEL, PARAMS = tiny()
_, SCALAR = tiny(1, "scalar")
R = 4
LENGTHS = np.array([[5, 4], [3, 1], [1, 3], [4, 2]])  # of prompt and response, in 5 + R slots


def rows(pad=0, prompt_slots=5):
    """tokens, segments of four pairs of prompt (left-padded) and response (right-padded)."""
    drawn = words(0, 4, 20)
    tokens, segments = np.full((4, prompt_slots + R), pad), np.zeros((4, prompt_slots + R), np.int32)
    for i, (p, r) in enumerate(LENGTHS):
        real = slice(prompt_slots - p, prompt_slots + r)
        tokens[i, real], segments[i, real] = drawn[i, : p + r], 1
    return tokens, segments


@jax.jit
def read(params, scalar, tokens, segments, temperature=1.0):
    now, entropy = logprobs.response_logprobs(MODEL, params, tokens, segments, R, temperature)
    values = logprobs.response_values(MODEL, scalar, tokens, segments, R)
    return now, entropy, values, logprobs.score(MODEL, scalar, tokens, segments)


@pytest.fixture(scope="module")
def one_by_one():
    """Per row: what follows each prefix (log-probabilities over the vocabulary) and its scalar, each prefix on its own."""
    tokens, segments = rows()

    @jax.jit
    def last(tokens, n):
        segments = (jnp.arange(9) < n).astype(jnp.int32)[None]
        hidden = transformer.apply(MODEL, PARAMS, tokens, jnp.arange(9)[None], segments)[0][0, n - 1]
        other = transformer.apply(MODEL, SCALAR, tokens, jnp.arange(9)[None], segments)[0][0, n - 1]
        return jax.nn.log_softmax(transformer.logits(MODEL, PARAMS, hidden)), transformer.scalar(SCALAR, other)

    out = []
    for i in range(4):
        real = tokens[i][segments[i] > 0]
        padded = np.pad(real, (0, 9 - len(real)))[None]
        out.append((real, [last(padded, n) for n in range(1, len(real) + 1)]))
    return out


def test_each_figure_is_that_of_its_own_prefix(one_by_one):
    """The logits before a token, the value before a token, the score at the last real one: ended, cut off, one token."""
    now, entropy, values, scores = read(PARAMS, SCALAR, *rows())
    for i, (p, r) in enumerate(LENGTHS):
        real, prefixes = one_by_one[i]
        for t in range(r):
            logp, scalar = prefixes[p + t - 1]
            assert now[i, t] == pytest.approx(float(logp[real[p + t]]), abs=1e-5)
            assert entropy[i, t] == pytest.approx(float(-(np.exp(logp) * logp).sum()), abs=1e-5)
            assert values[i, t] == pytest.approx(float(scalar), abs=1e-5)
        assert scores[i] == pytest.approx(float(prefixes[p + r - 1][1]), abs=1e-5)


@pytest.mark.parametrize("pad, prompt_slots", [(0, 5), (3, 5), (96, 5), (0, 8), (0, 12)])
def test_pads_and_their_ids_change_nothing(pad, prompt_slots):
    """0, 3 or 7 more pads in front; pads that look like a real token or like the end token."""
    mask = np.arange(R) < LENGTHS[:, 1:]
    plain, padded = (read(PARAMS, SCALAR, *x) for x in (rows(), rows(pad, prompt_slots)))
    for a, b in zip(plain, padded, strict=True):
        a, b = (np.asarray(x)[mask] if x.ndim == 2 else np.asarray(x) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_temperature_divides_the_logits():
    tokens = words(1, 1, 6)
    hidden = transformer.apply(MODEL, PARAMS, tokens, np.arange(6)[None], np.ones_like(tokens))[0]
    z = transformer.logits(MODEL, PARAMS, hidden)
    for temperature in (0.7, 1.0, 2.0):
        ours, _ = logprobs.token_logprobs(MODEL, PARAMS, hidden, tokens, temperature)
        theirs = np.take_along_axis(np.asarray(jax.nn.log_softmax(z / temperature)), tokens[..., None], -1)[..., 0]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("positions", [1, 2, 3, 7])
def test_chunked_is_dense_in_value_and_gradient_and_never_above_0(positions, monkeypatch):
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 30, (2, 7, 32)).astype(np.float32)  # sure of itself: log-probabilities from 0 down to -1000
    targets, weights = words(2, 2, 7), rng.normal(size=(2, 7)).astype(np.float32)

    def total(params, hidden):
        logprob, entropy = logprobs.token_logprobs(MODEL, params, hidden, targets)
        return jnp.sum(weights * logprob) + 0.1 * jnp.sum(weights * entropy), (logprob, entropy)

    grad = jax.grad(total, (0, 1), has_aux=True)
    dense = grad(PARAMS, hidden)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", positions * 2 * MODEL.vocab_size)
    chunked = grad(PARAMS, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), dense, chunked)
    assert (chunked[1][0] <= 0).all() and (chunked[1][1] >= -1e-3).all()


def test_logprobs_are_float32_whatever_the_computation():
    half, params = tiny(dtype="bfloat16")
    now, _ = logprobs.response_logprobs(half, params, *rows(), R)
    assert now.dtype == jnp.float32
    np.testing.assert_allclose(now, read(PARAMS, SCALAR, *rows())[0], atol=0.3)


def test_pads_in_front_turns_each_row():
    tokens, segments = logprobs.pads_in_front(
        np.array([[9, 1, 2, 0, 0], [1, 2, 3, 4, 5]]), np.array([[0, 1, 1, 0, 0], [1] * 5])
    )
    assert tokens.tolist() == [[0, 0, 9, 1, 2], [1, 2, 3, 4, 5]] and segments.tolist() == [[0, 0, 0, 1, 1], [1] * 5]


def test_the_padding_check_stops_at_a_score_that_reads_pads():
    tokens, segments = rows()
    logprobs.check_padding(lambda *x: read(PARAMS, SCALAR, *x)[3], tokens, segments, "float32")
    with pytest.raises(
        UserError, match=r"self-check at step 0: the largest change of a score as pads move is 2, not 0"
    ):
        logprobs.check_padding(lambda tokens, segments: 2.0 * segments[:, -1], tokens, segments, "float32")


@pytest.mark.parametrize("figure, dtype, stops", [(0.0, "float32", False), (1e-3, "float32", True), (1e-3, "bfloat16", False),
                                                  (float("nan"), "bfloat16", True)])  # fmt: skip
def test_a_check_allows_rounding_and_nothing_more(figure, dtype, stops):
    if stops:
        with pytest.raises(UserError, match="the ratio is"):
            logprobs.check("the ratio", figure, dtype)
    else:
        logprobs.check("the ratio", figure, dtype)
