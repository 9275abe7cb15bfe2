"""A step with a loss or gradient that is not finite is not applied, and its batch is kept."""

import dataclasses
import functools
import io
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import STEPS, command, fails, files_of, with_parents

from alignjax import chat, convert, evaluate, inference, train
from alignjax import config as configs
from alignjax.algorithms import experience, experience_making, lm, optimisation, ppo_programs
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.optimisation import GradientSum
from alignjax.algorithms.ppo import PPO, updates_of_step
from alignjax.config import Mesh, Optimiser, UserError
from alignjax.data import mixture
from alignjax.machine import sharding
from alignjax.weights import checkpoint

NAN = float("nan")
INF = float("inf")
MARK = -1  # a token that no text has
SAVE_EVERY_STEP = ("--config.checkpoint_every=1", "--config.keep_checkpoints=4")


def bits(tree: object) -> list[bytes]:
    """Return the bytes of every array of a tree."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def strict_rows(path: Path) -> list[dict]:
    """Return the rows of a JSON-lines file; NaN and Infinity, which JSON does not have, fail."""

    def reject(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=reject) for line in path.read_text().splitlines()]


def checkpoint_arrays(run: Path, step: int) -> dict[str, object]:
    """Return {item: arrays} of a checkpoint, all of which must be finite."""
    directory = run / "checkpoints" / str(step)
    others = ("metrics", checkpoint.CHECKSUMS)
    items = [path.name for path in directory.iterdir() if path.is_dir() and path.name not in others]
    with checkpoint.ocp.PyTreeCheckpointer() as reader:
        arrays = {item: reader.restore(directory / item) for item in items}
    assert items and all(np.isfinite(array).all() for array in jax.tree.leaves(arrays))
    return arrays


@pytest.mark.parametrize("mesh", [Mesh(1, 1, 1), Mesh(2, 2, 2)], ids=["one", "eight"])
def test_a_step_that_is_not_finite_leaves_the_state_to_the_bit(mesh):
    """This holds for every place and kind of number, and for -0 and subnormal parameters.

    The next step is as if there had been no such step.
    """
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

    def put(tree):
        return jax.device_put(tree, sharding.param_shardings(tree, mesh))

    shapes = sharding.abstract(jax.eval_shape(init, params), mesh)

    def gradient_sum(loss, other_metric=1.0, bad_parameter=None, bad_gradient=0.0):
        grads = jax.tree.map(lambda x: np.full_like(x, -1e-3), params)
        if bad_parameter is not None:
            grads["head"][bad_parameter].flat[-1] = bad_gradient
        metrics = {"loss": jnp.float32(loss), "other": jnp.float32(other_metric)}
        return GradientSum(put(grads), metrics)

    bad_sums = [gradient_sum(NAN), gradient_sum(-INF), gradient_sum(1.0, INF)]
    for name in ("kernel", "bias"):
        for gradient in (NAN, INF, 1e38):
            bad_sums.append(gradient_sum(1.0, 1.0, name, gradient))
    with jax.set_mesh(mesh):
        update = functools.partial(optimisation.update_state, optimiser)
        step = optimisation.compile_update(update, shapes)

        def state_after_a_step():
            state = optimisation.place_state(put(params), optimiser, shapes)
            return step(state, gradient_sum(1.0))[0]

        undisturbed, metrics = step(state_after_a_step(), gradient_sum(2.0))
        assert float(metrics["skipped"]) == 0 and int(undisturbed.updates) == 2
        state = state_after_a_step()
        before = bits(state)
        for bad_sum in bad_sums:
            state, metrics = step(state, bad_sum)
            assert float(metrics["skipped"]) == 1 and bits(state) == before
        state, metrics = step(state, gradient_sum(2.0))
        assert float(metrics["skipped"]) == 0 and bits(state) == bits(undisturbed) != before


def test_text_whose_gradient_is_not_finite_keeps_the_policy_from_moving():
    config = configs.load("ppo.py:tiny")
    config.ppo.pretrain_coef = 0.5
    optimiser = optimisation.make_optimiser(Optimiser(), 9)
    state = optimisation.init_state({"kernel": jnp.ones(3)}, optimiser)
    step = jax.jit(functools.partial(ppo_programs.update_policy, config, optimiser))

    def gradient_sum(value: float) -> GradientSum:
        return GradientSum({"kernel": np.full(3, value, np.float32)}, {"loss": np.float32(1.0)})

    for text_gradient, skipped in ((NAN, 1), (INF, 1), (2.0, 0)):
        new_state, metrics = step(state, gradient_sum(1.0), gradient_sum(text_gradient))
        assert float(metrics["policy/skipped"]) == skipped
        assert (bits(new_state) == bits(state)) == skipped
    assert float(metrics["pretrain/grad_norm_ratio"]) == 1


def test_scores_that_are_not_finite_leave_the_running_statistics():
    update = jax.jit(RunningStats.update)
    stats = update(RunningStats.zero(), np.float32([1.0, 2.0]))
    for bad in (NAN, INF):
        assert bits(update(stats, np.float32([3.0, bad]))) == bits(stats)
    assert float(update(stats, np.float32([3.0, 6.0])).mean) == 3


@pytest.fixture
def poisoned_steps(monkeypatch) -> set[int]:
    """Return an empty set of steps; the batch of a step in it is marked, and its loss is NaN."""
    steps = set()
    get = mixture.Batches.get
    pack = lm.pack_minibatch

    def get_marked(batches, step):
        rows = get(batches, step)
        if step in steps:
            rows["tokens"][0, 0] = MARK
        return rows

    def pack_poisoned(rows, *rest):
        parts = pack(rows, *rest)
        if (rows["tokens"] == MARK).any():
            parts[0].weights[0, 0] = np.nan
        return parts

    monkeypatch.setattr(mixture.Batches, "get", get_marked)
    monkeypatch.setattr(lm, "pack_minibatch", pack_poisoned)
    return steps


def test_a_run_continues_or_stops_and_resumes_to_the_bit(poisoned_steps, tmp_path, capsys):
    """The skipped steps are 1 and 3; the second run stops at step 3 and resumes."""
    poisoned_steps |= {1, 3}
    run = tmp_path / "whole" / "lm-tiny"
    stopped = tmp_path / "stopped" / "lm-tiny"
    assert train.main(command("lm-tiny", run.parent, *SAVE_EVERY_STEP)) == 0
    assert (
        "loss is nan at step 1 (1 skipped so far, max_skipped=3); its batch is in "
        f"{run}/skipped/1.npz"
    ) in capsys.readouterr().out
    metrics = strict_rows(run / "metrics.jsonl")
    assert [row["skipped"] for row in metrics] == [0, 1, 0, 1]
    for name in ("loss", "grad_norm"):
        assert [name in row for row in metrics] == [True, False, True, False]
    states = [bits(checkpoint_arrays(run, step)) for step in (1, 2, 3, 4)]
    assert states[0] == states[1] != states[2] == states[3]
    check_replay(run)

    arguments = command("lm-tiny", stopped.parent, *SAVE_EVERY_STEP)
    line = fails(capsys, *arguments, "--config.max_skipped=1")
    assert "lm-tiny: loss is nan at step 3" in line
    assert "max_skipped=1" in line and str(stopped / "skipped") in line
    assert not (stopped / "summary.json").exists()
    assert bits(checkpoint_arrays(stopped, 3)) == states[2]
    assert train.main([*arguments, "--config.max_skipped=2"]) == 0
    # Step 1 still counts, and step 3 is counted again.
    assert "loss is nan at step 3 (2 skipped so far" in capsys.readouterr().out
    whole = files_of(run)
    resumed = files_of(stopped)
    assert {name for name in whole if whole[name] != resumed[name]} == {"config.json"}
    for name in ("1.npz", "3.npz"):
        assert (run / "skipped" / name).read_bytes() == (stopped / "skipped" / name).read_bytes()


def check_replay(run: Path) -> None:
    """Compute the loss of the skipped step 1 again, as docs/metrics.md says."""
    kept = dict(np.load(run / "skipped" / "1.npz"))
    assert np.isnan(kept["metrics/loss"]) and kept["metrics/skipped"] == 1
    config = configs.load("lm.py:tiny")
    params = checkpoint_arrays(run, 1)["model"]
    loss_fn = jax.jit(functools.partial(lm.loss_fn, config.model))

    def replayed_loss() -> float:
        parts = lm.pack_minibatch(kept, config.microbatch_tokens, 1)
        return sum(loss_fn(params, part)[0] for part in parts)

    assert np.isnan(replayed_loss())
    kept["tokens"][0, 0] = 0  # not a target
    assert 5 < replayed_loss() < 8


def test_what_overflows_by_a_finite_gradient_is_not_saved(tmp_path, capsys):
    line = fails(capsys, *command("lm-tiny", tmp_path, "--config.optimiser.learning_rate=1e39"))
    assert "not finite after step 1; stopped, the last checkpoint is whole" in line
    assert not (tmp_path / "lm-tiny" / "summary.json").exists()
    assert list((tmp_path / "lm-tiny" / "checkpoints").iterdir()) == []


class Calls:
    """The number of calls of `reward` so far."""

    count = 0


def reward(prompts, responses, **columns):
    """Return 1 for each response, but NaN for one of them in the third step.

    The evaluation before that step is call 3, and gets a NaN too. The call with one prompt before
    the first rollout does not count.
    """
    Calls.count += len(responses) > 5
    scores = [1.0] * len(responses)
    if Calls.count in (3, 4):
        scores[5] = NAN
    return scores


class PoisonedPolicy:
    """Takes the place of `PPO.role_params`: the policy of the second step overflows."""

    def __init__(self):
        self.role_params = PPO.role_params
        self.calls = 0

    def __call__(self, stage, state):
        self.calls += 1
        params = self.role_params(stage, state)
        if self.calls != 2:
            return params
        overflowing = {"scale": np.inf * params["policy"]["norm"]["scale"]}
        return params | {"policy": params["policy"] | {"norm": overflowing}}


def test_a_rollout_that_is_not_finite_moves_nothing(chain, tmp_path, monkeypatch, capsys):
    """The logits of the policy are not finite in step 1, and a score in step 2."""
    make_experience = experience_making.make_experience

    def without_truncation(config, stats, source_stats, rollout, reading, kl_control):
        rollout = dataclasses.replace(rollout, truncated=rollout.truncated & False)
        return make_experience(config, stats, source_stats, rollout, reading, kl_control)

    monkeypatch.setattr(experience_making, "make_experience", without_truncation)
    monkeypatch.setattr(Calls, "count", 0)
    poisoned = PoisonedPolicy()
    monkeypatch.setattr(PPO, "role_params", lambda stage, state: poisoned(stage, state))
    run = with_parents("ppo-tiny", chain.runs, tmp_path) / "ppo-tiny"
    overrides = ["--config.ppo.reward_fn=test_nonfinite:reward"]
    overrides += ["--config.ppo.value_warmup_steps=0", *SAVE_EVERY_STEP]
    assert train.main(command("ppo-tiny", run.parent, *overrides)) == 0
    metrics = strict_rows(run / "metrics.jsonl")
    assert [row["policy/skipped"] for row in metrics] == [0, 1, 1, 0]
    assert [row["value/skipped"] for row in metrics] == [0, 1, 1, 0]
    for row, missing in ((metrics[1], "objective/entropy"), (metrics[2], "objective/scores")):
        assert not {missing, "loss/policy_avg", "loss/value_avg"} & set(row)
    assert "objective/scores" in metrics[1] and "objective/entropy" in metrics[2]
    assert set(metrics[3]) == set(metrics[0])
    printed = capsys.readouterr().out
    assert "the policy's logits are not finite: objective/entropy is nan at step 1 (1 " in printed
    assert "a score is not finite: objective/scores is nan at step 2 (2 skipped" in printed
    # Such a response ends at its first token, which is one of the vocabulary.
    kept = np.load(run / "skipped" / "1.npz")
    assert np.isnan(kept["logprobs"][:, 0]).all() and (kept["lengths"] == 1).all()
    assert (kept["tokens"] >= 0).all() and not kept["logprobs"][:, 1:].any()
    before = checkpoint_arrays(run, 2)
    models = ("policy", "value", "policy_optimiser", "value_optimiser")
    for step in (1, 3):
        other = checkpoint_arrays(run, step)
        assert all(bits(before[name]) == bits(other[name]) for name in models)
    assert bits(before["stats"]) == bits(checkpoint_arrays(run, 3)["stats"])
    scores = [row["score"] for row in strict_rows(run / "samples.jsonl")[4:]]
    (with_null,) = [pair for pair in scores if None in pair]
    assert with_null[1] is None and with_null[0] > 0
    # In an evaluation the figure is null, and no step counts as skipped.
    (evaluation,) = strict_rows(run / "evaluations.jsonl")
    assert evaluation["score"] is None and evaluation["kl"] >= 0
    assert evaluation["samples"][2]["score"][1] is None
    assert sorted(path.name for path in (run / "skipped").iterdir()) == ["1.npz", "2.npz"]
    check_ppo_replay(run, before["value"])


def check_ppo_replay(run: Path, value_params: object) -> None:
    """Compute the value loss of the skipped step 2 again, as docs/metrics.md says."""
    config = configs.load("ppo.py:tiny")
    kept = dict(np.load(run / "skipped" / "2.npz"))
    update = next(updates_of_step(config, 2))
    assert np.flatnonzero(np.isnan(kept["score"])).tolist() == [5]
    assert kept[f"text/{update.number}/tokens"].shape[0] == len(update.responses) // 4
    parts = experience.pack_minibatch(
        config, kept["prompt_lengths"], kept["lengths"], update.responses, 1
    )
    loss_fn = jax.jit(functools.partial(ppo_programs.value_loss_fn, config))

    def replayed_loss(arrays: dict) -> float:
        learned = experience.from_host(arrays)
        return sum(float(loss_fn(value_params, (learned, part))[0]) for part in parts)

    assert np.isnan(replayed_loss(kept))
    exact = kept | {"returns": kept["old_values"]}
    assert replayed_loss(exact) == pytest.approx(0, abs=1e-4)


def poisoned_copy(run: Path, copy: Path) -> Path:
    """Copy a run, with a last checkpoint that has a NaN in its model."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    items = {"model": checkpoint_arrays(run, STEPS)["model"]}
    norm = items["model"]["layers"]["norm1"]
    norm["scale"] = norm["scale"].at[-1, 2].set(NAN)
    checkpoints = checkpoint.Checkpoints(copy / "checkpoints", 2)
    checkpoints.save(STEPS, items)
    checkpoints.close()
    return copy


def test_a_run_that_is_not_finite_is_no_parent_and_is_not_used(chain, tmp_path, capsys):
    """Training, inference and an export name the array."""
    run = poisoned_copy(chain.runs / "lm-tiny", tmp_path / "lm")
    expected = "model/layers/norm1/scale is not finite (NaN or infinity), so this model can't be"
    parent = f"--config.parents.model={run}"
    assert expected in fails(capsys, *command("sft-tiny", tmp_path, parent))
    with pytest.raises(UserError, match=re.escape(expected)):
        inference.load(run)
    assert convert.main(["--to_hf", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "model: layers/norm1/scale is not finite" in capsys.readouterr().err


def overflowing(model: inference.LoadedModel) -> inference.LoadedModel:
    """Return a model whose parameters are finite and whose computation is not."""
    model.params["norm"]["scale"] = model.params["norm"]["scale"] * np.float32(3e38)
    return model


def test_a_model_whose_logits_or_scores_overflow_is_one_line(chain, tmp_path, capsys, monkeypatch):
    """In one response after another: no token and no figure comes out of it."""
    policy = overflowing(inference.load(chain.runs / "sft-tiny"))
    line = re.escape(f"{chain.runs / 'sft-tiny'}: the model's logits overflow in float32")
    with pytest.raises(UserError, match=line):
        policy.generate(["copy : cat"], temperature=0.0, max_tokens=10)
    with pytest.raises(UserError, match=line):
        list(policy.stream("copy : cat", max_tokens=10))
    reward = overflowing(inference.load(chain.runs / "rm-tiny"))
    with pytest.raises(UserError, match="the model's scores overflow in float32"):
        reward.score(["copy : cat"], ["cat"])

    load = inference.load
    monkeypatch.setattr(inference, "load", lambda *args, **kw: overflowing(load(*args, **kw)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("copy : cat\n"))
    assert chat.main([str(chain.runs / "sft-tiny"), "--max_tokens", "10"]) == 0
    assert "sft-tiny: the model's logits overflow in float32" in capsys.readouterr().out
    arguments = ["--run", str(chain.runs / "rm-tiny"), "--sets", "toy/comparisons-clean"]
    out = tmp_path / "figures.json"
    assert evaluate.main([*arguments, "--examples", "8", "--out", str(out)]) == 2
    assert "the model's scores of toy/comparisons-clean overflow" in capsys.readouterr().err
    assert not out.exists()
