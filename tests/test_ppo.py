"""PPO's step, part by part: what must be exact about the ratio, the KL, the packing, the warm-up, the pretraining gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from test_models import tiny, words

from alignjax import config as configs
from alignjax.algorithms import experience as experience_module
from alignjax.algorithms import lm, optimisation, ppo
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.experience import Experience, Reading, microbatches
from alignjax.config import UserError
from alignjax.data import encoding
from alignjax.machine import sharding
from alignjax.machine.profile import Compilations
from alignjax.models import scoring, transformer
from alignjax.weights import roles

END, R = 3, 6
MESH = jax.make_mesh(
    (1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
)
ROWS = np.arange(0, 16, 2)  # of the first minibatch
PROMPT_LENGTHS = np.random.default_rng(3).integers(2, 6, 8).astype(np.int32)


def make(budget=4096, dtype="float32", **changes):
    """A config of 8 prompts x 2 responses x 6 tokens in two minibatches; `changes` go to its ppo part."""
    c = configs.load("ppo.py:tiny")
    c.model, c.microbatch_tokens = tiny(dtype=dtype)[0], budget
    c.data.batch, c.data.max_length = 8, 5
    c.ppo = dataclasses.replace(
        c.ppo,
        response_length=R,
        minibatches=2,
        epochs=2,
        value_warmup_steps=0,
        top_p=1.0,
        pretrain_coef=0.25,
        pretrain_ratio=0.5,
    )
    c.ppo = dataclasses.replace(c.ppo, **changes)
    c.optimiser.learning_rate = c.value_optimiser.learning_rate = 1e-2
    c.optimiser.eps = c.value_optimiser.eps = (
        1e-3  # so that Adam does not blow up the rounding of a gradient near 0
    )
    return c


def optimisers_of(config):
    return {
        "policy": optimisation.make_optimiser(config.optimiser, 100),
        "value": optimisation.make_optimiser(config.value_optimiser, 100),
    }


@functools.cache
def programs_of(temperature, dtype):
    """The compiled functions of every World of these: budget, slots and warm-up are no part of them, but of `sample`."""
    config = make(temperature=temperature, dtype=dtype)
    return ppo.compiled(config, optimisers_of(config), END)


@functools.cache
def sampled_by(temperature, slots):
    """Responses to eight prompts of 2 to 5 tokens, by the policy of every World."""
    config = make(temperature=temperature, slots=slots)
    prompts = np.where(np.arange(5) >= 5 - PROMPT_LENGTHS[:, None], words(4, 8, 5), 0).astype(
        np.int32
    )
    batch = {"prompts": prompts, "lengths": PROMPT_LENGTHS, "index": np.arange(8, dtype=np.int32)}
    return ppo.compiled(config, optimisers_of(config), END).sample(
        tiny(0)[1], batch, jax.random.key(0)
    )


class World:
    """A config with its programs, and roles of random parameters; policy and reference are equal, not the same."""

    def __init__(self, config, programs=None):
        self.config, optimisers = config, optimisers_of(config)
        self.programs = programs or programs_of(config.ppo.temperature, config.model.dtype)
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
        self.state = {
            role: optimisation.init_state(
                jax.tree.map(jnp.copy, self.params[role]), optimisers[role]
            )
            for role in ("policy", "value")
        } | {"stats": RunningStats.zero()}
        self.sampled = sampled_by(config.ppo.temperature, config.ppo.slots)
        self.prompt_lengths = np.repeat(PROMPT_LENGTHS, 2)

    def score(self, params=None, sampled=None):
        """Experience, statistics, metrics, figures of each response, and the parts of the first epoch's minibatches."""
        found = ppo.score(
            self.config,
            self.programs,
            params or self.params,
            RunningStats.zero(),
            sampled or self.sampled,
            self.prompt_lengths,
            MESH,
        )
        return found[:5]

    @functools.cached_property
    def scored(self):
        return self.score()

    @property
    def experience(self):
        return self.scored[0]

    def parts(self, rows, shards=1):
        lengths = np.asarray(self.sampled.lengths)
        return microbatches(self.config, self.prompt_lengths, lengths, np.asarray(rows), shards)

    def gradients(self, params, rows):
        """Gradient and metrics of the policy's objective on a minibatch."""
        return optimisation.total(
            self.programs.policy_add, params, [(self.experience, part) for part in self.parts(rows)]
        )

    def learn(self, step=0, text=lambda number: [], rate=lambda n: n * 1.0):
        state, first = jax.tree.map(jnp.copy, self.state), self.scored[4]
        return ppo.learn(
            self.config, self.programs, rate, state, self.experience, step, first, self.parts, text
        )


@pytest.fixture(scope="module")
def world():
    return World(make())


@pytest.fixture(scope="module")
def packed_world():
    """A minibatch of eight responses in some eight microbatches."""
    return World(make(budget=16))


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


def masked(experience) -> dict:
    """The experience's arrays where its responses are: what stands behind their ends is of no meaning."""
    mask = np.asarray(experience.sampled.mask)
    return {k: np.asarray(v)[mask] for k, v in experience._asdict().items() if k != "sampled"}


@pytest.mark.parametrize("temperature, budget", [(1.0, 16), (0.7, 4096)])
def test_before_an_update_the_ratio_is_1_and_the_kl_0(temperature, budget):
    """Whatever the temperature. KL is 0 to the bit, as one program scores both; the gradient's program may round apart."""
    mine = World(make(budget, temperature=temperature))
    experience, _, metrics, said, first = mine.scored
    assert metrics["objective/kl"] == 0 and not np.asarray(said["kl"]).any()
    for parts in first:
        _, found = optimisation.total(
            mine.programs.policy_add, mine.params["policy"], [(experience, part) for part in parts]
        )
        assert found["val/ratio_var"] < 1e-12 and abs(found["val/ratio"] - 1) < 1e-6
        assert found["policy/clipfrac_avg"] == 0 and found["policy/approxkl_avg"] < 1e-7


def test_the_scorer_reads_the_very_parts_of_the_first_epoch(world, packed_world):
    """The arrays that the first updates take are those that the old log-probabilities come from, in each layout."""
    for mine in (world, packed_world):
        first = mine.scored[4]
        numbered = list(ppo.minibatches(mine.config, 0))
        assert len(first) == 2
        for parts, (_, rows) in zip(first, numbered, strict=False):
            assert equal(parts, jax.tree.map(jnp.asarray, mine.parts(rows)))


def test_the_ratio_moves_and_the_clip_binds_in_the_second_epoch(world):
    state, metrics = world.learn()
    assert (
        metrics["val/ratio_var"] > 0
        and metrics["policy/clipfrac_avg"] > 0
        and metrics["policy/approxkl_avg"] > 0
    )
    assert int(state["policy"].updates) == int(state["value"].updates) == 4


def test_old_logprobs_stay_those_of_the_rollout(world):
    """A moved policy is measured against the experience, which does not move with it."""
    before = jax.tree.map(np.array, world.experience)
    moved = jax.tree.map(lambda x: x + 0.05, world.params["policy"])
    _, metrics = world.gradients(moved, ROWS)
    assert metrics["val/ratio_var"] > 1e-3
    world.learn()
    assert equal(before, world.experience) and equal(before, world.score()[0])


def test_warm_up_leaves_the_policy_alone_for_exactly_so_many_updates():
    """Three of the four updates of a step: the policy and its optimiser move in the fourth, and its schedule starts."""
    for warmup, updates in ((4, 0), (3, 1), (0, 4)):
        mine = World(make(value_warmup_steps=warmup))
        seen, texts = [], []
        state, metrics = mine.learn(
            rate=lambda n: seen.append(int(n)) or float(n),  # noqa: B023
            text=lambda number: texts.append(number) or [],  # noqa: B023
        )  # noqa: B023
        assert int(state["policy"].updates) == updates and seen == list(range(updates))
        assert texts == list(
            range(warmup, 4)
        )  # the pretraining text of an update is that of its number in the run
        assert int(state["value"].updates) == 4
        untouched = equal(state["policy"], mine.state["policy"])
        assert untouched == (updates == 0)
        assert ("loss/policy_avg" in metrics) == (updates > 0)
        assert not equal(state["value"].params, mine.state["value"].params)


def test_the_50_updates_of_the_report_are_50():
    c = make(value_warmup_steps=50)
    numbers = [number for step in range(20) for number, _ in ppo.minibatches(c, step)]
    assert numbers == list(range(80)) and sum(n < 50 for n in numbers) == 50
    assert configs.load("qwen_1_8b/ppo.py").ppo.value_warmup_steps == 50


def test_each_epoch_has_its_own_order_and_a_rerun_the_same(world):
    one, two, three, four = (rows for _, rows in ppo.minibatches(world.config, 0))
    first, second = np.concatenate([one, two]), np.concatenate([three, four])
    assert sorted(first) == sorted(second) == list(range(16))
    assert list(first) != list(second)
    later = np.concatenate([rows for _, rows in ppo.minibatches(world.config, 1)])
    assert list(later[16:]) != list(second)
    assert all(
        np.array_equal(a[1], b[1])
        for a, b in zip(*(ppo.minibatches(world.config, 1) for _ in "ab"), strict=True)
    )


def test_reference_and_reward_are_the_same_after_updates(world):
    before = {role: jax.tree.map(np.array, world.params[role]) for role in ("reference", "reward")}
    state, _ = world.learn()
    assert all(equal(before[role], world.params[role]) for role in before)
    assert not equal(state["policy"].params, before["reference"])
    pointers = [
        {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
        for tree in (world.params["reference"], world.state["policy"].params)
    ]
    assert not pointers[0] & pointers[1]


def test_a_truncated_response_gets_its_own_score_in_place_of_the_models(world):
    truncated = np.asarray(world.sampled.truncated)
    assert 0 < truncated.sum() < 16
    _, stats, metrics, said, _ = world.scored
    scores = np.where(truncated, world.config.ppo.truncated_score, np.asarray(said["score"]))
    np.testing.assert_allclose(metrics["objective/scores"], scores.mean(), rtol=1e-6)
    np.testing.assert_allclose([stats.count, stats.mean], [16, scores.mean()], rtol=1e-6)
    assert (
        metrics["response/truncated"] == truncated.mean()
        and metrics["val/num_eos_tokens"] == (~truncated).sum()
    )


def test_experience_is_whitened_over_all_of_it_and_0_off_the_mask(world, packed_world):
    """Over all responses, not each microbatch's or minibatch's."""
    for mine in (world, packed_world):
        mask, gains = np.asarray(mine.sampled.mask), np.asarray(mine.experience.advantages)
        assert (
            abs(gains[mask].mean()) < 1e-6
            and abs(gains[mask].std() - 1) < 1e-4
            and not gains[~mask].any()
        )


def test_the_experience_is_the_papers_by_hand(world):
    """Rewards, GAE and returns of each response from the four roles' figures, in numpy."""
    p, mask = world.config.ppo, np.asarray(world.sampled.mask)
    experience, _, _, said, _ = world.scored
    scores = np.where(
        np.asarray(world.sampled.truncated), p.truncated_score, np.asarray(said["score"])
    )
    values = np.asarray(experience.old_values)
    for row in range(16):
        n = mask[row].sum()
        rewards = np.zeros(n)
        rewards[-1] = (
            scores[row] - scores.mean()
        )  # KL is 0 here, and the running mean is this batch's
        gain, gains = 0.0, np.zeros(n)
        for t in reversed(range(n)):
            following = values[row, t + 1] if t + 1 < n else 0.0
            gain = rewards[t] + p.gamma * following - values[row, t] + p.gamma * p.lam * gain
            gains[t] = gain
        np.testing.assert_allclose(
            np.asarray(experience.returns)[row, :n], gains + values[row, :n], atol=1e-5
        )


@pytest.fixture(scope="module")
def text():
    """Microbatches of four rows of text."""
    mask = (np.random.default_rng(5).random((4, 11)) < 0.7).astype(np.int32)
    rows = {
        "tokens": words(6, 4, 11).astype(np.int32),
        "mask": mask,
        "segments": np.ones((4, 11), np.int32),
    }
    return lambda budget: lm.microbatches(rows, budget, 1)


def test_the_pretraining_gradient_is_added_with_its_coefficient(world, text):
    """By an optimiser whose state is the gradient that it was handed."""
    keep = lambda grads, *_, applied: (optax.tree.zeros_like(grads), grads)
    handed = optax.GradientTransformation(lambda params: params, keep)
    config, state = world.config, optimisation.init_state(world.params["policy"], handed)
    assert config.ppo.pretrain_coef == 0.25
    alone = world.gradients(state.params, ROWS)
    (batch,) = text(4096)
    text_loss = jax.jit(
        jax.value_and_grad(lambda params: lm.loss_fn(config.model, params, batch)[0])
    )
    loss, pretrain = text_loss(state.params)
    total = optimisation.total(world.programs.text_add, state.params, text(4096))
    step = jax.jit(functools.partial(ppo.policy_step, config, handed))
    new, metrics = step(state, alone, total)
    close(new.opt_state, jax.tree.map(lambda a, b: a + 0.25 * b, alone[0], pretrain), 1e-5)
    assert int(new.updates) == 1 and equal(new.params, state.params)
    norm = lambda tree: np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(tree)))
    np.testing.assert_allclose(
        metrics["pretrain/grad_norm_ratio"], 0.25 * norm(pretrain) / norm(alone[0]), rtol=1e-4
    )
    np.testing.assert_allclose(metrics["loss/pretrain_avg"], loss, rtol=1e-5)
    new, _ = step(state, alone, None)
    assert equal(new.opt_state, alone[0])


def results(world, text):
    """All that a step gives: the experience where responses are, metrics, figures of responses, statistics, new states."""
    experience, stats, metrics, said, _ = world.scored
    budget = world.config.microbatch_tokens
    state, more = world.learn(text=lambda number: text(budget))
    return (
        masked(experience),
        stats,
        metrics | more,
        said,
        state["policy"].params,
        state["value"].params,
    )


@pytest.fixture(scope="module")
def whole(world, text):
    """`results` of minibatches in one microbatch each."""
    return results(world, text)


def test_microbatches_change_nothing(whole, text):
    mine = World(make(16))
    assert len(mine.scored[4][0]) > 1
    *figures, policy, value = results(mine, text)
    close(tuple(figures), whole[:-2], 1e-3)
    close((policy, value), whole[-2:], 1e-4)


@pytest.mark.parametrize("budget, shards", [(16, 1), (40, 1), (64, 1), (4096, 1), (64, 4)])
@pytest.mark.parametrize("rows", [range(16), range(1, 16, 2), (11, 2, 7), (5,)])
def test_every_token_of_a_response_is_read_once_and_its_figure_comes_back(
    world, budget, shards, rows
):
    """Each token has its own number in a rollout, 100 x response + place: followed there and back in numpy alone."""
    rows, lengths = np.asarray(rows), np.asarray(world.sampled.lengths)
    sizes, m = world.prompt_lengths + lengths, len(rows)
    back, last, total = np.full((16, R), -1), np.full(16, -1), 0.0
    for part in microbatches(make(budget), world.prompt_lengths, lengths, rows, shards):
        assert len(part["sequence"]) % shards == 0 and part["sequence"].shape == part["place"].shape
        token = np.where(part["sequence"] >= 0, 100 * part["sequence"] + part["place"], -1)
        target = np.take_along_axis(token, part["at"], axis=1)
        before = np.take_along_axis(token, np.maximum(part["at"] - 1, 0), axis=1)
        real = part["weights"] > 0
        assert (before[real] == target[real] - 1).all()  # a target follows a token of its own
        assert np.allclose(part["weights"][real], 1 / lengths[rows].sum(), rtol=1e-6)
        total += part["weights"].sum()
        assert part["member"].shape == part["ends"].shape == (m,) and part["source"].shape == (m, R)
        for member, end, source in zip(part["member"], part["ends"], part["source"], strict=True):
            if member < 16:
                assert last[member] == -1  # a response is a member of one microbatch
                last[member] = token.reshape(-1)[end]
                back[member] = target.reshape(-1)[source]
        assert sorted(part["member"][part["member"] < 16]) == sorted(
            set(part["sequence"][part["sequence"] >= 0])
        )
    assert abs(total - 1) < 1e-6
    for i in range(16):
        inside = 100 * i + world.prompt_lengths[i] + np.arange(lengths[i])
        wanted = inside.tolist() if i in rows else [-1] * lengths[i]
        assert back[i, : lengths[i]].tolist() == wanted
        assert last[i] == (100 * i + sizes[i] - 1 if i in rows else -1)


@pytest.fixture(scope="module")
def one_by_one(world):
    """What each response's own tokens, with nothing else in the row, say: log-probabilities, entropy, values, scores."""
    model, params = world.config.model, world.params
    tokens, lengths, wide = (
        np.asarray(world.sampled.tokens),
        np.asarray(world.sampled.lengths),
        5 + R,
    )

    @jax.jit
    def alone(tokens, n):
        segments, places = (jnp.arange(wide) < n).astype(jnp.int32)[None], jnp.arange(wide)[None]
        apply = lambda role: transformer.apply(model, params[role], tokens[None], places, segments)[
            0
        ][0]
        logp = jax.nn.log_softmax(transformer.logits(model, params["policy"], apply("policy")))
        return logp, transformer.scalar(params["value"], apply("value"))

    score = jax.jit(functools.partial(scoring.score_alone, model))
    out = []
    for i in range(16):
        p, n = world.prompt_lengths[i], lengths[i]
        mine = np.zeros(wide, np.int32)
        mine[: p + n] = tokens[i, 5 - p : 5 + n]
        logp, values = (np.asarray(x) for x in alone(mine, p + n))
        before = np.arange(p - 1, p - 1 + n)
        out.append(
            (
                logp[before, mine[before + 1]],
                -(np.exp(logp) * logp).sum(1)[before],
                values[before],
                score(params["reward"], mine[None], np.array([p + n]))[0],
            )
        )
    return out


@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_a_reading_is_each_responses_own(world, one_by_one, budget):
    mine = World(make(budget))
    zeros = np.full((16, R), -7.0, np.float32)
    said = Reading(*map(jnp.asarray, (zeros, zeros, zeros, zeros, zeros[:, 0])))
    for part in mine.parts(ROWS):
        said = mine.programs.read(mine.params, mine.sampled, said, part)
    for i, (logp, entropy, values, score) in enumerate(one_by_one):
        n = len(logp)
        if i not in ROWS:  # not among the rows: left as it was
            assert (np.asarray(said.values)[i] == -7).all() and said.scores[i] == -7
            continue
        for found, wanted in zip(said[:4], (logp, entropy, logp, values), strict=True):
            np.testing.assert_allclose(np.asarray(found)[i, :n], wanted, atol=2e-5)
        np.testing.assert_allclose(said.scores[i] + 7, score, atol=2e-5)  # added to what was there


def test_tokens_in_front_of_a_prompt_and_behind_an_end_are_never_read(packed_world):
    """Others there, the end token among them: experience, metrics, figures and gradients are the same to the bit."""
    sampled = packed_world.sampled
    real = np.asarray(sampled.segments) > 0
    assert (~real[:, :5]).any() and (~real[:, 5:]).any()
    other = dataclasses.replace(
        sampled,
        tokens=jnp.where(real, sampled.tokens, jnp.where(words(7, 16, 5 + R) < 48, END, 90)),
    )
    assert not equal(other.tokens, sampled.tokens)
    experience, *figures, _ = packed_world.score(sampled=other)
    assert equal(tuple(figures), packed_world.scored[1:4])
    assert equal(experience._replace(sampled=None), packed_world.experience._replace(sampled=None))
    parts, policy = packed_world.parts(ROWS), packed_world.params["policy"]
    grads = optimisation.total(
        packed_world.programs.policy_add, policy, [(experience, part) for part in parts]
    )
    assert equal(grads, packed_world.gradients(policy, ROWS))


def test_what_stands_behind_an_end_in_the_experience_is_never_learnt(packed_world):
    """Old log-probabilities, values, advantages and returns of 99 there: gradients of both losses are the same."""
    mask = packed_world.sampled.mask
    marred = Experience(
        packed_world.sampled, *(jnp.where(mask, x, 99.0) for x in packed_world.experience[1:])
    )
    parts = packed_world.parts(ROWS)
    for add, role in (
        (packed_world.programs.policy_add, "policy"),
        (packed_world.programs.value_add, "value"),
    ):
        plain, other = (
            optimisation.total(
                add, packed_world.params[role], [(experience, part) for part in parts]
            )
            for experience in (packed_world.experience, marred)
        )
        assert equal(plain, other)


def test_slots_give_the_same_experience(world):
    """Responses are the same, to the bit, in whatever slot they were decoded; so is all that is read of them."""
    mine = World(make(slots=6))
    same = [name for name in vars(mine.sampled) if name != "logprobs"]
    assert all(
        np.array_equal(getattr(mine.sampled, name), getattr(world.sampled, name)) for name in same
    )
    np.testing.assert_allclose(mine.sampled.logprobs, world.sampled.logprobs, atol=1e-5)
    experience, stats, metrics, said, _ = mine.scored
    assert equal(experience[1:], world.experience[1:]) and equal(
        (stats, said), (world.scored[1], world.scored[3])
    )
    differ = {name for name in metrics if metrics[name] != world.scored[2][name]}
    assert (
        differ <= {"sampler/drift_mean", "sampler/drift_max"}
        and metrics["sampler/drift_max"] < 1e-5
    )


def test_a_step_over_shapes_that_have_been_seen_compiles_nothing(packed_world):
    packed_world.learn()
    with Compilations() as compilations:
        packed_world.score()
        packed_world.learn()
    assert compilations.programs == []


def kinds(params) -> set:
    return {(str(x.dtype), x.sharding.memory_kind) for x in jax.tree.leaves(params)}


def frozen(world, dtype="", memory="device"):
    """The roles with the two that are only read as a run keeps them."""
    return {
        role: roles.freeze(params, dtype, memory) if role in ("reference", "reward") else params
        for role, params in world.params.items()
    }


def test_frozen_parameters_may_lie_in_the_hosts_memory(packed_world):
    """Every reading of them is the same to the bit."""
    params = frozen(packed_world, memory="host")
    assert kinds(params["reference"]) == kinds(params["reward"]) == {("float32", "pinned_host")}
    assert (
        kinds(params["policy"])
        == kinds(frozen(packed_world)["reference"])
        == {("float32", "device")}
    )
    assert equal(packed_world.score(params)[:4], packed_world.scored[:4])


def test_frozen_parameters_may_be_rounded_where_the_policy_computes_so():
    """The KL at step 0 is within what the self-check allows, and not 0: the reference's norms have been rounded too."""
    mine = World(make(dtype="bfloat16"))
    params = frozen(mine, "bfloat16")
    assert kinds(params["reference"]) == kinds(params["reward"]) == {("bfloat16", "device")}
    assert kinds(mine.params["policy"]) == {("float32", "device")}
    plain = np.asarray(mine.scored[3]["kl"])
    rounded = np.asarray(mine.score(params)[3]["kl"])
    assert not plain.any() and 0 < np.abs(rounded).max() < 0.1


def test_the_self_check_stops_at_each_fault_with_its_figure(world):
    experience, _, _, said, first = world.scored

    def check(params=world.params, programs=world.programs, said=said):
        ppo.self_check(
            world.config, programs, world.config.model, params, experience, said, first[0]
        )

    check()
    moved = jax.tree.map(lambda x: x * 1.01, world.params["policy"])
    other = {**world.params, "reference": moved}
    with pytest.raises(UserError, match=r"self-check at step 0: the largest KL .* is \d*\.\d+"):
        check(other, said=world.score(other)[3])

    def drifting(total, params, batch):
        return world.programs.policy_add(total, moved, batch)

    with pytest.raises(UserError, match="ratio - 1"):
        check(programs=world.programs._replace(policy_add=drifting))
    late = said | {"score": said["score"].at[ppo.CHECKED - 1].add(0.5)}
    with pytest.raises(UserError, match="as its row's pads and neighbours change is 0.5"):
        check(said=late)


def test_the_self_check_stops_where_a_rows_sequences_see_each_other(monkeypatch):
    """The one fault that ratio and KL cannot show, as both sides of them would have it."""
    packed = experience_module.packed

    def leaking(sampled, part):
        batch = packed(sampled, part)
        return batch | {"segments": jnp.minimum(batch["segments"], 1)}

    monkeypatch.setattr(experience_module, "packed", leaking)
    mine = World(make(budget=64), programs_of.__wrapped__(1.0, "float32"))
    experience, _, metrics, said, first = mine.scored
    assert metrics["objective/kl"] == 0
    with pytest.raises(UserError, match=r"as its row's pads and neighbours change is \d*\.\d+"):
        ppo.self_check(
            mine.config, mine.programs, mine.config.model, mine.params, experience, said, first[0]
        )


def test_prompts_are_cut_to_the_longest_of_their_batch():
    """To one of few widths; what is cut off are pads."""
    rows = {
        "prompts": np.arange(1, 41)[None].repeat(2, 0),
        "lengths": np.array([3, 9]),
        "index": np.arange(2),
    }
    narrow = encoding.narrowed(rows)
    assert (
        narrow["prompts"].tolist() == [list(range(25, 41))] * 2
    )  # of 8, 16, 24 and 40 the first that holds 9
    assert equal(
        {k: v for k, v in narrow.items() if k != "prompts"},
        {k: v for k, v in rows.items() if k != "prompts"},
    )
    assert encoding.narrowed(rows | {"lengths": np.array([40, 1])})["prompts"].shape == (2, 40)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_rollout_in_a_layout_of_its_own_gives_the_same_samples():
    """Training over fsdp, sampling over data and tensor: the same tokens, on the mesh of training, to rounding."""
    found = []
    for tensor in (0, 2):
        config = make(slots=8, rollout_tensor=tensor)
        mesh = sharding.make_mesh(configs.Mesh(fsdp=8))
        with jax.set_mesh(mesh):
            shapes = ppo.trained(config, mesh)[2]
            programs = ppo.compiled(config, optimisers_of(config), END, None, shapes, mesh)
            params = jax.tree.map(
                lambda x, s: jax.device_put(x, s.sharding), tiny(0)[1], shapes["policy"].params
            )
            rows = {
                "prompts": np.where(
                    np.arange(5) >= 5 - PROMPT_LENGTHS[:, None], words(4, 8, 5), 0
                ).astype(np.int32),
                "lengths": PROMPT_LENGTHS,
                "index": np.arange(8, dtype=np.int32),
            }
            found.append(ppo.sample(config, programs, params, rows, 3, mesh))
        if tensor:
            kernel = programs.place(params)["layers"]["mlp"]["gate"]["kernel"].sharding
            assert (
                dict(kernel.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
                and kernel.spec[2] == "tensor"
            )
    plain, own = found
    assert dict(own.tokens.sharding.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert np.array_equal(plain.tokens, own.tokens) and np.array_equal(plain.lengths, own.lengths)
    np.testing.assert_allclose(plain.logprobs, own.logprobs, atol=1e-5)


def test_devices_that_a_layout_does_not_divide_are_named():
    with pytest.raises(UserError, match="ppo.rollout_tensor=3 must divide the 1 devices"):
        sharding.with_tensor(MESH, 3)
