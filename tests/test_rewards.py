"""Text-based rewards: a user's function, and a reward model with a tokenizer of its own."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import config as configs
from alignjax.algorithms import reward_sources, rewards
from alignjax.config import Model, UserError
from alignjax.data import chat, toy
from alignjax.machine import sharding
from alignjax.models import scoring, transformer
from configs import arithmetic

ROWS = [
    {
        "prompt": [{"role": "user", "content": "2 + 2"}],
        "columns": {"answer": "4"},
        "where": "sums.jsonl:1",
    },
    {
        "prompt": [
            {"role": "user", "content": "3"},
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": "x"},
        ],
        "columns": {"answer": "#### 1,000", "level": 2},
    },
]
MODEL = Model(
    vocab_size=520, d_model=32, layers=2, heads=4, kv_heads=2, head_size=8, d_ff=64, max_length=256
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return two tokenizers of different texts and sizes, and so of different ids."""

    def make(name, texts, size):
        return chat.train_tokenizer(texts, tmp_path_factory.mktemp(name), size)

    policy = make("policy", toy.tokenizer_texts(0), 512)
    return policy, make("reward", ["two plus two is four , sure ."] * 50, 300)


@pytest.mark.parametrize(
    "response, right, score",
    [
        ("4", "4", 1),
        ("it is 3 + 1 = 4.", "4", 1),
        ("4, no 5", "4", 0),
        ("four", "4", 0),
        ("", "4", 0),
        ("1000.0", "#### 1,000", 1),
        ("-2", "2", 0),
        ("$1,234.50", "1234.5", 1),
        ("none", "none", 0),
        ("7", 7, 1),
    ],
)
def test_the_last_number_is_the_answer(response, right, score):
    assert arithmetic.reward(None, [response], answer=[right], other=[1]) == [score]


def test_config_takes_a_function_as_the_whole_reward():
    overrides = {"ppo.reward_fn": "configs.arithmetic"}
    with pytest.raises(UserError, match="must be module:function"):
        configs.load("ppo.py:tiny", overrides)
    config = configs.load("arithmetic.py")
    assert set(config.parents) == {"policy", "reference", "value"}
    config.ppo.reward_fn = ""
    with pytest.raises(
        UserError, match=r"parents=\['policy', 'reference', 'value'\] must be .*'reward'"
    ):
        configs.check(config)


def text_reward(tokenizer, params, mesh, max_tokens, microbatch_tokens):
    """Return a reward model that reads text."""
    return rewards.TextRewardModel(
        score=rewards.bind_scorer(MODEL, params),
        tokenizer=tokenizer,
        ending=(chat.end_token(tokenizer),),
        max_tokens=max_tokens,
        microbatch_tokens=microbatch_tokens,
        mesh=mesh,
    )


@pytest.mark.parametrize("budget", [64, 4096])
def test_text_is_read_as_the_reward_models_own_training_reads_it(tokenizers, budget):
    """By its own ids and end token, turns and all; each response as if it were alone."""
    own = tokenizers[1]
    mesh = sharding.make_mesh(configs.Mesh())
    params = transformer.init(MODEL, jax.random.key(0), "scalar")
    responses = ["4", "sure , four .", ""]
    rows = [*ROWS, ROWS[0]]
    with jax.set_mesh(mesh):
        scores = text_reward(own, params, mesh, 200, budget)(rows, responses)
    for row, response, mine in zip(rows, responses, scores, strict=True):
        conversation = [*row["prompt"], {"role": "assistant", "content": response}]
        tokens = jnp.array(chat.encode_conversations(own, [conversation])[0][0])
        assert tokens[-1] == chat.end_token(own)
        alone = scoring.score_alone(MODEL, params, tokens[None], jnp.array([len(tokens)]))
        np.testing.assert_allclose(mine, alone[0], atol=2e-5)


def test_of_too_long_a_text_the_end_is_read(tokenizers):
    own = tokenizers[1]
    mesh = sharding.make_mesh(configs.Mesh())
    read = []

    def score(packed, ends):
        read.append(np.asarray(packed.tokens)[np.asarray(packed.segments) > 0].tolist())
        return jnp.zeros(1)

    model = dataclasses.replace(text_reward(own, {}, mesh, 16, 64), score=score)
    model(ROWS[1:], ["sure , four ."])
    whole = chat.encode_comparisons(own, [{**ROWS[1], "chosen": "sure , four .", "rejected": ""}])[
        0
    ][0]
    assert len(whole) > 16 and read == [whole[-16:]]


def saved(directory, model, tokenizer, max_length):
    """Write what `rewards.build` reads of a reward model's run; return its parameters."""
    tokenizer.save_pretrained(directory / "tokenizer")
    config = configs.Config(
        stage="ranking", model=dataclasses.replace(model, max_length=max_length)
    )
    (directory / "config.json").write_text(configs.to_json(config))
    return transformer.init(model, jax.random.key(1), "scalar")


def test_who_reads_tokens_and_who_reads_text(tokenizers, tmp_path, monkeypatch):
    policy, other = tokenizers
    config = configs.load("ppo.py:tiny", {"ppo.reward_weight": "0.5", "model.vocab_size": "512"})
    mesh, made = sharding.make_mesh(configs.Mesh()), {}
    for name, tokenizer in (("same", policy), ("other", other)):
        (tmp_path / name).mkdir()
        made[name] = saved(tmp_path / name, MODEL, tokenizer, 256)
    monkeypatch.setattr(
        rewards.roles, "load_trained", lambda model, head, mesh, path: made[path.name]
    )
    same = {"reward": tmp_path / "same"}
    reads_text = {"reward": tmp_path / "other"}
    with jax.set_mesh(mesh):
        reward = rewards.build(config, mesh, same, policy, {})
        (reader,) = reward.readers
        assert set(reward.params) == {"reward"} and reward.text_rewards == {}
        assert reader.model.vocab_size == 520 and reader.ending == (chat.end_token(policy),)
        ends = reader.ending
        assert rewards.build(config, mesh, same, policy, {}, ends).readers[0].ending is None
        reward = rewards.build(config, mesh, reads_text, policy, {})
        alone = text_reward(other, made["other"], mesh, 72, 4096)(ROWS, ["4", "y"])
        np.testing.assert_allclose(reward.score_texts(ROWS, ["4", "y"])["reward"], alone, rtol=1e-6)
        config.ppo.reward_fn = "configs.arithmetic:reward"
        functions = reward_sources.load_and_try(config, ROWS, [])
        reward = rewards.build(config, mesh, reads_text, policy, functions)
        assert reward.readers == () and list(reward.text_rewards) == ["function", "reward"]
        assert reward.score_texts(ROWS, ["4", "y"])["function"].tolist() == [1.0, 0.0]
        del config.parents["reward"]
        reward = rewards.build(config, mesh, {}, policy, functions)
        assert reward.params == {}
        assert reward.score_texts(ROWS, ["5", "1000"])["function"].tolist() == [0.0, 1.0]
    config.parents["reward"] = "rm.py"
    config.ppo.reward_fn = ""
    (tmp_path / "same" / "config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "same" / "config.json").read_text()) | {"model.max_length": 20}
        )
    )
    with pytest.raises(
        UserError, match="ppo.response_length=36 is over max_length=20 of the reward model"
    ):
        rewards.build(config, mesh, same, policy, {})


def test_a_prompt_that_the_reward_models_template_refuses_is_named_before_the_first_step(
    tokenizers,
):
    own = chat.load_tokenizer(Path(tokenizers[1].name_or_path))
    own.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + own.chat_template
    )
    model = text_reward(own, {}, None, 16, 64)
    system = [{"role": "system", "content": "Be brief."}, *ROWS[0]["prompt"]]
    rows = [ROWS[0], {"prompt": system, "where": "mine.jsonl:2"}]
    reward = rewards.Rewards(params={}, text_rewards={"reward": model})
    reward.check_prompts(rows[:1])
    with pytest.raises(UserError, match="^mine.jsonl:2: chat template of .*: no system"):
        reward.check_prompts(rows)
