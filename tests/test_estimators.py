"""Advantage estimators and the options of the policy's loss: by brute force, and beside TRL's.

The numbers under "trl" come from TRL 1.9.2: from `_compute_loss` of its trainers for GRPO and RLOO
and the lines that make advantages, on the arrays below, two responses to each of two prompts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import config as configs
from alignjax.algorithms import advantages, estimators, experience_making, losses
from alignjax.algorithms.advantages import KLControl
from alignjax.algorithms.estimators import AdvantageInputs, find_estimator
from alignjax.algorithms.experience import Reading
from alignjax.config import PPO
from alignjax.config.estimators import ESTIMATORS

LENGTHS = np.array([4, 2, 3, 1])
MASK = np.arange(4) < LENGTHS[:, None]
SCORES = np.float32([1.0, 3.0, -0.5, 0.25])
OLD = np.float32(
    [[-1.0, -0.5, -2.0, -0.25], [-0.75, -1.5, 0, 0], [-0.5, -1.0, -0.125, 0], [-3.0, 0, 0, 0]]
)
CHANGE = np.float32(
    [[0.25, -0.5, 0.125, 1.0], [-0.25, 0.375, 0, 0], [0.0, -0.75, 0.5, 0], [1.5, 0, 0, 0]]
)
REF = OLD + np.float32(
    [[0.5, -0.25, 0.0, -1.0], [0.25, 0.25, 0, 0], [-0.5, 0.75, -0.125, 0], [0.5, 0, 0, 0]]
)
ENTROPY = np.float32(
    [[1.0, 0.5, 2.0, 0.25], [0.75, 1.5, 0, 0], [0.5, 1.0, 0.125, 0], [3.0, 0, 0, 0]]
)
WEIGHTS = (MASK / MASK.sum()).astype(np.float32)


def estimate(name: str, rewards, mask, **fields):
    """Return the advantages of an estimator, by the settings of PPO with these fields."""
    inputs = AdvantageInputs(rewards=jnp.asarray(rewards), mask=jnp.asarray(mask))
    ppo = PPO(advantage_estimator=name, **fields)
    return np.asarray(find_estimator(name)(inputs, ppo).advantages)


def rewards_of(kl_coef: float):
    """Return the rewards of the arrays above, with the penalty k1 in them."""
    return advantages.shape_rewards(SCORES, jnp.asarray(OLD - REF), jnp.asarray(MASK), kl_coef)


# ------------------------------------------------------------------------------------- estimators


def test_every_estimator_says_what_it_needs():
    assert set(estimators.ESTIMATORS) == set(ESTIMATORS)


def brute_force(name: str, rewards, mask, samples: int, gamma: float):
    """Return each token's advantage by the estimator's equation, one response after the other."""
    expected = np.zeros(rewards.shape)
    totals = [rewards[row][mask[row]].sum() for row in range(len(rewards))]
    for row, length in enumerate(mask.sum(1)):
        first = row // samples * samples
        group = totals[first : first + samples]
        others = [total for place, total in enumerate(group) if first + place != row]
        if name == "rloo":
            expected[row] = totals[row] - np.mean(others)
        elif name == "grpo":
            expected[row] = (totals[row] - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
        elif name in ("dr_grpo", "reinforce++_baseline"):
            expected[row] = totals[row] - np.mean(group)
        else:
            assert name == "reinforce++"
            for place in range(length):
                discounts = gamma ** np.arange(length - place)
                expected[row, place] = (discounts * rewards[row, place:length]).sum()
    return expected


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"gae"}))
@pytest.mark.parametrize("samples", [2, 4])
def test_an_estimator_is_its_equation(name, samples):
    random = np.random.default_rng(samples)
    mask = np.arange(6) < random.integers(1, 7, 8)[:, None]
    rewards = random.normal(size=mask.shape).astype(np.float32)
    found = estimate(name, rewards, mask, samples_per_prompt=samples, gamma=0.9)
    expected = brute_force(name, rewards, mask, samples, gamma=0.9)
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)
    # Nothing after the end of a response counts.
    noisy = estimate(name, np.where(mask, rewards, 99), mask, samples_per_prompt=samples, gamma=0.9)
    np.testing.assert_array_equal(noisy[mask], found[mask])


@pytest.mark.parametrize(
    "name, kl_coef, trl",
    [
        ("grpo", 0.0, [-0.7070567607879639, 0.7070567607879639, -0.706973493, 0.706973493]),
        ("dr_grpo", 0.0, [-1.0, 1.0, -0.375, 0.375]),
        ("rloo", 0.04, [-2.05, 2.05, -0.765, 0.765]),
    ],
)
def test_advantages_are_those_of_trl(name, kl_coef, trl):
    found = estimate(name, rewards_of(kl_coef), MASK)
    np.testing.assert_allclose(found, np.where(MASK, np.float32(trl)[:, None], 0), rtol=1e-6)


def test_equal_scores_give_no_advantage():
    for name in ("rloo", "grpo", "dr_grpo"):
        equal = advantages.shape_rewards(
            jnp.full(4, 0.7), jnp.zeros((4, 4)), jnp.asarray(MASK), 0.0
        )
        assert not estimate(name, equal, MASK).any()
    assert experience_making.equal_groups(jnp.float32([1, 1, 1, 2]), 2) == 0.5


def test_whitening_a_group_baseline_is_reinforce_with_one_and_so_is_whitening_rloo():
    mask = jnp.asarray(MASK)
    rewards = rewards_of(0.04)
    whitened = [
        advantages.whiten(jnp.asarray(estimate(name, rewards, MASK)), mask)
        for name in ("reinforce++_baseline", "rloo")
    ]
    np.testing.assert_allclose(whitened[0], whitened[1], atol=1e-6)


def test_value_targets_may_have_a_lambda_of_their_own():
    """With 1 they are the sums of rewards to come; the policy's advantages stay."""
    random = np.random.default_rng(0)
    inputs = AdvantageInputs(
        rewards=jnp.asarray(random.normal(size=(4, 4)), jnp.float32),
        values=jnp.asarray(random.normal(size=(4, 4)), jnp.float32),
        mask=jnp.asarray(MASK),
    )
    plain = find_estimator("gae")(inputs, PPO())
    apart = find_estimator("gae")(inputs, PPO(value_lam=1.0))
    np.testing.assert_array_equal(plain.advantages, apart.advantages)
    rewards = np.where(MASK, inputs.rewards, 0)
    sums = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(np.asarray(apart.returns)[MASK], sums[MASK], atol=1e-5)
    assert np.abs(np.asarray(plain.returns)[MASK] - sums[MASK]).max() > 0.01


# ------------------------------------------------------------------------------- the policy's loss


def objective(
    new, token_advantages, *, aggregation="token", kl_coef=0.0, entropy_coef=0.0, **clips
):
    """Return the loss of the arrays above, as `ppo_programs.policy_loss_fn` puts it together."""
    lengths = np.broadcast_to(LENGTHS[:, None], MASK.shape)
    loss_weights = losses.token_weights(aggregation, jnp.asarray(WEIGHTS), lengths, 4, 4)
    loss, _ = losses.policy_loss(
        new, OLD, token_advantages, WEIGHTS, 0.2, loss_weights=loss_weights, **clips
    )
    penalty, _ = losses.kl_loss(new, REF, loss_weights, "k3")
    bonus, _ = losses.entropy_bonus(ENTROPY, WEIGHTS)
    return loss + kl_coef * penalty - entropy_coef * bonus


# Estimator, options, TRL's loss and its gradient on each token.
TRL = {
    "grpo": (
        "grpo",
        {"aggregation": "sequence", "kl_coef": 0.04},
        0.09347294270992279,
        [
            [0.056032367050647736, -0.0007100636139512062, 0.0503687746822834, 0.1222853735089302],
            [-0.07207565009593964, 0.0005875155329704285, 0.0, 0.0],
            [0.06022602319717407, -0.011605629697442055, 0.09868264943361282, 0.0],
            [0.0063212052918970585, 0.0, 0.0, 0.0],
        ],
    ),
    "dr_grpo": (
        "dr_grpo",
        {"aggregation": "constant", "kl_coef": 0.04},
        0.3099539875984192,
        [
            [0.07954152673482895, -0.0007100636139512062, 0.07111553847789764, 0.17205427587032318],
            [-0.050296850502491, 0.00029375776648521423, 0.0, 0.0],
            [0.024421174079179764, -0.008704222738742828, 0.039803750813007355, 0.0],
            [0.0015803013229742646, 0.0, 0.0, 0.0],
        ],
    ),
    "dapo, epsilon_high": (
        "grpo",
        {"clip_high": 0.28},
        0.4274243712425232,
        [
            [0.09078788757324219, 0.0, 0.0801200270652771, 0.19219794869422913],
            [-0.05506563559174538, 0.0, 0.0, 0.0],
            [0.0706973522901535, 0.0, 0.11656022816896439, 0.0],
            [0.0, 0.0, 0.0, 0.0],
        ],
    ),
    "bnpo, delta": (
        "grpo",
        {"dual_clip": 2.5},
        0.4233028292655945,
        [
            [0.09078788757324219, 0.0, 0.0801200270652771, 0.0],
            [-0.05506563559174538, 0.0, 0.0, 0.0],
            [0.0706973522901535, 0.0, 0.11656022816896439, 0.0],
            [0.0, 0.0, 0.0, 0.0],
        ],
    ),
    "bnpo, entropy_coef": (
        "grpo",
        {"entropy_coef": 0.01},
        0.42811158299446106,
        [
            [0.09078788757324219, 0.0, 0.0801200270652771, 0.19219794869422913],
            [-0.05506563559174538, 0.0, 0.0, 0.0],
            [0.0706973522901535, 0.0, 0.11656022816896439, 0.0],
            [0.0, 0.0, 0.0, 0.0],
        ],
    ),
}


@pytest.mark.parametrize("name, options, trl_loss, trl_gradient", TRL.values(), ids=TRL)
def test_loss_and_gradient_are_those_of_trl(name, options, trl_loss, trl_gradient):
    """Its `delta` is the dual clip; its `dapo` and `bnpo` are means over all tokens."""
    token_advantages = estimate(name, rewards_of(0.0), MASK)
    value_and_gradient = jax.value_and_grad(lambda new: objective(new, token_advantages, **options))
    loss, gradient = value_and_gradient(jnp.asarray(OLD + CHANGE))
    assert loss == pytest.approx(trl_loss, rel=2e-6)
    np.testing.assert_allclose(gradient, trl_gradient, atol=2e-7)


def test_rloo_before_an_update_has_trls_gradient_to_a_factor():
    """TRL sums over a response's tokens, and we divide that by the longest length, 4 here."""
    token_advantages = estimate("rloo", rewards_of(0.04), MASK)
    gradient = jax.grad(lambda new: objective(new, token_advantages, aggregation="constant"))
    trl = np.float32([0.5125, -0.5125, 0.19125, -0.19125])[:, None] * MASK
    np.testing.assert_allclose(4 * gradient(jnp.asarray(OLD)), trl, atol=1e-6)


def test_token_weights_by_hand():
    lengths = np.broadcast_to(LENGTHS[:, None], MASK.shape)
    first = {
        name: np.asarray(losses.token_weights(name, jnp.asarray(WEIGHTS), lengths, 4, 8))[:, 0]
        for name in ("token", "sequence", "constant")
    }
    np.testing.assert_allclose(first["token"], np.full(4, 0.1), rtol=1e-6)
    np.testing.assert_allclose(first["sequence"], 1 / (4 * LENGTHS), rtol=1e-6)
    np.testing.assert_allclose(first["constant"], np.full(4, 1 / 32), rtol=1e-6)


def test_dual_clip_by_hand():
    """A = -1: a ratio of 5 counts as 3 and has no gradient; one of 2 is below the bound."""
    log_ratio = jnp.log(jnp.float32([[5.0, 2.0, 5.0]]))
    token_advantages = jnp.float32([[-1.0, -1.0, 1.0]])
    weights = jnp.full((1, 3), 1 / 3)

    def loss(new):
        zeros = jnp.zeros_like(new)
        return losses.policy_loss(new, zeros, token_advantages, weights, 0.2, dual_clip=3.0)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(log_ratio)
    assert value == pytest.approx((3 + 2 - 1.2) / 3, rel=1e-6)
    assert metrics["policy/dual_clipfrac_avg"] == pytest.approx(1 / 3)
    np.testing.assert_allclose(gradient, [[0, 2 / 3, 0]], atol=1e-6)


def test_clip_high_by_hand():
    """A ratio of 1.3 is clipped at 1.2 as usual, and at 1.28 with clip_high; 0.7 at 0.8 in both."""
    log_ratio = jnp.log(jnp.float32([[1.3, 0.7]]))
    token_advantages = jnp.float32([[1.0, -1.0]])
    weights = jnp.full((1, 2), 0.5)
    zeros = jnp.zeros((1, 2))
    for clip_high, upper in ((0.0, 1.2), (0.28, 1.28)):
        loss, _ = losses.policy_loss(
            log_ratio, zeros, token_advantages, weights, 0.2, clip_high=clip_high
        )
        assert loss == pytest.approx(-(upper - 0.8) / 2, rel=1e-6)


# -------------------------------------------------------------------------------------- KL penalty


def test_kl_estimates_by_hand():
    """With log p - log q = 0.5: k1 = 0.5, k2 = 0.125, k3 = exp(-0.5) - 1 + 0.5."""
    found = [
        float(losses.kl_estimate(jnp.float32(-1.0), jnp.float32(-1.5), name))
        for name in ("k1", "k2", "k3")
    ]
    np.testing.assert_allclose(found, [0.5, 0.125, np.exp(-0.5) - 0.5], rtol=1e-6)


def test_each_kl_estimate_has_the_gradient_that_its_docstring_says():
    """Over a vocabulary of five, all tokens weighted by their probabilities."""
    logits = jnp.float32([0.3, -1.0, 0.7, 0.1, -0.4])
    ref_logprobs = jax.nn.log_softmax(jnp.float32([-0.2, 0.5, 0.9, -1.0, 0.0]))
    probabilities = jax.nn.softmax(logits)

    def expected_loss(logits, name):
        logprobs = jax.nn.log_softmax(logits)
        return (probabilities * losses.kl_estimate(logprobs, ref_logprobs, name)).sum()

    def expected_reward(logits):
        logprobs = jax.nn.log_softmax(logits)
        reward = jax.lax.stop_gradient(losses.kl_estimate(logprobs, ref_logprobs, "k1"))
        return (probabilities * reward * logprobs).sum()

    def kl(logits):
        logprobs = jax.nn.log_softmax(logits)
        return (jnp.exp(logprobs) * (logprobs - ref_logprobs)).sum()

    def kl_from_reference(logits):
        return (jnp.exp(ref_logprobs) * (ref_logprobs - jax.nn.log_softmax(logits))).sum()

    gradient = {name: jax.grad(expected_loss)(logits, name) for name in ("k1", "k2", "k3")}
    np.testing.assert_allclose(gradient["k1"], np.zeros(5), atol=1e-6)
    np.testing.assert_allclose(gradient["k2"], jax.grad(kl)(logits), atol=1e-6)
    np.testing.assert_allclose(gradient["k3"], jax.grad(kl_from_reference)(logits), atol=1e-6)
    np.testing.assert_allclose(jax.grad(expected_reward)(logits), jax.grad(kl)(logits), atol=1e-6)


def test_the_kl_in_the_loss_is_not_in_the_rewards():
    old = jnp.asarray(OLD)
    reading = Reading(
        logprobs=old, entropy=old, ref_logprobs=jnp.asarray(REF), values=None, scores={}
    )
    mask = jnp.asarray(MASK)
    in_loss = PPO(kl_in="loss", kl_estimator="k3", kl_coef=0.5)
    rewards = experience_making.shape_rewards(in_loss, jnp.asarray(SCORES), reading, mask, 0.5)
    np.testing.assert_array_equal(rewards, rewards_of(0.0))
    in_reward = dataclasses.replace(in_loss, kl_in="reward")
    rewards = experience_making.shape_rewards(in_reward, jnp.asarray(SCORES), reading, mask, 0.5)
    log_ratio = OLD - REF
    expected = -0.5 * (np.exp(-log_ratio) - 1 + log_ratio) + np.asarray(rewards_of(0.0))
    np.testing.assert_allclose(np.asarray(rewards)[MASK], expected[MASK], atol=1e-6)


def test_the_controller_of_the_kl_is_that_of_ziegler_by_hand():
    """Target 2, horizon 100, 10 responses: an error is clipped to 0.2, so a step is at most 2 %."""
    control = KLControl(jnp.float32(0.04))

    def coef_after(kl):
        return float(control.update(jnp.float32(kl), 2.0, 10, 100).coef)

    assert coef_after(2.0) == pytest.approx(0.04)
    assert coef_after(2.2) == pytest.approx(0.04 * 1.01)
    assert coef_after(9.0) == pytest.approx(0.04 * 1.02)
    assert coef_after(0.0) == pytest.approx(0.04 * 0.98)
    assert coef_after(np.nan) == pytest.approx(0.04)


# ------------------------------------------------------------------------------------------ scores


def test_the_penalty_on_length_is_daposs():
    """At 12, 13, 16 and 20 tokens of 20, with a buffer of 8; the numbers are TRL's."""
    lengths = jnp.array([12, 13, 16, 20])
    found = advantages.overlong_penalty(lengths, 20, 8, 1.0)
    np.testing.assert_allclose(found, [0.0, 0.125, 0.5, 1.0])
    np.testing.assert_allclose(advantages.overlong_penalty(lengths, 20, 8, 0.5), found / 2)


# ---------------------------------------------------------------------------- the rules of a config


@pytest.mark.parametrize(
    "name, given, message",
    [
        (
            "ppo.py",
            {"ppo.advantage_estimator": "grpo"},
            "parents.value='rm.py' would be ignored: ppo.advantage_estimator='grpo' has no value "
            "model",
        ),
        (
            "ppo.py",
            {"ppo.advantage_estimator": "gea"},
            "ppo.advantage_estimator='gea' is no estimator; did you mean 'gae'?; one of your own "
            "is named module:function",
        ),
        (
            "grpo.py",
            {"ppo.advantage_estimator": "gae"},
            "parents=['policy', 'reference', 'reward'] must be ['policy', 'reference', 'reward', "
            "'value'] for ppo",
        ),
        (
            "grpo.py",
            {"value_optimiser.learning_rate": "1e-4"},
            "value_optimiser.learning_rate=0.0001 would be ignored: "
            "ppo.advantage_estimator='grpo' has no value model",
        ),
        (
            "grpo.py",
            {"ppo.lam": "1"},
            "ppo.lam=1.0 would be ignored: ppo.advantage_estimator='grpo' has no value model",
        ),
        (
            "grpo.py",
            {"ppo.value_warmup_steps": "3"},
            "ppo.value_warmup_steps=3 would be ignored: ppo.advantage_estimator='grpo' has no "
            "value model",
        ),
        (
            "grpo.py",
            {"ppo.gamma": "0.9"},
            "ppo.gamma=0.9 would be ignored: ppo.advantage_estimator='grpo' does not discount",
        ),
        (
            "grpo.py",
            {"ppo.samples_per_prompt": "1"},
            "ppo.samples_per_prompt=1 must be at least 2: ppo.advantage_estimator='grpo' compares "
            "the responses to a prompt",
        ),
        (
            "grpo.py",
            {"ppo.whiten_advantages": "true"},
            "ppo.whiten_advantages=True must be False: ppo.advantage_estimator='grpo' has a scale "
            "of its own",
        ),
        (
            "grpo.py",
            {"ppo.advantage_estimator": "reinforce++"},
            "ppo.whiten_advantages=False must be True: ppo.advantage_estimator='reinforce++' is "
            "whitened over the rollout",
        ),
        (
            "grpo.py",
            {"ppo.kl_estimator": "k1"},
            "ppo.kl_estimator='k1' would be ignored in the loss, where its mean gradient is 0; "
            "ppo.kl_in='loss' needs 'k2' or 'k3'",
        ),
        (
            "ppo.py",
            {"ppo.kl_target": "6", "ppo.kl_coef": "0"},
            "ppo.kl_target=6.0 would be ignored: it scales ppo.kl_coef, which is 0",
        ),
        (
            "ppo.py",
            {"ppo.kl_horizon": "5"},
            "ppo.kl_horizon=5 would be ignored: ppo.kl_target is 0",
        ),
        (
            "ppo.py",
            {"ppo.dual_clip": "1.2"},
            "ppo.dual_clip=1.2 must be 0 or above the ratio's upper bound 1.2",
        ),
        (
            "ppo.py",
            {"ppo.value_lam": "-0.5"},
            "ppo.value_lam=-0.5 must be -1, which is ppo.lam, or not below 0",
        ),
        (
            "ppo.py",
            {"ppo.overlong_buffer": "15"},
            "ppo.overlong_buffer=15 is over ppo.response_length=14",
        ),
        (
            "ppo.py",
            {"ppo.overlong_penalty": "2"},
            "ppo.overlong_penalty=2.0 would be ignored: ppo.overlong_buffer is 0",
        ),
    ],
)
def test_what_would_be_ignored_or_does_not_fit_is_refused(name, given, message):
    with pytest.raises(configs.UserError) as raised:
        configs.load(name, given)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "given, warmup, aggregation",
    [
        ({}, 0, "sequence"),
        ({"ppo.advantage_estimator": "rloo"}, 0, "constant"),
        ({"ppo.advantage_estimator": "dr_grpo", "ppo.value_warmup_steps": "0"}, 0, "constant"),
        ({"ppo.loss_aggregation": "token", "ppo.clip_high": "0.28"}, 0, "token"),
        (
            {"ppo.advantage_estimator": "reinforce++", "ppo.whiten_advantages": "true"},
            0,
            "token",
        ),
        ({"ppo.advantage_estimator": "gae", "parents.value": "rm.py"}, 50, "token"),
        # A user's function has a value model if the parents name one.
        ({"ppo.advantage_estimator": "mine:f", "ppo.gamma": "0.9"}, 0, "token"),
        ({"ppo.advantage_estimator": "mine:f", "parents.value": "rm.py"}, 50, "token"),
    ],
)
def test_the_estimator_decides_on_roles_warm_up_and_the_loss(given, warmup, aggregation):
    config = configs.load("grpo.py", given)
    roles = ("policy", "value") if "value" in config.parents else ("policy",)
    assert configs.trained_roles(config) == roles
    assert configs.value_warmup_steps(config) == warmup
    assert configs.loss_aggregation(config) == aggregation
