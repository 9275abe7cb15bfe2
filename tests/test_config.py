"""Configs: each rule names fields and both values; each file loads and says how to run it."""

import ast
import dataclasses
import difflib
import json
import runpy

import pytest

from alignjax import config as configs
from alignjax.config import CONFIGS, Config, UserError
from alignjax.models import families

FILES = sorted(CONFIGS.glob("*.py"))
VARIANTS = [
    (str(path.relative_to(CONFIGS)), variant)
    for path in sorted(CONFIGS.rglob("*.py"))
    for variant in runpy.run_path(str(path)).get("VARIANTS", ("",))
]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("stage", "dpq", r"stage='dpq' must be one of 'lm', 'ranking', 'dpo', 'ppo'"),
        ("model.dtype", "float16", "model.dtype='float16' must be one of 'float32', 'bfloat16'"),
        ("optimiser.schedule", "step", "optimiser.schedule='step' must be one of"),
        ("ppo.normalise_scores", "max", "ppo.normalise_scores='max' must be one of"),
        ("steps", "0", "steps=0 must be at least 1 for ppo"),
        ("ppo.epochs", "0", "ppo.epochs=0 must be at least 1"),
        ("model.kv_heads", "3", "model.kv_heads=3 must divide model.heads=4"),
        ("model.head_size", "7", "model.head_size=7 must be even"),
        ("data.max_length", "999", r"data.max_length=999 is over model.max_length=64"),
        ("data.kind", "text", r"data.kind='text' must be one of \('prompts',\) for stage='ppo'"),
        (
            "parents.judge",
            "rm.py",
            r"parents=\['judge', 'policy', 'reference', 'reward', 'value'\] must be among",
        ),
        (
            "ppo.minibatches",
            "5",
            "ppo.minibatches=5 must divide data.batch x ppo.samples_per_prompt=64",
        ),
        (
            "ppo.frozen_dtype",
            "bfloat16",
            "ppo.frozen_dtype='bfloat16' needs model.dtype='bfloat16', not 'float32'",
        ),
        ("ppo.frozen_memory", "disk", "ppo.frozen_memory='disk' must be one of 'device', 'host'"),
        ("ppo.slots", "1.5", "--config.ppo.slots=1.5: int wanted, float given"),
        (
            "ppo.pretrain_ratio",
            "0.3",
            "ppo.pretrain_ratio=0.3 times the minibatch=32 must be whole",
        ),
        (
            "ppo.pretrain_coef",
            "0",
            "ppo.pretrain_coef=0.0 and ppo.pretrain_ratio=0.25: both or neither must be 0",
        ),
        ("data.heldout_share", "1", "data.heldout_share=1.0 must be below 1"),
        ("data.on_bad_row", "drop", "data.on_bad_row='drop' must be one of 'error', 'skip'"),
        ("chat_template", "alpaca", "chat_template='alpaca' must be one of '', 'chatml'"),
        ("ppo.top_p", "1.5", r"ppo.top_p=1.5 must lie in \(0, 1\]"),
        ("model.kv_heads", "0", "model.kv_heads=0 must be at least 1"),
        ("ppo.temperature", "0", "ppo.temperature=0.0 must be above 0"),
        (
            "ppo.response_length",
            "60",
            r"data.max_length=22 \+ ppo.response_length=60 is over model.max_length=64",
        ),
    ],
)
def test_a_broken_rule_names_field_and_both_values(key, value, message):
    with pytest.raises(UserError, match=message):
        configs.load("ppo.py", {key: value})


CHOICES = {
    "stage": "'lm', 'ranking', 'dpo', 'ppo'",
    "model.family": ", ".join(map(repr, families.FAMILIES)),
    "model.qk_norm_over": "'head', 'width'",
    "model.norms": "'before', 'after', 'both'",
    "model.activation": "'silu', 'gelu_tanh'",
    "model.rope_scaling": "'', 'linear', 'llama3', 'yarn', 'dynamic', 'longrope'",
    "model.dtype": "'float32', 'bfloat16'",
    "model.remat": "'nothing', 'everything', 'dots', 'auto'",
    "model.attention": "'auto', 'xla', 'triton', 'cudnn', 'splash'",
    "optimiser.schedule": "'constant', 'cosine'",
    "value_optimiser.schedule": "'constant', 'cosine'",
    "dpo.loss": "'sigmoid', 'ipo'",
    "ppo.kl_in": "'reward', 'loss'",
    "ppo.kl_estimator": "'k1', 'k2', 'k3'",
    "ppo.loss_aggregation": "'', 'token', 'sequence', 'constant'",
    "ppo.normalise_scores": "'none', 'mean', 'mean_std'",
    "ppo.cache_dtype": "'', 'float32', 'bfloat16'",
    "ppo.frozen_dtype": "'', 'float32', 'bfloat16'",
    "ppo.frozen_memory": "'device', 'host'",
    "chat_template": "'', 'chatml'",
    "data.on_bad_row": "'error', 'skip'",
}


@pytest.mark.parametrize("key, choices", CHOICES.items())
def test_a_choice_is_one_of_its_list(key, choices):
    with pytest.raises(UserError) as raised:
        configs.load("ppo.py", {key: "other"})
    assert str(raised.value) == f"{key}='other' must be one of {choices}"


def test_a_config_without_a_mistake_looks_for_no_nearest_name(monkeypatch):
    """It takes longer than everything else that a config is loaded by."""
    monkeypatch.setattr(difflib, "get_close_matches", lambda *_: pytest.fail("it has"))
    assert configs.load("ppo.py:tiny").stage == "ppo"


def test_no_choice_is_left_out_above():
    assert set(CHOICES) == set(configs.CHOICES)


def test_counts_are_every_whole_number_of_which_0_would_be_none():
    """The other numbers mean something at 0 or below: all, none, the rest of the devices."""
    whole = {key for key, value in configs.flatten(Config()) if type(value) is int}
    assert whole - set(configs.AT_LEAST_ONE) == {
        "seed",
        "steps",
        "max_skipped",
        "data.examples",
        "data.heldout_examples",
        "lora.rank",
        "ppo.slots",
        "ppo.rollout_tensor",
        "ppo.value_warmup_steps",
        "ppo.overlong_buffer",
        "ppo.eval_every",
        "optimiser.warmup_steps",
        "value_optimiser.warmup_steps",
        "model.rope_original_length",
        "model.window",
        "model.experts",
        "model.experts_per_token",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
    }
    assert set(configs.AT_LEAST_ONE) <= whole


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize("key", configs.AT_LEAST_ONE)
def test_a_count_is_at_least_one(key, value):
    with pytest.raises(UserError) as raised:
        configs.load("ppo.py", {key: value})
    assert str(raised.value) == f"{key}={value} must be at least 1"


ROLES = "['policy', 'reference', 'reward', 'value']"


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("lm.py", {"parents.policy": "x"}, "parents=['policy'] must be among ['model'] for lm"),
        ("lm.py", {"stage": "ppo", "data.kind": "prompts"}, f"parents=[] must be {ROLES} for ppo"),
        (
            "lm.py",
            {"data.kind": "prompts"},
            "data.kind='prompts' must be one of ('text', 'conversations') for stage='lm'",
        ),
        (
            "rm.py",
            {"data.kind": "text"},
            "data.kind='text' must be one of ('comparisons',) for stage='ranking'",
        ),
        ("lm.py", {"data.max_length": "65"}, "data.max_length=65 is over model.max_length=64"),
        (
            "ppo.py",
            {"ppo.minibatches": "3"},
            "ppo.minibatches=3 must divide data.batch x ppo.samples_per_prompt=64",
        ),
        (
            "ppo.py",
            {"ppo.pretrain_ratio": "0.05"},
            "ppo.pretrain_ratio=0.05 times the minibatch=32 must be whole",
        ),
        (
            "ppo.py",
            {"ppo.frozen_dtype": "bfloat16"},
            "ppo.frozen_dtype='bfloat16' needs model.dtype='bfloat16', not 'float32'",
        ),
        (
            "ppo.py",
            {"ppo.pretrain_ratio": "0"},
            "ppo.pretrain_coef=0.1 and ppo.pretrain_ratio=0.0: both or neither must be 0",
        ),
        ("ppo.py", {"ppo.top_p": "0"}, "ppo.top_p=0.0 must lie in (0, 1]"),
        (
            "ppo.py",
            {"ppo.temperature": "-1"},
            "ppo.temperature=-1.0 must be finite and not below 0",
        ),
        ("lm.py", {"optimiser.eps": "1e999"}, "optimiser.eps=inf must be finite and not below 0"),
        (
            "ppo.py",
            {"ppo.response_length": "43"},
            "data.max_length=22 + ppo.response_length=43 is over model.max_length=64",
        ),
    ],
)
def test_a_broken_rule_is_told_word_for_word(name, given, message):
    with pytest.raises(UserError) as raised:
        configs.load(name, given)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "name, given",
    [
        ("lm.py", {"data.max_length": "64"}),
        (
            "lm.py",
            {"ppo.minibatches": "5", "ppo.top_p": "2"},
        ),  # the rules of PPO do not apply to another stage
        ("ppo.py", {"ppo.response_length": "42"}),
        ("ppo.py", {"ppo.top_p": "1"}),
        ("ppo.py", {"ppo.pretrain_coef": "0", "ppo.pretrain_ratio": "0"}),
        (
            "ppo.py",
            {"microbatch_tokens": "1"},
        ),  # no example is too large: a microbatch holds at least one
        ("lm.py", {"data.batch": "7"}),
        ("ppo.py", {"ppo.slots": "5"}),  # slots need not divide anything
        ("ppo.py", {"ppo.frozen_dtype": "bfloat16", "model.dtype": "bfloat16"}),
        (
            "ppo.py",
            {
                "ppo.frozen_dtype": "float32",
                "ppo.frozen_memory": "host",
                "ppo.cache_dtype": "bfloat16",
            },
        ),
        ("lm.py", {"ppo.frozen_dtype": "bfloat16"}),
    ],
)
def test_a_value_on_the_edge_of_a_rule_passes(name, given):
    def text(value):
        return value if isinstance(value, str) else f"{value:g}"

    assert {
        key: text(value)
        for key, value in configs.flatten(configs.load(name, given))
        if key in given
    } == given


@pytest.mark.parametrize(
    "key",
    ["seed", "data.examples", "ppo.slots", "ppo.value_warmup_steps", "optimiser.warmup_steps"],
)
def test_a_whole_number_that_may_be_0_is_not_below_it(key):
    with pytest.raises(UserError) as raised:
        configs.load("ppo.py", {key: "-1"})
    assert str(raised.value) == f"{key}=-1 must be finite and not below 0"


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("ppo.kl_coeff", "1", "ppo.kl_coeff: there is no such field; did you mean 'ppo.kl_coef'"),
        (
            "microbatches",
            "4",
            "microbatches: there is no such field; did you mean 'microbatch_tokens'",
        ),
        (
            "optimizer.eps",
            "1",
            "optimizer.eps: there is no such field; did you mean 'optimiser.eps'",
        ),
        ("steps.more", "1", "steps.more: there is no such field"),
        ("ppo", "1", "this is a group; set one of its fields"),
        ("parents", "1", "this is a group"),
        ("steps", "1.5", "--config.steps=1.5: int wanted, float given"),
        ("ppo.clip", "big", "--config.ppo.clip=big: float wanted, str given"),
        ("ppo.whiten_advantages", "1", "bool wanted, int given"),
    ],
)
def test_a_wrong_override_is_answered(key, value, message):
    with pytest.raises(UserError, match=message):
        configs.load("ppo.py", {key: value})


def test_overrides_take_the_type_of_their_field():
    given = {
        "ppo.clip": "1",
        "steps": "7",
        "ppo.whiten_advantages": "false",
        "parents.policy": "x/y",
        "name": "0",
    }
    c = configs.load("ppo.py", given)
    assert (
        c.ppo.clip == 1.0
        and isinstance(c.ppo.clip, float)
        and c.steps == 7
        and c.ppo.whiten_advantages is False
    )
    assert c.parents["policy"] == "x/y" and c.parents["value"] == "rm.py" and c.name == "0"


@pytest.mark.parametrize(
    "text, value", [("true", True), ("True", True), ("false", False), ("False", False)]
)
def test_a_bool_is_written_either_way(text, value):
    assert configs.load("ppo.py", {"ppo.whiten_advantages": text}).ppo.whiten_advantages is value


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "ppo.whiten_advantages",
            "yes",
            "--config.ppo.whiten_advantages=yes: bool wanted, str given",
        ),
        ("steps", "true", "--config.steps=true: int wanted, bool given"),
        ("steps", "1e3", "--config.steps=1e3: int wanted, float given"),
        ("ppo.clip", "true", "--config.ppo.clip=true: float wanted, bool given"),
        ("model", "big", "--config.model: this is a group; set one of its fields"),
    ],
)
def test_a_value_of_another_type_is_told_word_for_word(key, value, message):
    config = configs.load("ppo.py")
    before = configs.to_json(config)
    with pytest.raises(UserError) as raised:
        configs.override(config, key, value)
    assert str(raised.value) == message and configs.to_json(config) == before


def test_a_parent_may_be_added_to_none():
    assert configs.load("lm.py", {"parents.model": "runs/lm"}).parents == {"model": "runs/lm"}


def test_a_name_below_a_parent_is_no_field():
    with pytest.raises(UserError, match="parents.value.policy"):
        configs.load("ppo.py", {"parents.value.policy": "x"})


def test_a_path_comes_before_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (
        "from alignjax.config import Config\ndef config(variant):\n    return Config(name='mine')\n"
    )
    (tmp_path / "ppo.py").write_text(text)
    assert configs.load("ppo.py").name == "mine"
    with pytest.raises(UserError, match="ppo.py has no variant 'tiny'"):
        configs.load("ppo.py:tiny")


def test_a_config_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="no file pro.py here or in .*; did you mean 'ppo.py'"):
        configs.load("pro.py")
    with pytest.raises(UserError, match="lm.py has no variant 'tyni'; did you mean 'tiny'"):
        configs.load("lm.py:tyni")


def test_a_difference_shows_both_values_and_can_be_ignored():
    stored = json.loads(configs.to_json(Config()))
    other = Config(seed=3, mesh=configs.Mesh(data=2), parents={"model": "x"})
    assert configs.difference(other, stored, ("mesh.",)) == [
        "parents: {} -> {'model': 'x'}",
        "seed: 0 -> 3",
    ]
    assert configs.difference(Config(), stored) == []
    assert configs.difference(Config(), {**stored, "old": 1}) == ["old: 1 -> 'absent'"]


def test_a_model_comes_back_from_json():
    model = dataclasses.replace(configs.Model(), family="llama", rope_factor=4.0, tied=True)
    assert configs.model_from_json(json.loads(configs.to_json(Config(model=model)))) == model


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_every_config_comes_back_from_json(name, variant):
    c = configs.load(f"{name}:{variant}")
    stored = json.loads(configs.to_json(c))
    assert configs.difference(c, stored) == [] and configs.model_from_json(stored) == c.model


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_every_variant_of_every_config_passes(name, variant):
    c = configs.load(f"{name}:{variant}")
    assert all(len(spec) for spec in c.parents.values())
    text = (CONFIGS / name).read_text()
    assert len(text.splitlines()) < 110
    docstring = ast.get_docstring(ast.parse(text))
    assert f"python -m alignjax.train --config {name}" in docstring
    imported = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imported}
    # A reward that comes with a config may use the standard library.
    assert modules - {"re", "decimal"} == {"alignjax.config"}


def test_every_config_has_a_tiny_variant():
    assert all((path.name, "tiny") in VARIANTS for path in FILES)


@pytest.mark.parametrize("size", ["1_8b", "7b", "14b"])
def test_the_qwen_configs_have_the_reports_numbers(size):
    p = configs.load(f"qwen_{size}/ppo.py")
    assert (p.optimiser.learning_rate, p.value_optimiser.learning_rate) == (1e-6, 5e-6)
    assert (p.ppo.kl_coef, p.ppo.value_clip, p.ppo.top_p, p.ppo.samples_per_prompt) == (
        0.04,
        0.15,
        0.9,
        2,
    )
    assert (
        p.ppo.value_warmup_steps == 50
        and p.ppo.normalise_scores == "mean"
        and p.ppo.pretrain_coef > 0
    )
    for name in ("pmp", "rm"):
        c = configs.load(f"qwen_{size}/{name}.py")
        assert (c.optimiser.learning_rate, c.optimiser.schedule, c.optimiser.warmup_steps) == (
            3e-6,
            "constant",
            0,
        )
        assert (c.data.batch, c.data.max_length, c.steps) == (64, 2048, 0)  # 0 steps: one epoch
    s = configs.load(f"qwen_{size}/sft.py")
    o = s.optimiser
    assert (s.steps, s.data.batch, s.data.max_length, o.warmup_steps, o.learning_rate) == (
        4000,
        128,
        2048,
        1430,
        2e-6,
    )
    assert (o.weight_decay, o.clip_norm, o.b1, o.b2, o.eps) == (0.1, 1.0, 0.9, 0.95, 1e-8)
    # Each has parents of its own size, down to the checkpoint.
    assert set(p.parents.values()) == {f"qwen_{size}/sft.py", f"qwen_{size}/rm.py"}
    assert configs.load(f"qwen_{size}/rm.py").parents == {"model": f"qwen_{size}/pmp.py"}
    for name in ("pmp", "sft"):
        assert configs.load(f"qwen_{size}/{name}.py").parents == {
            "model": f"hf://Qwen/Qwen-{size.upper()}"
        }
