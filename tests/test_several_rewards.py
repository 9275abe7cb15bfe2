"""`ppo.rewards`: several sources of a score, in a config, in a step, in a run and its files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_server import lengths, serving
from runs import act_in_step, command, fails, files_of, rows

from alignjax import config as configs
from alignjax import train
from alignjax.algorithms.advantages import RunningStats
from alignjax.algorithms.experience_making import combine_scores
from alignjax.algorithms.ppo import PPO as Stage
from alignjax.config import Config, Reward, UserError
from alignjax.machine import sharding
from alignjax.reports import content
from alignjax.runs import lineage, records

FUNCTION = "test_several_rewards:short"


def short(prompts, responses, **columns):
    """Return a score that is higher for shorter responses."""
    return [-len(response) / 10 for response in responses]


# ---------------------------------------------------------------------------------- in a config


def with_rewards(**rewards) -> Config:
    config = configs.load("ppo.py:tiny")
    del config.parents["reward"]
    config.ppo.rewards = rewards
    return config


def test_the_command_line_sets_fields_of_entries_and_makes_new_ones():
    config = with_rewards(helpful=Reward(source="rm.py"))
    for key, text in {
        "ppo.rewards.helpful.weight": "2",
        "ppo.rewards.polite.source": "my:polite",
        "ppo.rewards.polite.normalise": "mean_std",
    }.items():
        configs.override(config, key, text)
    assert config.ppo.rewards == {
        "helpful": Reward(source="rm.py", weight=2.0),
        "polite": Reward(source="my:polite", normalise="mean_std"),
    }
    configs.check(config)


@pytest.mark.parametrize(
    "key, message",
    [
        ("ppo.rewards", "NAME.FIELD=VALUE, with a FIELD among source, weight, normalise"),
        ("ppo.rewards.a", "--config.ppo.rewards.NAME.FIELD=VALUE"),
        ("ppo.rewards.a.wieght", "there is no such field; did you mean 'weight'"),
        ("ppo.rewards.a.weight", "float wanted, str given"),
        ("ppo.rewards.a.b.weight", "there is no such field"),
    ],
)
def test_no_other_field_can_be_set(key, message):
    with pytest.raises(UserError, match=message):
        configs.override(Config(), key, "x")


def test_a_stored_table_is_compared_field_by_field():
    """A field of an entry that an earlier version did not know counts as its default."""
    config = with_rewards(helpful=Reward(source="rm.py", weight=0.5))
    stored = configs.stored_config(json.loads(configs.to_json(config)), "config.json")
    assert configs.difference(config, stored) == []
    del stored["ppo.rewards"]["helpful"]["timeout"]
    assert configs.difference(config, stored) == []
    config.ppo.rewards["helpful"].weight = 2.0
    config.ppo.rewards["new"] = Reward(source="a:b")
    lines = configs.difference(config, stored)
    assert lines[0] == "ppo.rewards.helpful.weight: 0.5 -> 2.0"
    assert "ppo.rewards.new.source: 'absent' -> 'a:b'" in lines
    del stored["ppo.rewards"]
    assert "ppo.rewards.helpful.source: 'absent' -> 'rm.py'" in configs.difference(config, stored)
    wrong = dict(configs.flatten(config)) | {"ppo.rewards": {"a": {"weight": "1"}}}
    with pytest.raises(UserError, match=r"^config.json: ppo.rewards.a.weight='1' must be of type"):
        configs.stored_config(wrong, "config.json")


@pytest.mark.parametrize(
    "rewards, changes, message",
    [
        ({"a": Reward()}, {}, "ppo.rewards.a.source='' must name a reward model, a function"),
        ({"a/b": Reward(source="m:f")}, {}, "'a/b' must be a name of letters, digits"),
        ({"a": "m:f"}, {}, "ppo.rewards.a must be of type Reward, not str"),
        ({"a": Reward(source="m:f", weight=0.0)}, {}, "all weights are 0"),
        ({"a": Reward(source="m:f", weight=float("nan"))}, {}, "weight=nan must be finite"),
        ({"a": Reward(source="m:f", normalise="std")}, {}, "normalise='std' must be one of"),
        ({"a": Reward(source="m:f", timeout=3.0)}, {}, "for an endpoint only, but .* a function"),
        ({"a": Reward(source="rm.py:tiny", retries=3)}, {}, "endpoint only, but .* is a model"),
        ({"a": Reward(source="http://x", timeout=0.0)}, {}, "timeout=0.0 must be above 0"),
        ({"a": Reward(source="http://x", batch=0)}, {}, "batch=0 must be at least 1"),
        ({"a": Reward(source="http://")}, {}, "'http://' must be an address such as"),
        ({"a": Reward(source="http://x:y/")}, {}, "must be an address such as"),
        ({"a": Reward(source="http://me:secret@x/")}, {}, "a name or a password"),
        ({"a": Reward(source="m:f")}, {"reward_fn": "m:f"}, "ppo.reward_fn='m:f' would be ignored"),
        ({"a": Reward(source="m:f")}, {"reward_weight": 2.0}, "reward_weight=2.0 would be ignored"),
        ({"a": Reward(source="m:f")}, {"reward_fn_weight": 0.5}, "set ppo.rewards.NAME.weight"),
    ],
)
def test_what_is_wrong_or_would_be_ignored_is_refused(rewards, changes, message):
    config = with_rewards(**rewards)
    config.ppo = dataclasses.replace(config.ppo, **changes)
    with pytest.raises(UserError, match=message):
        configs.check(config)


def test_a_reward_model_beside_the_table_is_refused():
    config = with_rewards(a=Reward(source="m:f"))
    config.parents["reward"] = "rm.py"
    with pytest.raises(UserError, match="parents.reward='rm.py' would be ignored, because ppo.rew"):
        configs.check(config)


@pytest.mark.parametrize(
    "source, kind",
    [
        ("rm.py", "model"),
        ("rm.py:tiny", "model"),
        ("runs/rm", "model"),
        ("hf://a/b", "model"),
        ("a.b:c.d", "function"),
        ("http://localhost:5000/score", "endpoint"),
        ("HTTPS://x", "endpoint"),
    ],
)
def test_a_source_is_a_model_a_function_or_an_endpoint(source, kind):
    assert configs.kind_of_source(source) == kind


# ------------------------------------------------------------------------------------ in a step


def test_the_score_is_the_weighted_sum_of_scores_each_normalised_by_itself():
    """By hand; the statistics of the second rollout hold those of the first."""
    scores = {
        "plain": jnp.array([1.0, 2.0]),
        "centred": jnp.array([4.0, 8.0]),
        "standard": jnp.array([0.0, 2.0]),
        "logged": jnp.array([jnp.inf, 0.0]),
    }
    table = {
        "plain": Reward(weight=2.0),
        "centred": Reward(normalise="mean", weight=-1.0),
        "standard": Reward(normalise="mean_std", weight=0.5),
        "logged": Reward(weight=0.0),
    }
    stats = dict.fromkeys(table, RunningStats.zero())
    combined = combine_scores(table, scores, stats)
    np.testing.assert_allclose(combined.total, [2 + 2 - 0.5, 4 - 2 + 0.5], rtol=1e-6)
    scores["centred"] = jnp.array([10.0, 10.0])
    combined = combine_scores(table, scores, combined.stats)
    assert float(combined.stats["centred"].mean) == 8.0
    assert int(combined.stats["centred"].count) == 4
    np.testing.assert_allclose(combined.total, [2 - 2 - 0.5, 4 - 2 + 0.5], rtol=1e-6)


def test_a_plan_shows_the_memory_of_each_reward_model():
    config = with_rewards(
        one=Reward(source="rm.py"), two=Reward(source="runs/rm"), f=Reward(source="m:f")
    )
    mesh = sharding.make_mesh(configs.Mesh(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        resident = Stage.plan(config, mesh).resident()
    assert [name for name in resident if name.startswith("reward")] == ["reward.one", "reward.two"]


# ------------------------------------------------------------------------------------- in a run


def arguments(chain, runs, url, *more):
    """Return the command of a run with two reward models, a function and an endpoint."""
    table = {
        "model.source": chain.runs / "rm-tiny",
        "earlier.source": chain.runs / "pmp-tiny",
        "earlier.weight": 0.25,
        "earlier.normalise": "mean_std",
        "short.source": FUNCTION,
        "short.weight": 0.5,
        "remote.source": url,
        "remote.normalise": "mean",
    }
    parents = {role: chain.runs / "sft-tiny" for role in ("policy", "reference")}
    parents["value"] = chain.runs / "rm-tiny"
    text = json.dumps({role: str(path) for role, path in parents.items()})
    overrides = [f"--config.ppo.rewards.{key}={value}" for key, value in table.items()]
    return [*command("ppo-tiny", runs), f"--config.parents={text}", *overrides, *more]


def test_a_run_shows_each_reward_and_goes_on_to_the_bit_once_its_endpoint_answers_again(
    chain, tmp_path, capsys
):
    with serving() as server:
        whole = tmp_path / "whole" / "ppo-tiny"
        assert train.main(arguments(chain, tmp_path / "whole", server.url)) == 0
        capsys.readouterr()
        stopped = arguments(chain, tmp_path / "stopped", server.url)
        with act_in_step(2, lambda: setattr(server, "answer", lambda call: (400, b""))):
            line = fails(capsys, *stopped)
        assert f"ppo.rewards.remote.source={server.url}: status 400" in line
        assert line.endswith("once it answers, the same command continues")
        server.answer = lengths
        assert train.main(stopped) == 0
    assert files_of(tmp_path / "stopped" / "ppo-tiny") == files_of(whole)
    names = ["model", "earlier", "short", "remote"]
    first = rows(whole / "metrics.jsonl")[0]
    for name in names:
        assert np.isfinite(first[f"objective/rewards/{name}"])
        assert first[f"objective/rewards_std/{name}"] > 0
    normalised = {key for key in first if key.startswith("reward/running_mean/")}
    assert normalised == {"reward/running_mean/earlier", "reward/running_mean/remote"}
    (sample, *_) = rows(whole / "samples.jsonl")
    np.testing.assert_allclose(sample["score/short"], short(None, sample["responses"]), rtol=1e-6)
    np.testing.assert_allclose(
        sample["score/remote"], [len(text) / 10 for text in sample["responses"]], rtol=1e-6
    )
    summary = json.loads((whole / "summary.json").read_text())
    labels = [label for label, _ in summary["table"]]
    assert [f"score by {name}" for name in sorted(names)] == labels[-4:]
    assert rows(whole / "evaluations.jsonl")[0].keys() >= {f"score/{name}" for name in names}
    check_page(whole, names)
    assert lineage.parent_of(whole, "reward") == chain.runs / "rm-tiny"


def check_page(run, names):
    """Check that the report page shows each reward by its name."""
    page = content.page_content([records.read(run)])
    charts = {chart["title"]: chart for chart in page["charts"]}
    assert [title for title in charts if title.startswith("Reward ")][:4] == [
        f"Reward {name}" for name in sorted(names)
    ]
    assert charts["Reward short"]["heldout"] == "score/short"
    (described,) = page["runs"]
    assert ["reward model"] in [parent["roles"][-1:] for parent in described["parents"]]
    figures = page["sources"][0]["rows"][0]["sides"]
    assert set(names) <= set(next(iter(figures.values()))[0]["figures"])


def test_a_wrong_reward_model_is_named_by_its_field(chain, tmp_path, capsys):
    line = fails(
        capsys,
        *command("ppo-tiny", tmp_path),
        "--config.parents="
        + json.dumps(dict.fromkeys(("policy", "reference", "value"), str(chain.runs / "sft-tiny"))),
        f"--config.ppo.rewards.helpful.source={chain.runs / 'sft-tiny'}",
    )
    assert f"ppo.rewards.helpful.source={chain.runs / 'sft-tiny'}: a reward model is wanted" in line
