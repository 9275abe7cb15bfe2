"""A loss or a gradient that is not finite: the step is not applied, its batch is kept, the run goes on, or stops."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import command, fails, files_of, with_parents

from alignjax import config as configs
from alignjax import train
from alignjax.algorithms import experience, lm, optimisation, ppo_programs
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.optimisation import GradientSum
from alignjax.algorithms.ppo import updates_of_step
from alignjax.config import Mesh, Optimiser
from alignjax.data import mixture
from alignjax.machine import sharding
from alignjax.weights import checkpoint

NAN, INF = float("nan"), float("inf")
MARK = -1  # a token that no text has
EVERY = "--config.checkpoint_every=1", "--config.keep_checkpoints=4"


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def strict(path) -> list[dict]:
    """The rows of a JSON-lines file, which must be JSON to the letter: without NaN and Infinity."""

    def never(constant):
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=never) for line in path.read_text().splitlines()]


def saved(run, step) -> dict:
    """Item -> arrays of a checkpoint, all of which are finite."""
    kept = (run / "checkpoints" / str(step)).iterdir()
    items = [p.name for p in kept if p.is_dir() and p.name not in ("metrics", checkpoint.CHECKSUMS)]
    with checkpoint.ocp.PyTreeCheckpointer() as reader:
        found = {item: reader.restore(run / "checkpoints" / str(step) / item) for item in items}
    assert items and all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    return found


@pytest.mark.parametrize("mesh", [Mesh(1, 1, 1), Mesh(2, 2, 2)], ids=["one", "eight"])
def test_a_step_that_is_not_finite_leaves_the_state_to_the_bit(mesh):
    """Wherever the number is, whatever it is; the next step is as if there had been none. -0 and what is tiny stay too."""
    size = mesh.data * mesh.fsdp * mesh.tensor
    if jax.device_count() < size:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh(
        (mesh.data, mesh.fsdp, mesh.tensor),
        sharding.AXES,
        devices=jax.devices()[:size],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    optimiser = optimisation.make_optimiser(
        Optimiser(learning_rate=0.1, weight_decay=0.1, warmup_steps=3), 10
    )
    init = functools.partial(optimisation.init_state, optimiser=optimiser)
    kernel = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    kernel[0] = [0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]
    params = {"head": {"kernel": kernel, "bias": np.float32([-0.0])}}
    put = lambda tree: jax.device_put(tree, sharding.param_shardings(tree, mesh))
    shapes = sharding.abstract(jax.eval_shape(init, params), mesh)

    def total(loss, seen=1.0, at=None, bad=0.0):
        grads = jax.tree.map(lambda x: np.full_like(x, -1e-3), params)
        if at is not None:
            grads["head"][at].flat[-1] = bad
        metrics = {"loss": jnp.float32(loss), "seen": jnp.float32(seen)}
        return GradientSum(put(grads), metrics)

    bad = [
        total(NAN),
        total(-INF),
        total(1.0, INF),
        *(total(1.0, 1.0, at, x) for at in ("kernel", "bias") for x in (NAN, INF, 1e38)),
    ]
    with jax.set_mesh(mesh):
        update = functools.partial(optimisation.update_state, optimiser)
        step = optimisation.compile_update(update, shapes)

        def start():
            state = optimisation.place_state(put(params), optimiser, shapes)
            return step(state, total(1.0))[0]

        undisturbed, found = step(start(), total(2.0))
        assert float(found["skipped"]) == 0 and int(undisturbed.updates) == 2
        state = start()
        before = bits(state)
        for each in bad:
            state, found = step(state, each)
            assert float(found["skipped"]) == 1 and bits(state) == before
        state, found = step(state, total(2.0))
        assert float(found["skipped"]) == 0 and bits(state) == bits(undisturbed) != before


def test_text_whose_gradient_is_not_finite_keeps_the_policy_from_moving():
    config = types.SimpleNamespace(ppo=types.SimpleNamespace(pretrain_coef=0.5))
    optimiser = optimisation.make_optimiser(Optimiser(), 9)
    state = optimisation.init_state({"kernel": jnp.ones(3)}, optimiser)
    step = jax.jit(functools.partial(ppo_programs.update_policy, config, optimiser))

    def total(value):
        return GradientSum({"kernel": np.full(3, value, np.float32)}, {"loss": np.float32(1.0)})

    for text, skipped in ((NAN, 1), (INF, 1), (2.0, 0)):
        moved, found = step(state, total(1.0), total(text))
        assert float(found["policy/skipped"]) == skipped and (bits(moved) == bits(state)) == skipped
    assert float(found["pretrain/grad_norm_ratio"]) == 1


def test_scores_that_are_not_finite_leave_the_running_statistics():
    update_of = jax.jit(RunningStats.update)
    stats = update_of(RunningStats.zero(), np.float32([1.0, 2.0]))
    for bad in (NAN, INF):
        assert bits(update_of(stats, np.float32([3.0, bad]))) == bits(stats)
    assert float(update_of(stats, np.float32([3.0, 6.0])).mean) == 3


@pytest.fixture
def marked(monkeypatch):
    """Steps (a set to add to) whose batch bears a mark, for which its loss is NaN."""
    steps = set()
    get = mixture.Batches.get
    pack = lm.pack_minibatch

    def with_mark(self, step):
        rows = get(self, step)
        if step in steps:
            rows["tokens"][0, 0] = MARK
        return rows

    def poisoned(rows, *rest):
        parts = pack(rows, *rest)
        if (rows["tokens"] == MARK).any():
            parts[0].weights[0, 0] = np.nan
        return parts

    monkeypatch.setattr(mixture.Batches, "get", with_mark)
    monkeypatch.setattr(lm, "pack_minibatch", poisoned)
    return steps


def test_a_run_goes_on_or_stops_and_resumes_to_the_bit(marked, tmp_path, capsys):
    marked |= {1, 3}
    run, cut_off = tmp_path / "whole" / "lm-tiny", tmp_path / "cut" / "lm-tiny"
    assert train.main(command("lm-tiny", run.parent, *EVERY)) == 0
    assert (
        f"loss is nan at step 1 (1 skipped so far, max_skipped=3); its batch is in {run}/skipped/1.npz"
        in capsys.readouterr().out
    )
    found = strict(run / "metrics.jsonl")
    assert [row["skipped"] for row in found] == [0, 1, 0, 1]
    assert (
        ["loss" in row for row in found]
        == ["grad_norm" in row for row in found]
        == [True, False, True, False]
    )
    states = [bits(saved(run, step)) for step in (1, 2, 3, 4)]
    assert states[0] == states[1] != states[2] == states[3]

    kept = dict(np.load(run / "skipped" / "1.npz"))
    assert np.isnan(kept["metrics/loss"]) and kept["metrics/skipped"] == 1
    config, params = configs.load("lm.py:tiny"), saved(run, 1)["model"]
    loss = jax.jit(functools.partial(lm.loss_fn, config.model))
    again = lambda: sum(
        loss(params, part)[0] for part in lm.pack_minibatch(kept, config.microbatch_tokens, 1)
    )
    assert np.isnan(again())
    kept["tokens"][0, 0] = 0  # not a target
    assert 5 < again() < 8

    asked = command("lm-tiny", cut_off.parent, *EVERY, "--config.max_skipped=1")
    line = fails(capsys, *asked)
    assert (
        "lm-tiny: loss is nan at step 3" in line
        and "max_skipped=1" in line
        and str(cut_off / "skipped") in line
    )
    assert not (cut_off / "summary.json").exists() and bits(saved(cut_off, 3)) == states[2]
    assert train.main([*asked[:-1], "--config.max_skipped=2"]) == 0
    assert (
        "loss is nan at step 3 (2 skipped so far" in capsys.readouterr().out
    )  # step 1 counts still, 3 counts anew
    whole, resumed = files_of(run), files_of(cut_off)
    assert {k for k in whole if whole[k] != resumed[k]} == {"config.json"}
    for step in (1, 3):
        assert (run / "skipped" / f"{step}.npz").read_bytes() == (
            cut_off / "skipped" / f"{step}.npz"
        ).read_bytes()


def test_what_overflows_by_a_finite_gradient_is_not_saved(tmp_path, capsys):
    line = fails(capsys, *command("lm-tiny", tmp_path, "--config.optimiser.learning_rate=1e39"))
    assert "not finite after step 1; stopped, the last checkpoint is whole" in line
    assert not (tmp_path / "lm-tiny" / "summary.json").exists()
    assert list((tmp_path / "lm-tiny" / "checkpoints").iterdir()) == []


CALLS = []


def reward(prompts, responses, **columns):
    """1 for each response, but NaN for one of them in the third step and in the evaluation before it."""
    CALLS.append(len(responses))
    return [NAN if len(CALLS) in (3, 4) and i == 5 else 1.0 for i in range(len(responses))]


def test_a_score_that_is_not_finite_moves_nothing(chain, tmp_path, monkeypatch):
    make = experience.make_experience

    def without_truncation(config, stats, rollout, reading):
        rollout = dataclasses.replace(rollout, truncated=rollout.truncated & False)
        return make(config, stats, rollout, reading)

    monkeypatch.setattr(experience, "make_experience", without_truncation)
    CALLS.clear()
    runs = with_parents("ppo-tiny", chain[0], tmp_path)
    run, asked = (
        runs / "ppo-tiny",
        ("--config.ppo.reward_fn=test_nonfinite:reward", "--config.ppo.value_warmup_steps=0"),
    )
    assert train.main(command("ppo-tiny", runs, *EVERY, *asked)) == 0
    found = strict(run / "metrics.jsonl")
    assert [(row["policy/skipped"], row["value/skipped"]) for row in found] == [
        (0, 0),
        (0, 0),
        (1, 1),
        (0, 0),
    ]
    assert (
        {"objective/scores", "loss/policy_avg", "loss/value_avg"} & set(found[2])
        == set()
        < set(found[3])
        == set(found[1])
    )
    before = saved(run, 2)
    assert bits(before) == bits(saved(run, 3))  # both models, and the statistics
    (sample,) = (row["score"] for row in strict(run / "samples.jsonl")[4:] if None in row["score"])
    assert sample[1] is None and sample[0] > 0
    (row,) = strict(run / "evaluations.jsonl")  # null there, and no step that counts as skipped
    assert row["score"] is None and row["samples"][2]["score"][1] is None and row["kl"] >= 0
    assert [path.name for path in (run / "skipped").iterdir()] == ["2.npz"]

    config, kept = configs.load("ppo.py:tiny"), dict(np.load(run / "skipped" / "2.npz"))
    update = next(updates_of_step(config, 2))
    assert np.flatnonzero(np.isnan(kept["score"])).tolist() == [5]
    assert kept[f"text/{update.number}/tokens"].shape[0] == len(update.responses) // 4
    parts = experience.pack_minibatch(
        config, kept["prompt_lengths"], kept["lengths"], update.responses, 1
    )
    loss = jax.jit(functools.partial(ppo_programs.value_loss_fn, config))
    for arrays, wanted in ((kept, NAN), (kept | {"returns": kept["old_values"]}, 0)):
        learned = experience.from_host(arrays)
        again = sum(float(loss(before["value"], (learned, part))[0]) for part in parts)
        assert again == pytest.approx(wanted, abs=1e-4, nan_ok=True)
