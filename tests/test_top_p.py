"""Sampling from logits: top-p against enumeration and a sort, frequencies, log-probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.sampling.top_p import pick, sample_tokens

FIVE = np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32)
sample = jax.jit(sample_tokens, static_argnums=(2, 3))


def draw(logits, times, temperature, top_p, seed=0):
    """Draw `times` tokens from each row of logits; return tokens and logprobs, [rows times]."""
    keys = jax.random.split(jax.random.key(seed), len(logits) * times)
    repeated = np.repeat(np.asarray(logits, np.float32), times, axis=0)
    tokens, logprobs = sample(keys, repeated, temperature, top_p)
    return np.asarray(tokens).reshape(-1, times), np.asarray(logprobs).reshape(-1, times)


def kept_words(probabilities, top_p):
    """Return which words top-p keeps, by a sort.

    They are the smallest set of the most probable words whose mass is at least top_p.
    """
    falling = np.sort(probabilities)[::-1]
    mass = np.cumsum(falling)
    return probabilities >= falling[np.searchsorted(mass, top_p * mass[-1])]


@pytest.mark.parametrize(
    "top_p, count", [(0.3, 1), (0.39, 1), (0.41, 2), (0.75, 3), (0.9, 4), (0.96, 5), (1e-6, 1)]
)
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p, count):
    """In every order of a vocabulary of five words, the words drawn are the words kept."""
    orders = np.array(list(itertools.permutations(range(5))))
    tokens, _ = draw(np.log(FIVE)[orders], 150, 1.0, top_p)
    drawn = (tokens[:, :, None] == np.arange(5)).any(axis=1)
    assert np.array_equal(drawn, orders < count)


def test_ties_at_the_edge_of_top_p_all_stay():
    logits = np.log([[0.25, 0.25, 0.25, 0.25], [0.5, 0.2, 0.2, 0.1]])
    tokens, _ = draw(logits, 300, 1.0, 0.6)
    assert [np.unique(row).tolist() for row in tokens] == [[0, 1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_draws_stay_in_the_set_that_a_sort_gives(top_p):
    """Forty rows of 300 words, not a multiple of 128, in steps of 1/4, so the edges have ties."""
    logits = np.round(np.random.default_rng(0).normal(size=(40, 300)) * 8) / 4
    tokens, _ = draw(logits, 400, 1.0, top_p)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    kept = np.stack([kept_words(row, top_p) for row in weights])
    assert np.take_along_axis(kept, tokens, axis=1).all()
    ties = [(row == row[mask].min()).sum() for row, mask in zip(weights, kept, strict=True)]
    assert max(ties) > 1
    assert kept.all() if top_p == 1 else kept.sum(axis=1).max() < 300


@pytest.mark.parametrize("temperature, top_p", [(2.0, 0.2), (2.0, 0.7), (1.0, 0.9), (1.0, 1.0)])
def test_frequencies_are_those_of_the_kept_set_while_logprobs_are_of_all_words(temperature, top_p):
    """The convention of `rollout`: draw in proportion among the kept, score by all words.

    In 20,000 draws from 140 words, each word's count lies within five deviations.
    """
    num_draws = 20000
    logits = np.random.default_rng(1).normal(size=140) * 3
    probabilities = np.exp(logits / temperature)
    probabilities /= probabilities.sum()
    tokens, logprobs = draw(logits[None], num_draws, temperature, top_p)
    np.testing.assert_allclose(logprobs[0], np.log(probabilities)[tokens[0]], atol=1e-5)
    share = np.where(kept_words(probabilities, top_p), probabilities, 0)
    share /= share.sum()
    expected = num_draws * share
    counts = np.bincount(tokens[0], minlength=140)
    assert not counts[share == 0].any()
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected * (1 - share)) + 1).all()
    frequent = expected > 5
    chi_square = ((counts - expected) ** 2 / (expected + 1e-9))[frequent].sum()
    words = frequent.sum()
    assert chi_square < words + 4 * np.sqrt(2 * words)


def test_frequencies_of_five_words_by_hand():
    """0.7 of the mass is kept: 4/7 and 3/7. Temperature 2 turns the logits back into FIVE."""
    tokens, logprobs = draw(2 * np.log(FIVE)[None], 10000, 2.0, 0.7)
    frequencies = np.bincount(tokens[0], minlength=5) / 10000
    np.testing.assert_allclose(frequencies, [4 / 7, 3 / 7, 0, 0, 0], atol=0.015)
    np.testing.assert_allclose(logprobs[0], np.log(FIVE)[tokens[0]], atol=1e-6)


def test_a_draw_depends_only_on_its_key_and_logits():
    """It does not depend on how many rounds other rows take, nor on the number of rows."""
    logits = np.random.default_rng(2).normal(size=(50, 300)).astype(np.float32)
    logits[::7] = 0.0
    keys = jax.random.split(jax.random.key(3), 50)
    tokens, _ = sample(keys, logits, 1.0, 0.3)
    tokens = np.asarray(tokens)
    order = np.random.default_rng(3).permutation(50)
    for rows in (order, slice(0, 1), slice(20, 25)):
        some_tokens, _ = sample(keys[rows], logits[rows], 1.0, 0.3)
        assert np.array_equal(some_tokens, tokens[rows])


def test_a_small_top_p_takes_the_most_probable_word():
    logits = np.random.default_rng(4).normal(size=(50, 300))
    tokens, _ = draw(logits, 20, 1.0, 1e-6)
    assert (tokens == logits.argmax(axis=1)[:, None]).all()


def test_temperature_0_is_the_most_probable_word_and_its_logprob():
    logits = np.random.default_rng(4).normal(size=(50, 300)).astype(np.float32)
    tokens, logprobs = draw(logits, 1, 0.0, 0.9)
    assert np.array_equal(tokens[:, 0], logits.argmax(axis=1))
    highest = np.asarray(jax.nn.log_softmax(logits)).max(axis=1)
    np.testing.assert_allclose(logprobs[:, 0], highest, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_one_word_far_above_all_others_is_always_drawn(top_p):
    """It is the first word, the last one, or one between them."""
    logits = np.random.default_rng(5).normal(size=(3, 300)) * 1000
    logits[[0, 1, 2], [0, 299, 140]] = 1e6
    tokens, logprobs = draw(logits, 50, 1.0, top_p)
    assert (tokens == np.array([[0], [299], [140]])).all()
    assert not logprobs.any()


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_masked_words_and_lanes_are_never_drawn(top_p):
    """Many single words, the first lanes, all but the first lane, all words but one."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(4, 300))
    logits[0, rng.random(300) < 0.9] = -np.inf
    logits[1, :256] = np.finfo(np.float32).min
    logits[2, 128:] = -np.inf
    logits[3, np.arange(300) != 7] = -np.inf
    tokens, logprobs = draw(logits, 500, 1.0, top_p)
    assert (np.take_along_axis(logits, tokens, axis=1) > -1e6).all()
    assert np.isfinite(logprobs).all() and (logprobs <= 0).all()
    assert (tokens[3] == 7).all() and not logprobs[3].any()


def test_pick_by_hand():
    """The running sums are 0 2 2 5 5; a target at or past the end takes the last weight above 0."""
    weights = jnp.tile(jnp.array([0.0, 2.0, 0.0, 3.0, 0.0]), (6, 1))
    places, remainders = pick(weights, jnp.array([0.0, 1.5, 2.0, 4.0, 5.0, 5.5]))
    assert places.tolist() == [1, 1, 3, 3, 3, 3]
    assert remainders.tolist() == [0.0, 1.5, 0.0, 2.0, 3.0, 3.5]


@pytest.mark.parametrize("num_lanes", [128, 1187])
def test_pick_takes_no_weight_of_0_wherever_the_target_falls(num_lanes):
    """1,187 lanes are those of 151,936 words.

    XLA makes a sum over many lanes in pieces, and rounding lets it rise over zeros.
    """
    rng = np.random.default_rng(0)
    is_zero = rng.random(num_lanes) < 0.3
    weights = np.where(is_zero, 0, rng.exponential(size=num_lanes) ** 4).astype(np.float32)
    cumsum = jax.jit(lambda rows: jnp.cumsum(rows, axis=1))
    targets = np.asarray(cumsum(np.tile(weights, (2, 1))))[0]
    places, _ = jax.jit(pick)(np.tile(weights, (num_lanes, 1)), targets)
    assert (weights[np.asarray(places)] > 0).all()


NOT_FINITE = {
    "one NaN": {0: np.nan},
    "NaN in the last place": {299: np.nan},
    "one infinity": {3: np.inf},
    "two infinities": {3: np.inf, 200: np.inf},
    "infinity and NaN": {3: np.inf, 4: np.nan},
    "nothing but NaN": {range(300): np.nan},
    "nothing but infinity": {range(300): np.inf},
    "nothing but -infinity": {range(300): -np.inf},
}
FINITE = {
    "normal": {},
    "all equal": {range(300): 0.0},
    "all equal and as large as a number can be": {range(300): np.finfo(np.float32).max},
    "all equal and as small": {range(300): np.finfo(np.float32).min},
    "subnormal": {range(300): 1e-42},
    "excluded words": {range(290): -np.inf},
    "far above": {7: 3e38},
}


@pytest.mark.parametrize(
    "temperature, top_p",
    [(1.0, 0.9), (1.0, 1.0), (1.0, 1e-300), (0.7, 0.5), (1e-6, 0.9), (1e-40, 0.9), (0.0, 0.9)],
)
def test_a_draw_ends_on_any_logits_and_marks_rows_that_are_not_finite(temperature, top_p):
    """A row that is not finite changes nothing in the others, whose results repeat to the bit."""
    normal = np.random.default_rng(0).normal(size=300).astype(np.float32)
    rows = {}
    for name, places in (NOT_FINITE | FINITE).items():
        rows[name] = normal.copy()
        for place, number in places.items():
            rows[name][place] = number
    keys = jax.random.split(jax.random.key(0), len(rows))
    logits = np.stack(list(rows.values()))
    tokens, logprobs = map(np.asarray, sample(keys, logits, temperature, top_p))
    assert ((tokens >= 0) & (tokens < 300)).all()
    overflowing = {name for name in FINITE if np.abs(rows[name]).max() > 1e38}
    for name, token, logprob in zip(rows, tokens, logprobs, strict=True):
        if name in NOT_FINITE:
            assert np.isnan(logprob), name
        elif temperature != 0.7 or name not in overflowing:  # which 1 / 0.7 makes overflow
            assert logprob <= 0 and rows[name][token] > -np.inf, name
    usable = np.array([name in FINITE for name in rows])
    logits[~usable] = normal
    undisturbed = sample(keys, logits, temperature, top_p)
    assert np.array_equal(undisturbed[0][usable], tokens[usable])
    assert np.array_equal(undisturbed[1][usable], logprobs[usable], equal_nan=True)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3])
def test_a_low_temperature_takes_the_most_probable_word(temperature):
    logits = 8 * np.random.default_rng(4).normal(size=(50, 300))
    logits[:, 17] = logits.max(axis=1) + 0.1
    tokens, logprobs = draw(logits, 20, temperature, 0.9)
    assert (tokens == 17).all() and not logprobs.any()
