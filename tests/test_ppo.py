"""PPO's step, part by part: ratio, KL, packing, warm-up, pretraining gradient must be exact."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from test_models import tiny, words

from alignjax import config as configs
from alignjax.algorithms import experience as experience_module
from alignjax.algorithms import lm, optimisation, ppo_programs
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.experience import Minibatches, Reading, pack_minibatch
from alignjax.algorithms.ppo import PPO, updates_of_step
from alignjax.algorithms.ppo_checks import CHECKED_RESPONSES
from alignjax.config import UserError
from alignjax.data import encoding, packing
from alignjax.machine import sharding
from alignjax.machine.profile import Compilations
from alignjax.models import scoring, transformer
from alignjax.sampling.types import Prompts, Rollout
from alignjax.weights import roles

END = 3
RESPONSE_LENGTH = 6
PROMPT_WIDTH = 5
MESH = jax.make_mesh(
    (1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
)
FIRST_MINIBATCH = np.arange(0, 16, 2)  # its responses
PROMPT_LENGTHS = np.random.default_rng(3).integers(2, 6, 8).astype(np.int32)
TOKEN_FIGURES = ("old_logprobs", "old_values", "advantages", "returns")  # of an experience


def make(budget=4096, dtype="float32", **changes):
    """Return a config of 8 prompts x 2 responses x 6 tokens in two minibatches.

    `changes` go to its PPO group.
    """
    config = configs.load("ppo.py:tiny")
    config.model = tiny(dtype=dtype)[0]
    config.microbatch_tokens = budget
    config.steps = 25  # 100 updates
    config.data.batch = 8
    config.data.max_length = PROMPT_WIDTH
    config.ppo = dataclasses.replace(
        config.ppo,
        response_length=RESPONSE_LENGTH,
        minibatches=2,
        epochs=2,
        value_warmup_steps=0,
        top_p=1.0,
        pretrain_coef=0.25,
        pretrain_ratio=0.5,
    )
    config.ppo = dataclasses.replace(config.ppo, **changes)
    for optimiser in (config.optimiser, config.value_optimiser):
        optimiser.learning_rate = 1e-2
        # So that Adam does not amplify the rounding of a gradient near 0.
        optimiser.eps = 1e-3
    return config


@functools.cache
def programs_of(temperature, dtype):
    """Return the compiled functions of every World: budget and warm-up are no part of them."""
    return PPO(make(temperature=temperature, dtype=dtype), MESH, end_tokens=(END,)).compiled


def prompt_batch() -> Prompts:
    """Return eight prompts of 2 to 5 tokens."""
    real = np.arange(PROMPT_WIDTH) >= PROMPT_WIDTH - PROMPT_LENGTHS[:, None]
    tokens = np.where(real, words(4, 8, PROMPT_WIDTH), 0).astype(np.int32)
    return Prompts(tokens=tokens, lengths=PROMPT_LENGTHS, index=np.arange(8, dtype=np.int32))


@functools.cache
def sampled_by(temperature, slots):
    """Return responses to the prompts by the policy of every World."""
    stage = PPO(make(temperature=temperature, slots=slots), MESH, end_tokens=(END,))
    return stage.compiled.responder.sample(tiny(0)[1], prompt_batch(), jax.random.key(0))


class World:
    """A stage with roles of random parameters; policy and reference are equal, not the same."""

    def __init__(self, config, compiled=None):
        self.config = config
        self.stage = PPO(config, MESH, end_tokens=(END,))
        # Compiled once for all Worlds of these settings.
        self.stage.compiled = compiled or programs_of(config.ppo.temperature, config.model.dtype)
        self.stage.text = SimpleNamespace(microbatches=lambda update: [])
        seeds = {
            "policy": (0, "lm"),
            "reference": (0, "lm"),
            "value": (1, "scalar"),
            "reward": (2, "scalar"),
        }
        self.params = {
            role: jax.tree.map(jnp.asarray, tiny(seed, head)[1])
            for role, (seed, head) in seeds.items()
        }
        optimisers = {
            "policy": self.stage.trained.policy_optimiser,
            "value": self.stage.trained.value_optimiser,
        }
        self.state = {"stats": RunningStats.zero()}
        if not configs.has_value(config):
            del self.params["value"]
        for role in configs.trained_roles(config):
            params = jax.tree.map(jnp.copy, self.params[role])
            self.state[role] = optimisation.init_state(params, optimisers[role])
        self.rollout = sampled_by(config.ppo.temperature, config.ppo.slots)
        self.prompt_lengths = np.repeat(PROMPT_LENGTHS, 2)

    @functools.cached_property
    def minibatches(self):
        lengths = np.asarray(self.rollout.lengths)
        return Minibatches(self.config, MESH, self.prompt_lengths, lengths)

    def score(self, params=None, rollout=None):
        """Return the rollout scored by the roles."""
        return self.stage.score(
            params or self.params,
            self.state,
            rollout or self.rollout,
            self.minibatches,
        )

    @functools.cached_property
    def scored(self):
        return self.score()

    @property
    def experience(self):
        return self.scored.experience

    def pack(self, responses, row_shards=1):
        """Return the microbatches of some responses."""
        lengths = np.asarray(self.rollout.lengths)
        return pack_minibatch(
            self.config, self.prompt_lengths, lengths, np.asarray(responses), row_shards
        )

    def policy_gradient(self, params, responses):
        """Return the gradient and metrics of the policy's objective on a minibatch."""
        parts = [(self.experience, microbatch) for microbatch in self.pack(responses)]
        return self.stage.compiled.policy_gradient(params, parts)

    def learn(self, text=None, learning_rate=None):
        """Take the updates of a step from a copy of the initial state."""
        state = jax.tree.map(jnp.copy, self.state)
        stage = self.stage
        if text or learning_rate:
            stage = PPO(self.config, MESH, end_tokens=(END,))
            rate = learning_rate or self.stage.compiled.learning_rate
            stage.compiled = dataclasses.replace(self.stage.compiled, learning_rate=rate)
            stage.text = SimpleNamespace(microbatches=text or (lambda update: []))
        return stage.learn(state, self.experience, self.minibatches, step=0)


@pytest.fixture(scope="module")
def world():
    return World(make())


@pytest.fixture(scope="module")
def packed_world():
    """Return a World whose minibatches of eight responses have some eight microbatches."""
    return World(make(budget=16))


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


def figures_of_tokens(experience) -> dict:
    """Return the figures of an experience that its updates read, without the rollout."""
    return {name: getattr(experience, name) for name in TOKEN_FIGURES}


def masked(experience) -> dict:
    """Return the figures of real tokens: what stands after a response's end has no meaning."""
    mask = np.asarray(experience.rollout.mask)
    figures = figures_of_tokens(experience)
    return {name: np.asarray(array)[mask] for name, array in figures.items()}


@pytest.mark.parametrize("temperature, budget", [(1.0, 16), (0.7, 4096)])
def test_before_an_update_the_ratio_is_1_and_the_kl_0(temperature, budget):
    """At any temperature. One program scores both, so the KL is 0 to the bit.

    The program of the gradient may round differently.
    """
    world = World(make(budget, temperature=temperature))
    scored = world.scored
    assert scored.metrics["objective/kl"] == 0
    assert not np.asarray(scored.responses["kl"]).any()
    for minibatch in world.minibatches.first_epoch:
        parts = [(scored.experience, microbatch) for microbatch in minibatch]
        metrics = world.stage.compiled.policy_gradient(world.params["policy"], parts).metrics
        assert metrics["val/ratio_var"] < 1e-12
        assert abs(metrics["val/ratio"] - 1) < 1e-6
        assert metrics["policy/clipfrac_avg"] == 0
        assert metrics["policy/approxkl_avg"] < 1e-7


def test_the_scorer_reads_the_very_microbatches_of_the_first_epoch(world, packed_world):
    """The first updates read the arrays that the old log-probabilities come from."""
    for each in (world, packed_world):
        first_epoch = each.minibatches.first_epoch
        updates = list(updates_of_step(each.config, 0))
        assert len(first_epoch) == 2
        for place, minibatch in enumerate(first_epoch):
            responses = updates[place].responses
            assert equal(minibatch, jax.tree.map(jnp.asarray, each.pack(responses)))
            assert each.minibatches.get(place, responses) is minibatch


def test_the_ratio_moves_and_the_clip_binds_in_the_second_epoch(world):
    state, metrics = world.learn()
    assert metrics["val/ratio_var"] > 0
    assert metrics["policy/clipfrac_avg"] > 0
    assert metrics["policy/approxkl_avg"] > 0
    assert int(state["policy"].updates) == int(state["value"].updates) == 4


def test_old_logprobs_stay_those_of_the_rollout(world):
    """A policy that has moved is compared with the experience, which does not move with it."""
    before = jax.tree.map(np.array, world.experience)
    moved = jax.tree.map(lambda x: x + 0.05, world.params["policy"])
    assert world.policy_gradient(moved, FIRST_MINIBATCH).metrics["val/ratio_var"] > 1e-3
    world.learn()
    assert equal(before, world.experience)
    assert equal(before, world.score().experience)


@pytest.mark.parametrize("warmup, updates", [(4, 0), (3, 1), (0, 4)])
def test_warm_up_leaves_the_policy_alone_for_exactly_so_many_updates(warmup, updates):
    """A step has four updates. The policy's schedule starts with its first update."""
    world = World(make(value_warmup_steps=warmup))
    rate_arguments = []
    text_updates = []

    def learning_rate(count):
        rate_arguments.append(int(count))
        return float(count)

    def text(update):
        text_updates.append(update)
        return []

    state, metrics = world.learn(text, learning_rate)
    assert int(state["policy"].updates) == updates
    assert rate_arguments == list(range(updates))
    # The pretraining text of an update is that of its number in the run.
    assert text_updates == list(range(warmup, 4))
    assert int(state["value"].updates) == 4
    assert equal(state["policy"], world.state["policy"]) == (updates == 0)
    assert ("loss/policy_avg" in metrics) == (updates > 0)
    assert not equal(state["value"].params, world.state["value"].params)


def test_the_50_updates_of_the_report_are_50():
    config = make(value_warmup_steps=50)
    numbers = [update.number for step in range(20) for update in updates_of_step(config, step)]
    assert numbers == list(range(80))
    assert sum(number < 50 for number in numbers) == 50
    assert configs.load("qwen_1_8b/ppo.py").ppo.value_warmup_steps == 50


def test_each_epoch_has_its_own_order_and_a_rerun_the_same(world):
    def orders(step):
        responses = [update.responses for update in updates_of_step(world.config, step)]
        return np.concatenate(responses[:2]).tolist(), np.concatenate(responses[2:]).tolist()

    first, second = orders(step=0)
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
    assert orders(step=1)[1] != second
    assert orders(step=1) == orders(step=1)


def test_reference_and_reward_are_the_same_after_updates(world):
    before = {role: jax.tree.map(np.array, world.params[role]) for role in ("reference", "reward")}
    state, _ = world.learn()
    assert all(equal(before[role], world.params[role]) for role in before)
    assert not equal(state["policy"].params, before["reference"])

    def buffers(params):
        return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}

    assert not buffers(world.params["reference"]) & buffers(world.state["policy"].params)


def test_a_truncated_response_gets_its_own_score_in_place_of_the_models(world):
    truncated = np.asarray(world.rollout.truncated)
    assert 0 < truncated.sum() < 16
    scored = world.scored
    model_scores = np.asarray(scored.responses["score"])
    scores = np.where(truncated, world.config.ppo.truncated_score, model_scores)
    np.testing.assert_allclose(scored.metrics["objective/scores"], scores.mean(), rtol=1e-6)
    statistics = [scored.stats.count, scored.stats.mean]
    np.testing.assert_allclose(statistics, [16, scores.mean()], rtol=1e-6)
    assert scored.metrics["response/truncated"] == truncated.mean()
    assert scored.metrics["val/num_eos_tokens"] == (~truncated).sum()


def test_experience_is_whitened_over_all_of_it_and_0_off_the_mask(world, packed_world):
    """Over all responses, not over those of a microbatch or minibatch."""
    for each in (world, packed_world):
        mask = np.asarray(each.rollout.mask)
        advantages = np.asarray(each.experience.advantages)
        assert abs(advantages[mask].mean()) < 1e-6
        assert abs(advantages[mask].std() - 1) < 1e-4
        assert not advantages[~mask].any()


def test_the_experience_is_the_papers_by_hand(world):
    """Rewards, GAE and returns of each response from the readings of the roles, in numpy."""
    ppo = world.config.ppo
    mask = np.asarray(world.rollout.mask)
    truncated = np.asarray(world.rollout.truncated)
    scores = np.asarray(world.scored.responses["score"])
    scores = np.where(truncated, ppo.truncated_score, scores)
    values = np.asarray(world.experience.old_values)
    for row in range(16):
        length = mask[row].sum()
        rewards = np.zeros(length)
        # The KL is 0 here, and the running mean is that of this batch.
        rewards[-1] = scores[row] - scores.mean()
        advantage = 0.0
        advantages = np.zeros(length)
        for place in reversed(range(length)):
            next_value = values[row, place + 1] if place + 1 < length else 0.0
            delta = rewards[place] + ppo.gamma * next_value - values[row, place]
            advantage = delta + ppo.gamma * ppo.lam * advantage
            advantages[place] = advantage
        returns = np.asarray(world.experience.returns)[row, :length]
        np.testing.assert_allclose(returns, advantages + values[row, :length], atol=1e-5)


@pytest.fixture(scope="module")
def text():
    """Return budget -> microbatches of four rows of text."""
    mask = (np.random.default_rng(5).random((4, 11)) < 0.7).astype(np.int32)
    rows = {
        "tokens": words(6, 4, 11).astype(np.int32),
        "mask": mask,
        "segments": np.ones((4, 11), np.int32),
    }
    return lambda budget: lm.pack_minibatch(rows, budget, 1)


def test_the_pretraining_gradient_is_added_with_its_coefficient(world, text):
    """By an optimiser whose state is the gradient that it was given."""

    def keep_gradient(gradient, *_, applied):
        return optax.tree.zeros_like(gradient), gradient

    recorder = optax.GradientTransformation(lambda params: params, keep_gradient)
    config = world.config
    state = optimisation.init_state(world.params["policy"], recorder)
    assert config.ppo.pretrain_coef == 0.25
    alone = world.policy_gradient(state.params, FIRST_MINIBATCH)
    (batch,) = text(4096)
    text_loss = jax.jit(
        jax.value_and_grad(lambda params: lm.loss_fn(config.model, params, batch)[0])
    )
    loss, pretraining = text_loss(state.params)
    total = world.stage.compiled.text_gradient(state.params, text(4096))
    step = jax.jit(functools.partial(ppo_programs.update_policy, config, recorder))
    new, metrics = step(state, alone, total)
    expected = jax.tree.map(lambda a, b: a + 0.25 * b, alone.gradient, pretraining)
    assert_close(new.opt_state, expected, 1e-5)
    assert int(new.updates) == 1
    assert equal(new.params, state.params)

    def norm(tree):
        return np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(tree)))

    ratio = 0.25 * norm(pretraining) / norm(alone.gradient)
    np.testing.assert_allclose(metrics["pretrain/grad_norm_ratio"], ratio, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/pretrain_avg"], loss, rtol=1e-5)
    new, _ = step(state, alone, None)
    assert equal(new.opt_state, alone.gradient)


def results(world, text):
    """Return all that a step gives: (figures that round, parameters)."""
    scored = world.scored
    state, metrics = world.learn(text=lambda update: text(world.config.microbatch_tokens))
    figures = {
        "experience": masked(scored.experience),
        "stats": scored.stats,
        "metrics": scored.metrics | metrics,
        "responses": scored.responses,
    }
    return figures, {role: state[role].params for role in ("policy", "value")}


@pytest.fixture(scope="module")
def whole(world, text):
    """Return the `results` of minibatches in one microbatch each."""
    return results(world, text)


def test_microbatches_change_nothing(whole, text):
    world = World(make(16))
    assert len(world.minibatches.first_epoch[0]) > 1
    figures, params = results(world, text)
    assert_close(figures, whole[0], 1e-3)
    assert_close(params, whole[1], 1e-4)


@pytest.mark.parametrize("budget, shards", [(16, 1), (40, 1), (64, 1), (4096, 1), (64, 4)])
@pytest.mark.parametrize("responses", [range(16), range(1, 16, 2), (11, 2, 7), (5,)])
def test_every_token_of_a_response_is_read_once_and_its_figure_comes_back(
    world, budget, shards, responses
):
    """Each token gets a number, 100 x response + place, which is followed there and back."""
    responses = np.asarray(responses)
    count = len(responses)
    lengths = np.asarray(world.rollout.lengths)
    sizes = world.prompt_lengths + lengths
    back = np.full((16, RESPONSE_LENGTH), -1)
    last = np.full(16, -1)
    total = 0.0
    config = make(budget)
    for part in pack_minibatch(config, world.prompt_lengths, lengths, responses, shards):
        assert len(part.sequence) % shards == 0
        assert part.sequence.shape == part.place.shape
        number = np.where(part.sequence >= 0, 100 * part.sequence + part.place, -1)
        target = packing.at_targets(number, part.targets)
        before = packing.at_targets(number, np.maximum(part.targets - 1, 0))
        real = part.weights > 0
        assert (before[real] == target[real] - 1).all()  # a target follows a token of its own
        assert np.allclose(part.weights[real], 1 / lengths[responses].sum(), rtol=1e-6)
        total += part.weights.sum()
        assert part.members.shape == part.ends.shape == (count,)
        assert part.source.shape == (count, RESPONSE_LENGTH)
        for member, end, source in zip(part.members, part.ends, part.source, strict=True):
            if member < 16:
                assert last[member] == -1  # a response is a member of one microbatch
                last[member] = number.reshape(-1)[end]
                back[member] = target.reshape(-1)[source]
        in_rows = set(part.sequence[part.sequence >= 0])
        assert sorted(part.members[part.members < 16]) == sorted(in_rows)
    assert abs(total - 1) < 1e-6
    for i in range(16):
        inside = 100 * i + world.prompt_lengths[i] + np.arange(lengths[i])
        expected = inside.tolist() if i in responses else [-1] * lengths[i]
        assert back[i, : lengths[i]].tolist() == expected
        assert last[i] == (100 * i + sizes[i] - 1 if i in responses else -1)


@pytest.fixture(scope="module")
def one_by_one(world):
    """Return the readings of each response from its own tokens, with nothing else in the row."""
    model = world.config.model
    params = world.params
    tokens = np.asarray(world.rollout.tokens)
    lengths = np.asarray(world.rollout.lengths)
    width = PROMPT_WIDTH + RESPONSE_LENGTH

    @jax.jit
    def read_alone(tokens, length):
        segments = (jnp.arange(width) < length).astype(jnp.int32)[None]
        places = jnp.arange(width)[None]

        def hidden(role):
            return transformer.apply(model, params[role], tokens[None], places, segments)[0][0]

        logits = transformer.logits(model, params["policy"], hidden("policy"))
        return jax.nn.log_softmax(logits), transformer.scalar(params["value"], hidden("value"))

    score = jax.jit(functools.partial(scoring.score_alone, model))
    readings = []
    for i in range(16):
        prompt = world.prompt_lengths[i]
        length = lengths[i]
        row = np.zeros(width, np.int32)
        row[: prompt + length] = tokens[i, PROMPT_WIDTH - prompt : PROMPT_WIDTH + length]
        logprobs, values = map(np.asarray, read_alone(row, prompt + length))
        before = np.arange(prompt - 1, prompt - 1 + length)
        entropy = -(np.exp(logprobs) * logprobs).sum(1)
        own_logprobs = logprobs[before, row[before + 1]]
        readings.append(
            Reading(
                logprobs=own_logprobs,
                entropy=entropy[before],
                ref_logprobs=own_logprobs,
                values=values[before],
                scores={
                    "reward": score(params["reward"], row[None], np.array([prompt + length]))[0]
                },
            )
        )
    return readings


@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_a_reading_is_each_responses_own(world, one_by_one, budget):
    packed = World(make(budget))
    tokens = jnp.full((16, RESPONSE_LENGTH), -7.0)
    names = ("logprobs", "entropy", "ref_logprobs", "values")
    reading = Reading(
        **{name: tokens.copy() for name in names}, scores={"reward": tokens[:, 0].copy()}
    )
    for microbatch in packed.pack(FIRST_MINIBATCH):
        reading = packed.stage.compiled.read(packed.params, packed.rollout, reading, microbatch)
    for i, alone in enumerate(one_by_one):
        length = len(alone.logprobs)
        if i not in FIRST_MINIBATCH:  # left as it was
            assert (np.asarray(reading.values)[i] == -7).all()
            assert reading.scores["reward"][i] == -7
            continue
        for name in names:
            figures = np.asarray(getattr(reading, name))[i, :length]
            np.testing.assert_allclose(figures, getattr(alone, name), atol=2e-5)
        np.testing.assert_allclose(reading.scores["reward"][i], alone.scores["reward"], atol=2e-5)


def test_tokens_before_a_prompt_and_after_an_end_are_never_read(packed_world):
    """Other tokens there, the end token among them, change nothing, to the bit."""
    rollout = packed_world.rollout
    real = np.asarray(rollout.segments) > 0
    assert (~real[:, :PROMPT_WIDTH]).any()
    assert (~real[:, PROMPT_WIDTH:]).any()
    width = PROMPT_WIDTH + RESPONSE_LENGTH
    garbage = jnp.where(words(7, 16, width) < 48, END, 90)
    other = dataclasses.replace(rollout, tokens=jnp.where(real, rollout.tokens, garbage))
    assert not equal(other.tokens, rollout.tokens)
    scored = packed_world.score(rollout=other)
    for name in ("stats", "metrics", "responses"):
        assert equal(getattr(scored, name), getattr(packed_world.scored, name))
    assert equal(figures_of_tokens(scored.experience), figures_of_tokens(packed_world.experience))
    policy = packed_world.params["policy"]
    parts = [(scored.experience, part) for part in packed_world.pack(FIRST_MINIBATCH)]
    gradient = packed_world.stage.compiled.policy_gradient
    total = gradient(policy, parts)
    assert equal(total, packed_world.policy_gradient(policy, FIRST_MINIBATCH))


def test_what_stands_after_an_end_in_the_experience_is_never_learned_from(packed_world):
    """With 99 there in all figures, the gradients of both losses are the same."""
    mask = packed_world.rollout.mask
    plain = packed_world.experience
    marred = dataclasses.replace(
        plain,
        **{name: jnp.where(mask, array, 99.0) for name, array in figures_of_tokens(plain).items()},
    )
    compiled = packed_world.stage.compiled
    microbatches = packed_world.pack(FIRST_MINIBATCH)
    for role, gradient in (
        ("policy", compiled.policy_gradient),
        ("value", compiled.value_gradient),
    ):
        totals = [
            gradient(
                packed_world.params[role],
                [(experience, microbatch) for microbatch in microbatches],
            )
            for experience in (plain, marred)
        ]
        assert equal(totals[0], totals[1])


def test_slots_give_the_same_experience(world):
    """Responses do not depend, to the bit, on the slot they were decoded in; nor do readings."""
    with_slots = World(make(slots=6))
    for field in dataclasses.fields(Rollout):
        if field.name != "logprobs":
            ours = getattr(with_slots.rollout, field.name)
            assert np.array_equal(ours, getattr(world.rollout, field.name))
    np.testing.assert_allclose(with_slots.rollout.logprobs, world.rollout.logprobs, atol=1e-5)
    scored = with_slots.scored
    assert equal(figures_of_tokens(scored.experience), figures_of_tokens(world.experience))
    assert equal(scored.stats, world.scored.stats)
    assert equal(scored.responses, world.scored.responses)
    metrics = scored.metrics
    differing = {name for name in metrics if metrics[name] != world.scored.metrics[name]}
    assert differing <= {"sampler/drift_mean", "sampler/drift_max"}
    assert metrics["sampler/drift_max"] < 1e-5


def test_a_step_over_shapes_that_have_been_seen_compiles_nothing(packed_world):
    packed_world.learn()
    with Compilations() as compilations:
        packed_world.score()
        packed_world.learn()
    assert compilations.programs == []


def kinds(params) -> set:
    return {(str(x.dtype), x.sharding.memory_kind) for x in jax.tree.leaves(params)}


def freeze(world, dtype="", memory="device"):
    """Return the roles with the two that are only read as a run keeps them."""
    return {
        role: roles.freeze(world.config.model, params, dtype, memory)
        if role in ("reference", "reward")
        else params
        for role, params in world.params.items()
    }


def test_frozen_parameters_may_be_in_the_hosts_memory(packed_world):
    """Every reading of them is the same to the bit."""
    params = freeze(packed_world, memory="host")
    assert kinds(params["reference"]) == kinds(params["reward"]) == {("float32", "pinned_host")}
    on_device = {("float32", "device")}
    assert kinds(params["policy"]) == on_device
    assert kinds(freeze(packed_world)["reference"]) == on_device
    assert equal(packed_world.score(params), packed_world.scored)


def test_frozen_parameters_that_are_rounded_read_the_same_to_the_bit():
    """Only matrices are rounded, and by the function that rounds them where they are used."""
    world = World(make(dtype="bfloat16"))
    params = freeze(world, "bfloat16")
    rounded = {("bfloat16", "device"), ("float32", "device")}
    assert kinds(params["reference"]) == kinds(params["reward"]) == rounded
    assert kinds(world.params["policy"]) == {("float32", "device")}
    assert equal(world.score(params), world.scored)
    assert not np.asarray(world.scored.responses["kl"]).any()


def test_an_estimator_without_a_value_model_learns_by_comparing_responses():
    """No value is read, trained or kept, and no update waits for a warm-up."""
    changes = {"value_warmup_steps": 50, "whiten_advantages": False}
    config = make(
        advantage_estimator="dr_grpo", kl_in="loss", kl_estimator="k3", kl_coef=0.1, **changes
    )
    world = World(config, PPO(config, MESH, end_tokens=(END,)).compiled)
    made = world.experience
    assert made.old_values is None and made.returns is None
    assert "value/explained_variance" not in world.scored.metrics
    truncated = np.asarray(world.rollout.truncated)
    scores = np.asarray(world.scored.responses["score"])
    scores = np.where(truncated, config.ppo.truncated_score, scores).reshape(-1, 2)
    expected = (scores - scores.mean(1, keepdims=True)).reshape(-1, 1) * np.asarray(
        world.rollout.mask
    )
    np.testing.assert_allclose(made.advantages, expected, atol=1e-5)
    equal_groups = (scores[:, 0] == scores[:, 1]).mean()
    assert world.scored.metrics["objective/frac_zero_std"] == equal_groups < 1
    world.stage.check(world.params, world.scored, world.minibatches)
    state, metrics = world.learn()
    assert set(state) == {"policy", "stats"}
    assert int(state["policy"].updates) == 4
    assert not any(name.startswith(("value/", "loss/value", "val/clip")) for name in metrics)
    # Policy and reference are equal before the first update, and differ after it.
    assert metrics["loss/kl_avg"] > 0
    # What is planned is what is called.
    abstract = dataclasses.replace(world.stage.resident()["experience"], rollout=made.rollout)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, made)
    # Losses can be computed again from the arrays of a skipped step.
    again = experience_module.from_host(experience_module.on_host(world.scored))
    assert equal(again, made)


def test_the_self_check_stops_at_each_fault_with_its_figure(world):
    scored = world.scored

    def check(params=world.params, compiled=world.stage.compiled, scored=scored):
        stage = PPO(world.config, MESH, end_tokens=(END,))
        stage.compiled = compiled
        stage.check(params, scored, world.minibatches)

    check()
    moved = jax.tree.map(lambda x: x * 1.01, world.params["policy"])
    other = {**world.params, "reference": moved}
    with pytest.raises(UserError, match=r"self-check at step 0: the largest KL .* is \d*\.\d+"):
        other_kl = world.score(other).responses
        check(other, scored=dataclasses.replace(scored, responses=other_kl))

    def drifting(params, parts, base):
        return world.stage.compiled.policy_gradient(moved, parts, base)

    with pytest.raises(UserError, match="ratio - 1"):
        check(compiled=dataclasses.replace(world.stage.compiled, policy_gradient=drifting))
    scores = scored.scores["reward"].at[CHECKED_RESPONSES - 1].add(0.5)
    wrong_score = dataclasses.replace(scored, scores={"reward": scores})
    with pytest.raises(UserError, match="when its row's pads and neighbours change is 0.5"):
        check(scored=wrong_score)


def test_the_self_check_stops_if_the_sequences_of_a_row_see_each_other(monkeypatch):
    """The one fault that ratio and KL cannot show, as both sides of them would have it."""
    pack_tokens = experience_module.pack_tokens

    def leaking(rollout, microbatch):
        packed = pack_tokens(rollout, microbatch)
        return dataclasses.replace(packed, segments=jnp.minimum(packed.segments, 1))

    monkeypatch.setattr(experience_module, "pack_tokens", leaking)
    world = World(make(budget=64), programs_of.__wrapped__(1.0, "float32"))
    assert world.scored.metrics["objective/kl"] == 0
    with pytest.raises(UserError, match=r"pads and neighbours change is \d*\.\d+"):
        world.stage.check(world.params, world.scored, world.minibatches)


def test_prompts_are_cut_to_the_longest_of_their_batch():
    """To one of few widths; what is cut off are pads."""
    rows = {
        "prompts": np.arange(1, 41)[None].repeat(2, 0),
        "lengths": np.array([3, 9]),
        "index": np.arange(2),
    }
    narrow = encoding.narrowed(rows)
    # Of the widths 8, 16, 24 and 40, the first that holds 9 tokens.
    assert narrow["prompts"].tolist() == [list(range(25, 41))] * 2
    assert equal(
        {name: array for name, array in narrow.items() if name != "prompts"},
        {name: array for name, array in rows.items() if name != "prompts"},
    )
    wide = encoding.narrowed(rows | {"lengths": np.array([40, 1])})
    assert wide["prompts"].shape == (2, 40)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_rollout_in_a_layout_of_its_own_gives_the_same_samples():
    """Training over fsdp, sampling over data and tensor: the same tokens on training's mesh."""
    rollouts = {}
    prompts = prompt_batch()
    batch = {"prompts": prompts.tokens, "lengths": prompts.lengths, "index": prompts.index}
    mesh = sharding.make_mesh(configs.Mesh(fsdp=8))
    for tensor in (0, 2):
        with jax.set_mesh(mesh):
            stage = PPO(make(slots=8, rollout_tensor=tensor), mesh, end_tokens=(END,))
            params = jax.tree.map(
                lambda x, s: jax.device_put(x, s.sharding),
                tiny(0)[1],
                stage.abstract_state["policy"].params,
            )
            rollouts[tensor] = stage.compiled.responder.respond(params, batch, 3)
        if tensor:
            placed = stage.compiled.responder.place_params(params)
            kernel = placed["layers"]["mlp"]["gate"]["kernel"].sharding
            assert dict(kernel.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
            assert kernel.spec[2] == "tensor"
    plain = rollouts[0]
    own = rollouts[2]
    assert dict(own.tokens.sharding.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert np.array_equal(plain.tokens, own.tokens)
    assert np.array_equal(plain.lengths, own.lengths)
    np.testing.assert_allclose(plain.logprobs, own.logprobs, atol=1e-5)


def test_devices_that_a_layout_does_not_divide_are_named():
    with pytest.raises(UserError, match="ppo.rollout_tensor=3 must divide the 1 devices"):
        sharding.with_tensor(MESH, 3)
