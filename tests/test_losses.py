"""Losses and advantages: numbers worked out by hand, identities, and brute-force twins in numpy."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.algorithms import advantages, losses
from alignjax.algorithms.advantages import RunningStats

LN = np.log


def array(*values):
    return jnp.asarray(values, jnp.float32)


def random(seed=0, b=4, r=6):
    """rewards, values, mask of responses of 1 to r tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, r + 1, b)
    lengths[0], lengths[1] = 1, r
    draw = lambda: rng.normal(size=(b, r)).astype(np.float32)
    return draw(), draw(), np.arange(r) < lengths[:, None]


def test_ranking_loss_by_hand():
    """Differences 0 and ln 3: -log sigmoid is ln 2 and ln 4/3; margin 1 and centring 0.5 as their definitions say."""
    chosen, rejected, weights = array(1, LN(3)), array(1, 0), array(0.5, 0.5)
    loss, metrics = losses.ranking_loss(chosen, rejected, weights)
    assert loss == pytest.approx((LN(2) + LN(4 / 3)) / 2, rel=1e-6)
    assert (
        metrics["accuracy"] == 0.5
        and metrics["ties"] == 0.5
        and metrics["margin"] == pytest.approx(LN(3) / 2)
    )
    with_margin, _ = losses.ranking_loss(chosen, rejected, weights, margins=array(1, 0))
    assert with_margin == pytest.approx((LN(1 + np.e) + LN(4 / 3)) / 2, rel=1e-6)
    centred, same = losses.ranking_loss(chosen, rejected, weights, centring=0.5)
    assert (
        centred == pytest.approx(float(loss) + 0.5 * (4 + LN(3) ** 2) / 2, rel=1e-6)
        and same["loss"] == loss
    )


def test_accuracy_of_the_swapped_set_is_1_less_accuracy_and_ties():
    chosen, rejected, weights = array(1, 2, 3, 3), array(0, 2, 5, 3), jnp.full(4, 0.25)
    there, back = (
        losses.ranking_loss(*pair, weights)[1] for pair in ((chosen, rejected), (rejected, chosen))
    )
    assert there["ties"] == back["ties"] == 0.5 and there["accuracy"] == 0.25
    assert back["accuracy"] == 1 - there["accuracy"] - there["ties"]


@pytest.mark.parametrize("shards", [(9,), (4, 5), (1,) * 9, (2, 2, 2, 2, 1)])
def test_nine_examples_over_any_shards_give_the_exact_rational(shards):
    """4 of 9 right: partial sums of weights add up, where a mean of shard means would not."""
    right = np.array([1, 1, 0, 1, 0, 0, 1, 0, 0])
    ends = np.cumsum(shards)
    parts = [slice(end - n, end) for n, end in zip(shards, ends, strict=True)]
    total = 0
    for part in parts:
        difference, weights = (
            jnp.asarray(right[part], jnp.float32),
            jnp.full(len(right[part]), 1 / 9),
        )
        total += losses.ranking_loss(difference, jnp.full_like(difference, 0.5), weights)[1][
            "accuracy"
        ]
    assert total == pytest.approx(float(Fraction(4, 9)), rel=1e-6)


def test_policy_loss_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5, 1 with clip 0.2: the clip binds on 1.5 with gain and on 0.5 with loss, else not."""
    ratio, gain = np.array([1.5, 0.5, 1.5, 0.5, 1.0]), np.array([1.0, 1.0, -1.0, -1.0, 2.0])
    weights = jnp.full((1, 5), 0.2)
    loss, metrics = losses.policy_loss(
        array(LN(ratio)), jnp.zeros((1, 5)), array(gain), weights, 0.2
    )
    assert loss == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.0) / 5, rel=1e-6)
    assert metrics["policy/clipfrac_avg"] == pytest.approx(2 / 5)
    assert metrics["val/ratio"] == pytest.approx(1.0) and metrics["val/ratio_var"] == pytest.approx(
        0.2, rel=1e-5
    )
    assert metrics["policy/approxkl_avg"] == pytest.approx(
        float(np.mean(ratio - 1 - LN(ratio))), rel=1e-5
    )


def test_a_token_whose_clip_binds_has_no_gradient():
    gain = array([1.0, 1.0, -1.0, -1.0])
    loss = lambda x: losses.policy_loss(x, jnp.zeros((1, 4)), gain, jnp.full((1, 4), 0.25), 0.2)[0]
    grad = jax.grad(loss)(array(LN([1.5, 0.5, 1.5, 0.5])))[0]
    np.testing.assert_allclose(grad, [0, -0.125, 0.375, 0], atol=1e-6)


def test_value_loss_by_hand():
    """Old value 0, clip 0.15: a value of 1 towards a return of 1 counts as 0.15; one of 0.1 is free."""
    values, returns = array([1.0, 0.1, -1.0, 1.0]), array([1.0, 1.0, 1.0, 0.0])
    loss, metrics = losses.value_loss(
        values, jnp.zeros((1, 4)), returns, jnp.full((1, 4), 0.25), 0.15
    )
    assert loss == pytest.approx(0.5 * (0.85**2 + 0.9**2 + 2**2 + 1) / 4, rel=1e-6)
    assert metrics["val/clipfrac_avg"] == 0.25


@pytest.mark.parametrize("which", ["policy", "value"])
def test_more_padding_changes_no_loss_and_no_metric(which):
    a, b, mask = random()
    weights = mask / mask.sum()
    call = {
        "policy": lambda w, *x: losses.policy_loss(*x[:3], w, 0.2),
        "value": lambda w, *x: losses.value_loss(*x[:3], w, 0.15),
    }[which]
    wider = [np.pad(x, ((0, 1), (0, 3)), constant_values=7.5) for x in (a, b, a + b)]
    short, long = call(weights, a, b, a + b), call(np.pad(weights, ((0, 1), (0, 3))), *wider)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), short, long)


def test_lm_loss_is_the_weighted_mean():
    loss, _ = losses.lm_loss(array([-1.0, -2.0], [-4.0, 9.0]), array([0.5, 0.25], [0.25, 0.0]))
    assert loss == 2.0


def test_a_fractional_score_arrives_unchanged_at_the_last_token():
    """Also where scores come as integers' neighbours and the mask as booleans; 0.7 stays 0.7."""
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    rewards = advantages.shape_rewards(
        array(0.7, -0.3, 2.5), jnp.zeros((3, 3)), jnp.zeros((3, 3)), mask, 0.04
    )
    np.testing.assert_array_equal(rewards, np.float32([[0, 0.7, 0], [-0.3, 0, 0], [0, 0, 2.5]]))


def test_the_penalty_in_the_reward_is_k1_and_keeps_its_sign():
    """logprob - ref_logprob = -0.5 is rewarded by +0.02 under k1; k2 and k3 would punish it."""
    mask = jnp.ones((1, 2), bool)
    rewards = advantages.shape_rewards(
        array(0), array([-1.0, -1.0]), array([-0.5, -2.0]), mask, 0.04
    )
    np.testing.assert_allclose(rewards, [[0.02, -0.04]], rtol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    rewards, values, mask = random(1)
    gains, returns = advantages.gae(rewards, values, jnp.asarray(mask), gamma, lam)
    for row in range(4):
        n = mask[row].sum()
        v = np.append(values[row, :n], 0.0)
        delta = [rewards[row, t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            wanted = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
            assert gains[row, t] == pytest.approx(wanted, abs=1e-5)
            assert returns[row, t] == pytest.approx(wanted + v[t], abs=1e-5)
        assert not np.asarray(gains)[row, n:].any()


def test_no_value_and_no_reward_after_the_end_changes_an_advantage():
    rewards, values, mask = random(2)
    plain = advantages.gae(rewards, values, jnp.asarray(mask), 1.0, 0.95)
    noise = np.where(mask, 0, 100.0).astype(np.float32)
    moved = advantages.gae(rewards + noise, values + noise, jnp.asarray(mask), 1.0, 0.95)
    assert all(np.array_equal(a, b) for a, b in zip(plain, moved, strict=True))


def test_whitening_has_population_variance_over_the_mask_of_the_whole_batch():
    x, _, mask = random(3)
    white = np.asarray(advantages.whiten(x, jnp.asarray(mask)))
    wanted = (x - x[mask].mean()) / np.sqrt(x[mask].var() + 1e-8)
    np.testing.assert_allclose(white[mask], wanted[mask], atol=1e-5)
    assert not white[~mask].any()
    padded = advantages.whiten(
        np.pad(x, ((0, 0), (0, 3)), constant_values=9), jnp.asarray(np.pad(mask, ((0, 0), (0, 3))))
    )
    np.testing.assert_allclose(padded[:, :6], white, atol=1e-6)


def test_running_statistics_are_numpys_over_the_whole_stream():
    batches = [
        np.random.default_rng(i).normal(3, 2, n).astype(np.float32)
        for i, n in enumerate((4, 1, 16, 7))
    ]
    stats, seen = RunningStats.zero(), np.zeros(0, np.float32)
    for batch in batches:
        stats, seen = stats.update(jnp.asarray(batch)), np.append(seen, batch)
        np.testing.assert_allclose(
            [stats.count, stats.mean, stats.std], [len(seen), seen.mean(), seen.std()], rtol=1e-5
        )


def test_scores_are_normalised_by_statistics_that_hold_them_already():
    scores = array(1, 2, 6)
    stats = RunningStats.zero().update(scores)
    np.testing.assert_array_equal(advantages.normalise(scores, stats, "none"), scores)
    np.testing.assert_allclose(advantages.normalise(scores, stats, "mean"), [-2, -1, 3])
    scaled = advantages.normalise(scores, stats, "mean_std")
    np.testing.assert_allclose(scaled, np.array([-2, -1, 3]) / np.sqrt(14 / 3), rtol=1e-6)


def test_explained_variance_is_1_for_the_returns_0_for_a_constant():
    returns, values, mask = (jnp.asarray(x) for x in random(4))
    assert advantages.explained_variance(returns, returns, mask) == 1
    assert advantages.explained_variance(
        jnp.full_like(returns, 3.0), returns, mask
    ) == pytest.approx(0, abs=1e-6)
    r, v = np.asarray(returns)[np.asarray(mask)], np.asarray(values)[np.asarray(mask)]
    found = advantages.explained_variance(
        jnp.where(mask, values, 9), jnp.where(mask, returns, -9), mask
    )
    assert found == pytest.approx(1 - (r - v).var() / r.var(), rel=1e-4)
    assert advantages.explained_variance(values, jnp.ones_like(returns), mask) == 0
