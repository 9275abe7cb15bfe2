"""A run without a value model, with every option of other recipes: what it writes and resumes."""

import json

import pytest
from runs import STEPS, command, cut, fails, files_of, rows, with_parents
from test_docs_metrics import NOT_IN_THE_CHAIN, documented

from alignjax import config as configs
from alignjax import convert, train

EXPERTS = ("load_balancing", "load_balancing_avg")  # ends of metrics of mixtures of experts
# Every option that grpo.py:tiny may have.
OPTIONS = {
    "ppo.kl_target": 2.0,
    "ppo.kl_horizon": 64,
    "ppo.clip_high": 0.28,
    "ppo.dual_clip": 3.0,
    "ppo.entropy_coef": 0.01,
    "ppo.overlong_buffer": 14,
    "ppo.overlong_penalty": 0.5,
    "ppo.score_clip": 0.7,
    "checkpoint_every": 2,
}


def arguments() -> list[str]:
    return [f"--config.{field}={value}" for field, value in OPTIONS.items()]


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory):
    """Return the directory of a run of grpo.py:tiny with these options."""
    runs = with_parents("grpo-tiny", chain.runs, tmp_path_factory.mktemp("grpo"))
    assert train.main(command("grpo-tiny", runs, *arguments())) == 0
    return runs / "grpo-tiny"


def test_a_run_without_a_value_model_writes_nothing_of_one(run):
    items = {path.name for path in (run / "checkpoints" / str(STEPS)).iterdir() if path.is_dir()}
    assert items - {"metrics", "checksums"} == {"policy", "policy_optimiser", "stats", "kl_control"}
    metrics = rows(run / "metrics.jsonl")
    names = {name for row in metrics for name in row}
    value_metrics = {"value/explained_variance", "loss/value_avg", "val/clipfrac_avg"}
    value_metrics |= {"value/grad_norm", "value/skipped"}
    lines = set(documented("metrics.jsonl: ppo"))
    table_metrics = {name for name in lines if name.endswith("/NAME")}  # of `ppo.rewards`
    of_experts = {name for name in NOT_IN_THE_CHAIN if name.endswith(EXPERTS)}
    assert names == lines - value_metrics - table_metrics - of_experts
    others = {name for name in NOT_IN_THE_CHAIN if not name.endswith("/NAME")}
    assert names >= others - of_experts
    summary = json.loads((run / "summary.json").read_text())
    assert summary["policy_updates"] == 2 * STEPS
    assert "value_updates" not in summary


def test_the_coefficient_of_the_kl_adapts_as_the_controller_says(run):
    """16 responses a rollout, horizon 64: the factor is 1 + clip(kl / 2 - 1, -0.2, 0.2) / 4."""
    metrics = rows(run / "metrics.jsonl")
    assert metrics[0]["objective/kl_coef"] == pytest.approx(0.04)
    for before, after in zip(metrics, metrics[1:], strict=False):
        error = min(max(before["objective/kl"] / 2 - 1, -0.2), 0.2)
        expected = before["objective/kl_coef"] * (1 + error / 4)
        assert after["objective/kl_coef"] == pytest.approx(expected, rel=1e-5)


def test_a_resume_is_exact_and_has_the_coefficient(run, chain, tmp_path):
    runs = with_parents("grpo-tiny", chain.runs, tmp_path)
    cut(run, runs / "grpo-tiny")
    assert train.main(command("grpo-tiny", runs, *arguments())) == 0
    assert files_of(runs / "grpo-tiny") == files_of(run)


def test_no_value_model_can_be_exported_or_be_a_parent(run, tmp_path, capsys):
    line = f"{run}: with ppo.advantage_estimator='grpo' a run has no value model"
    out = tmp_path / "out"
    assert convert.main(["--to_hf", str(run), "--out", str(out), "--role", "value"]) == 2
    assert line in capsys.readouterr().err
    assert not out.exists()
    parent = f"--config.parents.value={run}"
    printed = fails(capsys, *command("ppo-tiny", tmp_path, parent))
    assert f"parents.value={run}: with ppo.advantage_estimator='grpo'" in printed


def test_a_stored_config_of_an_earlier_version_has_the_defaults():
    """The options are new, so a run that lacks them resumes as it began."""
    config = configs.load("ppo.py:tiny")
    new = {field for field in OPTIONS if field.startswith("ppo.")}
    new |= {"ppo.kl_in", "ppo.kl_estimator", "ppo.value_lam", "ppo.loss_aggregation"}
    stored = {name: value for name, value in configs.flatten(config) if name not in new}
    assert configs.difference(config, stored) == []
