"""Losses and advantages: numbers by hand, identities, and brute-force versions in numpy."""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import advantages, losses
from alignjax.algorithms.advantages import RunningStats

LN = np.log


class Responses(NamedTuple):
    """Figures of tokens [responses tokens], and which tokens are real."""

    rewards: np.ndarray
    values: np.ndarray
    mask: np.ndarray


def array(*values):
    return jnp.asarray(values, jnp.float32)


def random_responses(seed=0, count=4, longest=6) -> Responses:
    """Return responses of 1 to `longest` tokens with random figures."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    lengths[0] = 1
    lengths[1] = longest
    shape = (count, longest)
    return Responses(
        rewards=rng.normal(size=shape).astype(np.float32),
        values=rng.normal(size=shape).astype(np.float32),
        mask=np.arange(longest) < lengths[:, None],
    )


def test_ranking_loss_by_hand():
    """Differences 0 and ln 3, so -log sigmoid is ln 2 and ln 4/3; margin 1; centring 0.5."""
    chosen = array(1, LN(3))
    rejected = array(1, 0)
    weights = array(0.5, 0.5)
    loss, metrics = losses.ranking_loss(chosen, rejected, weights)
    assert loss == pytest.approx((LN(2) + LN(4 / 3)) / 2, rel=1e-6)
    assert metrics["accuracy"] == 0.5
    assert metrics["ties"] == 0.5
    assert metrics["margin"] == pytest.approx(LN(3) / 2)
    with_margin, _ = losses.ranking_loss(chosen, rejected, weights, margins=array(1, 0))
    assert with_margin == pytest.approx((LN(1 + np.e) + LN(4 / 3)) / 2, rel=1e-6)
    centred, metrics = losses.ranking_loss(chosen, rejected, weights, centring=0.5)
    assert centred == pytest.approx(float(loss) + 0.5 * (4 + LN(3) ** 2) / 2, rel=1e-6)
    assert metrics["loss"] == loss


def test_accuracy_of_the_swapped_set_is_1_less_accuracy_and_ties():
    chosen = array(1, 2, 3, 3)
    rejected = array(0, 2, 5, 3)
    weights = jnp.full(4, 0.25)
    _, metrics = losses.ranking_loss(chosen, rejected, weights)
    _, swapped = losses.ranking_loss(rejected, chosen, weights)
    assert metrics["ties"] == swapped["ties"] == 0.5
    assert metrics["accuracy"] == 0.25
    assert swapped["accuracy"] == 1 - metrics["accuracy"] - metrics["ties"]


@pytest.mark.parametrize("shards", [(9,), (4, 5), (1,) * 9, (2, 2, 2, 2, 1)])
def test_nine_examples_over_any_shards_give_the_exact_rational(shards):
    """4 of 9 are correct. Partial sums of weights add up; a mean of shard means would not."""
    correct = np.array([1, 1, 0, 1, 0, 0, 1, 0, 0], np.float32)
    total = 0
    for part in np.split(correct, np.cumsum(shards)[:-1]):
        weights = jnp.full(len(part), 1 / 9)
        threshold = jnp.full(len(part), 0.5)
        _, metrics = losses.ranking_loss(jnp.asarray(part), threshold, weights)
        total += metrics["accuracy"]
    assert total == pytest.approx(float(Fraction(4, 9)), rel=1e-6)


def test_policy_loss_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5, 1 with clip 0.2.

    The clip binds on 1.5 with a positive advantage, and on 0.5 with a negative one.
    """
    ratio = np.array([1.5, 0.5, 1.5, 0.5, 1.0])
    token_advantages = array([1.0, 1.0, -1.0, -1.0, 2.0])
    weights = jnp.full((1, 5), 0.2)
    loss, metrics = losses.policy_loss(
        array(LN(ratio)), jnp.zeros((1, 5)), token_advantages, weights, 0.2
    )
    assert loss == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.0) / 5, rel=1e-6)
    assert metrics["policy/clipfrac_avg"] == pytest.approx(2 / 5)
    assert metrics["val/ratio"] == pytest.approx(1.0)
    assert metrics["val/ratio_var"] == pytest.approx(0.2, rel=1e-5)
    kl_estimate = float(np.mean(ratio - 1 - LN(ratio)))
    assert metrics["policy/approxkl_avg"] == pytest.approx(kl_estimate, rel=1e-5)


def test_a_token_whose_clip_binds_has_no_gradient():
    token_advantages = array([1.0, 1.0, -1.0, -1.0])
    weights = jnp.full((1, 4), 0.25)

    def loss(logprobs):
        old_logprobs = jnp.zeros((1, 4))
        return losses.policy_loss(logprobs, old_logprobs, token_advantages, weights, 0.2)[0]

    gradient = jax.grad(loss)(array(LN([1.5, 0.5, 1.5, 0.5])))[0]
    np.testing.assert_allclose(gradient, [0, -0.125, 0.375, 0], atol=1e-6)


def test_value_loss_by_hand():
    """Old value 0, clip 0.15, return 1: a value of 1 counts as 0.15; 0.1 is not clipped."""
    values = array([1.0, 0.1, -1.0, 1.0])
    returns = array([1.0, 1.0, 1.0, 0.0])
    weights = jnp.full((1, 4), 0.25)
    loss, metrics = losses.value_loss(values, jnp.zeros((1, 4)), returns, weights, 0.15)
    assert loss == pytest.approx(0.5 * (0.85**2 + 0.9**2 + 2**2 + 1) / 4, rel=1e-6)
    assert metrics["val/clipfrac_avg"] == 0.25


@pytest.mark.parametrize(
    "loss_fn, clip", [(losses.policy_loss, 0.2), (losses.value_loss, 0.15)], ids=["policy", "value"]
)
def test_more_padding_changes_no_loss_and_no_metric(loss_fn, clip):
    responses = random_responses()
    weights = (responses.mask / responses.mask.sum()).astype(np.float32)
    figures = (responses.rewards, responses.values, responses.rewards + responses.values)
    padding = ((0, 1), (0, 3))
    padded_figures = [np.pad(figure, padding, constant_values=7.5) for figure in figures]
    plain = loss_fn(*figures, weights, clip)
    padded = loss_fn(*padded_figures, np.pad(weights, padding), clip)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_lm_loss_is_the_weighted_mean():
    logprobs = array([-1.0, -2.0], [-4.0, 9.0])
    weights = array([0.5, 0.25], [0.25, 0.0])
    loss, _ = losses.lm_loss(logprobs, weights)
    assert loss == 2.0


def test_a_fractional_score_arrives_unchanged_at_the_last_token():
    """Also among whole scores and with a mask of booleans: 0.7 stays 0.7."""
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    zeros = jnp.zeros((3, 3))
    rewards = advantages.shape_rewards(array(0.7, -0.3, 2.5), zeros, mask, 0.04)
    np.testing.assert_array_equal(rewards, np.float32([[0, 0.7, 0], [-0.3, 0, 0], [0, 0, 2.5]]))


def test_the_penalty_in_the_reward_is_k1_and_keeps_its_sign():
    """k1 rewards logprob - ref_logprob = -0.5 by +0.02; k2 and k3 would penalise it."""
    mask = jnp.ones((1, 2), bool)
    logprobs = array([-1.0, -1.0])
    ref_logprobs = array([-0.5, -2.0])
    kl = losses.kl_estimate(logprobs, ref_logprobs, "k1")
    rewards = advantages.shape_rewards(array(0), kl, mask, 0.04)
    np.testing.assert_allclose(rewards, [[0.02, -0.04]], rtol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    rewards, values, mask = random_responses(1)
    estimates, returns = advantages.gae(rewards, values, mask, gamma, lam)
    for row in range(4):
        length = mask[row].sum()
        row_values = np.append(values[row, :length], 0.0)
        delta = rewards[row, :length] + gamma * row_values[1:] - row_values[:-1]
        for place in range(length):
            later = np.arange(place, length)
            expected = sum((gamma * lam) ** (later - place) * delta[later])
            assert estimates[row, place] == pytest.approx(expected, abs=1e-5)
            assert returns[row, place] == pytest.approx(expected + row_values[place], abs=1e-5)
        assert not np.asarray(estimates)[row, length:].any()


def test_no_value_and_no_reward_after_the_end_changes_an_advantage():
    rewards, values, mask = random_responses(2)
    noise = np.where(mask, 0, 100.0).astype(np.float32)
    plain = advantages.gae(rewards, values, mask, 1.0, 0.95)
    noisy = advantages.gae(rewards + noise, values + noise, mask, 1.0, 0.95)
    assert all(np.array_equal(one, other) for one, other in zip(plain, noisy, strict=True))


def test_whitening_has_population_variance_over_the_mask_of_the_whole_batch():
    responses = random_responses(3)
    x = responses.rewards
    mask = responses.mask
    white = np.asarray(advantages.whiten(x, mask))
    expected = (x - x[mask].mean()) / np.sqrt(x[mask].var() + 1e-8)
    np.testing.assert_allclose(white[mask], expected[mask], atol=1e-5)
    assert not white[~mask].any()
    padding = ((0, 0), (0, 3))
    padded = advantages.whiten(np.pad(x, padding, constant_values=9), np.pad(mask, padding))
    np.testing.assert_allclose(padded[:, :6], white, atol=1e-6)


def test_running_statistics_are_numpys_over_the_whole_stream():
    stats = RunningStats.zero()
    stream = np.zeros(0, np.float32)
    for seed, size in enumerate((4, 1, 16, 7)):
        batch = np.random.default_rng(seed).normal(3, 2, size).astype(np.float32)
        stats = stats.update(jnp.asarray(batch))
        stream = np.append(stream, batch)
        expected = [len(stream), stream.mean(), stream.std()]
        np.testing.assert_allclose([stats.count, stats.mean, stats.std], expected, rtol=1e-5)


def test_scores_are_normalised_by_statistics_that_hold_them_already():
    scores = array(1, 2, 6)
    stats = RunningStats.zero().update(scores)
    np.testing.assert_array_equal(advantages.normalise(scores, stats, "none"), scores)
    np.testing.assert_allclose(advantages.normalise(scores, stats, "mean"), [-2, -1, 3])
    scaled = advantages.normalise(scores, stats, "mean_std")
    np.testing.assert_allclose(scaled, np.array([-2, -1, 3]) / np.sqrt(14 / 3), rtol=1e-6)


def test_explained_variance_is_1_for_the_returns_0_for_a_constant():
    returns, values, mask = random_responses(4)
    assert advantages.explained_variance(returns, returns, mask) == 1
    constant = np.full_like(returns, 3.0)
    assert advantages.explained_variance(constant, returns, mask) == pytest.approx(0, abs=1e-6)
    marred_values = np.where(mask, values, np.float32(9))
    marred_returns = np.where(mask, returns, np.float32(-9))
    explained = advantages.explained_variance(marred_values, marred_returns, mask)
    residual = (returns - values)[mask].var()
    assert explained == pytest.approx(1 - residual / returns[mask].var(), rel=1e-4)
