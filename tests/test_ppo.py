"""PPO's step, part by part: what must be exact about the ratio, the KL, the warm-up, the pretraining gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny

from alignjax import config as configs
from alignjax import update
from alignjax.advantages import RunningStats
from alignjax.config import UserError
from alignjax.stages import lm, ppo

END = 3


def make(**changes):
    """A config of 8 prompts x 2 responses x 6 tokens in two minibatches; `changes` go to its ppo part."""
    c = configs.load("ppo.py:tiny")
    c.model = tiny()[0]
    c.data.batch, c.data.max_length = 8, 5
    settings = dict(response_length=6, minibatches=2, epochs=2, value_warmup_steps=0, pretrain_coef=0.0, top_p=1.0)
    c.ppo = dataclasses.replace(c.ppo, **settings | changes)
    c.optimiser.learning_rate = c.value_optimiser.learning_rate = 1e-2
    return c


class World:
    """A config with its programs, and roles of random parameters; policy and reference are equal, not the same."""

    def __init__(self, config):
        self.config = config
        optimisers = {"policy": update.make_optimiser(config.optimiser, 100),
                      "value": update.make_optimiser(config.value_optimiser, 100)}  # fmt: skip
        self.programs = ppo.compiled(config, optimisers, END)
        roles = {"policy": (0, "lm"), "reference": (0, "lm"), "value": (1, "scalar"), "reward": (2, "scalar")}
        self.params = {role: jax.tree.map(jnp.asarray, tiny(seed, head)[1]) for role, (seed, head) in roles.items()}
        self.state = {role: update.init_state(jax.tree.map(jnp.copy, self.params[role]), optimisers[role])
                      for role in ("policy", "value")} | {"stats": RunningStats.zero()}  # fmt: skip
        rng = np.random.default_rng(3)
        lengths = rng.integers(2, 6, 8).astype(np.int32)
        prompts = np.where(np.arange(5) >= 5 - lengths[:, None], rng.integers(1, 96, (8, 5)), 0).astype(np.int32)
        batch = {"prompts": prompts, "lengths": lengths, "index": np.arange(8, dtype=np.int32)}
        self.sampled = self.programs.sample(self.params["policy"], batch, jax.random.key(0))

    def experience(self):
        return self.programs.experience(self.params, RunningStats.zero(), self.sampled)

    def gradients(self, params, rows, text=None):
        return self.programs.gradients(params, self.experience()[0], rows, text)

    def learn(self, step=0, state=None, text=lambda number: None, rate=lambda n: n * 1.0):
        copy = jax.tree.map(jnp.copy, state or self.state)
        return ppo.learn(self.config, self.programs, rate, copy, self.experience()[0], step, text)


@pytest.fixture(scope="module")
def world():
    return World(make())


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_an_update_the_ratio_is_1_and_the_kl_0(world, temperature):
    """Whatever the temperature. KL is 0 to the bit, as one program scores both; the gradient's program may round apart."""
    mine = world if temperature == 1 else World(make(temperature=temperature))
    _, _, metrics, said = mine.experience()
    assert metrics["objective/kl"] == 0 and not np.asarray(said["kl"]).any()
    for _, rows in list(ppo.minibatches(mine.config, 0))[:2]:
        _, found = mine.gradients(mine.params["policy"], rows)
        assert found["val/ratio_var"] < 1e-12 and abs(found["val/ratio"] - 1) < 1e-6
        assert found["policy/clipfrac_avg"] == 0 and found["policy/approxkl_avg"] < 1e-7


def test_the_ratio_moves_and_the_clip_binds_in_the_second_epoch(world):
    state, metrics = world.learn()
    assert metrics["val/ratio_var"] > 0 and metrics["policy/clipfrac_avg"] > 0 and metrics["policy/approxkl_avg"] > 0
    assert int(state["policy"].updates) == int(state["value"].updates) == 4


def test_old_logprobs_stay_those_of_the_rollout(world):
    """A moved policy is measured against the experience, which does not move with it."""
    experience = world.experience()[0]
    moved = jax.tree.map(lambda x: x + 0.05, world.params["policy"])
    _, metrics = world.gradients(moved, np.arange(8))
    assert metrics["val/ratio_var"] > 1e-3
    assert equal(experience, world.experience()[0])


def test_warm_up_leaves_the_policy_alone_for_exactly_so_many_updates():
    """Three of the four updates of a step: the policy and its optimiser move in the fourth, and its schedule starts."""
    for warmup, updates in ((4, 0), (3, 1), (0, 4)):
        mine = World(make(value_warmup_steps=warmup))
        seen = []
        state, metrics = mine.learn(rate=lambda n: seen.append(int(n)) or float(n))  # noqa: B023
        assert int(state["policy"].updates) == updates and seen == list(range(updates))
        assert int(state["value"].updates) == 4
        untouched = equal(state["policy"], mine.state["policy"])
        assert untouched == (updates == 0)
        assert ("loss/policy_avg" in metrics) == (updates > 0)
        assert not equal(state["value"].params, mine.state["value"].params)


def test_the_50_updates_of_the_report_are_50():
    c = make(value_warmup_steps=50)
    numbers = [number for step in range(20) for number, _ in ppo.minibatches(c, step)]
    assert numbers == list(range(80)) and sum(n < 50 for n in numbers) == 50
    assert configs.load("ppo.py:qwen").ppo.value_warmup_steps == 50


def test_each_epoch_has_its_own_order_and_a_rerun_the_same(world):
    one, two, three, four = (rows for _, rows in ppo.minibatches(world.config, 0))
    first, second = np.concatenate([one, two]), np.concatenate([three, four])
    assert sorted(first) == sorted(second) == list(range(16))
    assert list(first) != list(second)
    later = np.concatenate([rows for _, rows in ppo.minibatches(world.config, 1)])
    assert list(later[16:]) != list(second)
    assert all(
        np.array_equal(a[1], b[1]) for a, b in zip(*(ppo.minibatches(world.config, 1) for _ in "ab"), strict=True)
    )


def test_reference_and_reward_are_the_same_after_updates(world):
    before = {role: jax.tree.map(np.array, world.params[role]) for role in ("reference", "reward")}
    state, _ = world.learn()
    assert all(equal(before[role], world.params[role]) for role in before)
    assert not equal(state["policy"].params, before["reference"])
    pointers = [{x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
                for tree in (world.params["reference"], world.state["policy"].params)]  # fmt: skip
    assert not pointers[0] & pointers[1]


def test_a_truncated_response_gets_its_own_score_in_place_of_the_models(world):
    truncated = np.asarray(world.sampled.truncated)
    assert 0 < truncated.sum() < 16
    _, stats, metrics, said = world.experience()
    scores = np.where(truncated, world.config.ppo.truncated_score, np.asarray(said["score"]))
    np.testing.assert_allclose(metrics["objective/scores"], scores.mean(), rtol=1e-6)
    np.testing.assert_allclose([stats.count, stats.mean], [16, scores.mean()], rtol=1e-6)
    assert metrics["response/truncated"] == truncated.mean() and metrics["val/num_eos_tokens"] == (~truncated).sum()


def test_experience_is_whitened_over_all_of_it_and_0_off_the_mask(world):
    experience = world.experience()[0]
    mask, gains = np.asarray(experience.mask), np.asarray(experience.advantages)
    assert abs(gains[mask].mean()) < 1e-6 and abs(gains[mask].std() - 1) < 1e-4 and not gains[~mask].any()


def test_the_experience_is_the_papers_by_hand(world):
    """Rewards, GAE and returns of each response from the four roles' figures, in numpy."""
    p, mask = world.config.ppo, np.asarray(world.sampled.mask)
    experience, _, _, said = world.experience()
    scores = np.where(np.asarray(world.sampled.truncated), p.truncated_score, np.asarray(said["score"]))
    values = np.asarray(experience.old_values)
    for row in range(16):
        n = mask[row].sum()
        rewards = np.zeros(n)
        rewards[-1] = scores[row] - scores.mean()  # KL is 0 here, and the running mean is this batch's
        gain, gains = 0.0, np.zeros(n)
        for t in reversed(range(n)):
            following = values[row, t + 1] if t + 1 < n else 0.0
            gain = rewards[t] + p.gamma * following - values[row, t] + p.gamma * p.lam * gain
            gains[t] = gain
        np.testing.assert_allclose(np.asarray(experience.returns)[row, :n], gains + values[row, :n], atol=1e-5)


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, 96, (4, 11)).astype(np.int32)
    mask = (rng.random((4, 11)) < 0.7).astype(np.int32)
    return {"tokens": tokens, "mask": mask, "segments": np.ones_like(tokens)}


def test_the_pretraining_gradient_is_added_with_its_coefficient(world, text):
    mine = World(make(pretrain_coef=0.25, pretrain_ratio=0.5))
    policy, rows = mine.params["policy"], np.arange(8)
    both, metrics = mine.gradients(policy, rows, text)
    alone, _ = world.gradients(policy, rows)
    weighted = lm.weighted(jax.tree.map(jnp.asarray, text))
    pretrain = jax.jit(jax.grad(lambda params: lm.loss_fn(mine.config.model, params, weighted)[0]))(policy)
    close(both, jax.tree.map(lambda a, b: a + 0.25 * b, alone, pretrain), 1e-5)
    norm = lambda tree: np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(tree)))
    np.testing.assert_allclose(metrics["pretrain/grad_norm_ratio"], 0.25 * norm(pretrain) / norm(alone), rtol=1e-4)


def test_microbatches_change_nothing(world, text):
    c = make(pretrain_coef=0.25, pretrain_ratio=0.5, epochs=1)
    c.optimiser.eps = c.value_optimiser.eps = 1e-3  # so that Adam does not blow up the rounding of a gradient near 0
    results = []
    for c.microbatches in (1, 4):
        mine = World(c)
        results.append(mine.learn(text=lambda number: text))
    (one, one_metrics), (four, four_metrics) = results
    close(one["policy"].params, four["policy"].params, 1e-4)
    close(one["value"].params, four["value"].params, 1e-4)
    close(one_metrics, four_metrics, 1e-3)


def test_the_self_check_stops_at_each_fault_with_its_figure(world):
    def check(params=world.params, programs=world.programs):
        ppo.self_check(world.config, programs, params, RunningStats.zero(), world.sampled, None)

    check()
    moved = jax.tree.map(lambda x: x * 1.01, world.params["policy"])
    with pytest.raises(UserError, match=r"self-check at step 0: the largest KL .* is 0\.\d+"):
        check({**world.params, "reference": moved})

    def drifting(params, experience, rows, text):
        return world.programs.gradients(moved, experience, rows, text)

    with pytest.raises(UserError, match="ratio - 1"):
        check(programs=world.programs._replace(gradients=drifting))

    def reads_pads(params, stats, sampled):
        *rest, said = world.programs.experience(params, stats, sampled)
        return *rest, said | {"score": said["score"] + sampled.segments[:, -1] * jnp.float32(0.5)}

    with pytest.raises(UserError, match="as pads move is 0.5"):
        check(programs=world.programs._replace(experience=reads_pads))
