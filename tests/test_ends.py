"""A response ends at any of the model's ends; a run keeps them from its import to its export."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import rows
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from alignjax import config as configs
from alignjax import convert, inference, train
from alignjax.algorithms.stage import RunInputs
from alignjax.config import UserError
from alignjax.data import chat, toy
from alignjax.data.ends import end_tokens, without_end
from alignjax.evals.requests import Requests, ResponseSettings
from alignjax.machine.profile import Phases
from alignjax.runs.claim import claim_workdir
from alignjax.weights import imported as imports
from alignjax.weights.imported import read_imported

PROMPTS = ["copy : cat box", "find : bob hat . amy red . bob", "count : cat box sun"]
SAMPLED = {"temperature": 1.3, "top_p": 0.9, "seed": 3, "max_tokens": 10, "samples": 2}
GENERATION = {"do_sample": True, "eos_token_id": [2, 5, 77], "temperature": 0.7, "top_k": 20}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A ChatML tokenizer: its pad is 0, its end token 2."""
    directory = tmp_path_factory.mktemp("tokenizer")
    return chat.train_tokenizer(["Some words to learn from."], directory, 300)


@pytest.fixture(scope="module")
def checkpoint(chain, tmp_path_factory):
    """A Hugging Face checkpoint with several ends, and fields that we have no place for."""
    directory = tmp_path_factory.mktemp("hf") / "model"
    convert.export(chain.runs / "sft-tiny", directory, None, "float32")
    change(directory / "generation_config.json", GENERATION)
    fields = {"max_position_embeddings": 8192, "initializer_range": 0.02, "bos_token_id": 1}
    fields |= {"eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    change(directory / "config.json", read_json(directory / "config.json") | fields)
    return directory


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def change(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content))
    return path.parent


@pytest.mark.parametrize(
    "declared, ends",
    [
        ({}, (2,)),
        ({"a": None, "b": 5}, (2, 5)),
        ({"a": [2, 5, 77], "b": 0}, (2, 5, 77, 0)),
        ({"a": []}, (2,)),
    ],
)
def test_the_ends_are_the_templates_the_tokenizers_and_all_that_files_declare(
    tokenizer, declared, ends
):
    assert end_tokens(tokenizer, declared, 300) == ends
    with_pad = (*ends, 0) if 0 not in ends else ends
    assert set(end_tokens(tokenizer, declared, 300, plain_text=True)) == set(with_pad)


def test_the_tokenizers_end_of_text_ends_a_response_too(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    base = AutoTokenizer.from_pretrained(str(tmp_path))
    base.eos_token = chat.PAD
    base.add_special_tokens({"additional_special_tokens": [chat.START, chat.END]})
    assert end_tokens(base, {}, 300) == (2, 0)
    base.chat_template = None
    assert end_tokens(base, {}, 300) == (0,)
    base.eos_token = None
    with pytest.raises(UserError, match="neither an eos_token nor a chat template"):
        end_tokens(base, {}, 300)


@pytest.mark.parametrize(
    "value, message",
    [
        (300, r"eos_token_id=300: 300 is not among the 300 tokens of the model"),
        ([2, -1], r"eos_token_id=\[2, -1\]: -1 is not among"),
        ("2", r"eos_token_id='2': '2' is not the id of a token"),
        ([2, None], r"eos_token_id=\[2, None\]: None is not the id"),
        (True, r"eos_token_id=True: True is not the id"),
        ([[2]], r"eos_token_id=\[\[2\]\]: \[2\] is not the id"),
        ({"a": 1}, r"eos_token_id=\{'a': 1\}: \{'a': 1\} is not the id"),
    ],
)
def test_a_declared_end_that_is_no_token_is_named(tokenizer, value, message):
    with pytest.raises(UserError, match=f"^m/generation_config.json: {message}"):
        end_tokens(tokenizer, {"m/generation_config.json: eos_token_id": value}, 300)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("generation_config.json", "[1]", "a JSON object is wanted, not list"),
        ("generation_config.json", "{", "not JSON"),
        ("generation_config.json", '{"eos_token_id": 99999}', "eos_token_id=99999: 99999 is not"),
    ],
)
def test_a_damaged_generation_config_is_named_by_the_command(
    checkpoint, tmp_path, name, text, message
):
    shutil.copytree(checkpoint, tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(text)
    with pytest.raises(UserError, match=f"hf/{name}: {message}"):
        inference.load(tmp_path / "hf")


def test_any_end_ends_a_response_wherever_it_is_sampled(chain):
    """With one more end, each response is what it was, up to the first of that end's places."""
    model = inference.load(chain.runs / "ppo-tiny")
    one = model.generate(PROMPTS, **SAMPLED)
    # A response that is streamed below, the first of its prompt, has this token.
    tokens = [token for response in one[::2] for token in response.tokens[1:-1]]
    extra = max(set(tokens), key=tokens.count)
    model.ends = (*model.ends, extra)
    cut = 0
    shortened = model.generate(PROMPTS, **SAMPLED)
    for before, after in zip(one, shortened, strict=True):
        length = before.tokens.index(extra) + 1 if extra in before.tokens else len(before.tokens)
        cut += length < len(before.tokens)
        assert after.tokens == before.tokens[:length]
        assert after.truncated == (after.tokens[-1] not in model.ends)
        content = without_end(after.tokens, model.ends)
        assert after.text == chat.decode_response(model.tokenizer, content)
    assert cut
    place = next(place for place in range(0, 6, 2) if shortened[place].tokens[-1] == extra)
    settings = {name: value for name, value in SAMPLED.items() if name != "samples"}
    stream = model.stream(PROMPTS[place // 2], number=place // 2, **settings)
    assert "".join(stream) == shortened[place].text


def test_an_evaluation_ends_responses_at_any_end(chain, monkeypatch):
    model = inference.load(chain.runs / "ppo-tiny")
    model.ends = (2, 100)
    (word,) = model.tokenizer("cat", add_special_tokens=False)["input_ids"][:1]

    def generate_tokens(prompts, *_, settings, **__):
        assert settings.end_tokens == (2, 100)
        return [np.array([word, 100]), np.array([word, 2]), np.array([word, word])]

    monkeypatch.setattr(model, "generate_tokens", generate_tokens)
    answers = dict(Requests(model).responses([[5], [6], [7]], ResponseSettings(max_tokens=2)))
    text = model.tokenizer.decode([word])
    assert sorted(answers.values()) == [text, text, text + text]


def test_a_run_keeps_what_it_imported_and_so_do_its_children(checkpoint, tokenizer, tmp_path):
    imported = imports.inherit(tmp_path / "new", {"model": checkpoint, "reward": tmp_path})
    assert imported.generation == GENERATION and imported.source == "model"
    for name, parent in (("sft", checkpoint), ("ppo", tmp_path / "sft")):
        run = tmp_path / name
        run.mkdir()
        imported = imports.inherit(run, {"policy": parent, "reward": tmp_path / "elsewhere"})
        inputs = RunInputs(
            parents={}, tokenizer=tokenizer, say=print, phases=Phases(), imported=imported
        )
        claim_workdir(configs.Config(), inputs, run)
        change(checkpoint / "generation_config.json", {"eos_token_id": 3})
        again = imports.inherit(run, {"policy": checkpoint})  # a resume
        change(checkpoint / "generation_config.json", GENERATION)
        assert again.generation == GENERATION and again.source == "model"
        assert again.config == read_json(checkpoint / "config.json")
    assert imports.inherit(tmp_path / "new", {}) == imports.Imported()


def exported(chain, tmp_path, checkpoint, *, generation=None, **fields):
    """Export a run of the chain as if it had begun with a checkpoint; return the directory."""
    run = tmp_path / "run"
    shutil.copytree(chain.runs / "sft-tiny", run)
    imported = read_imported(checkpoint)
    config = {**imported.config, **fields}
    generation = imported.generation if generation is None else generation
    kept = imports.Imported(config=config, generation=generation, source="model")
    (run / "imported.json").write_text(kept.to_json())
    assert convert.main(["--to_hf", str(run), "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_an_export_keeps_what_was_imported(chain, checkpoint, tmp_path):
    code = {"AutoConfig": "code.Config"}
    out = exported(chain, tmp_path, checkpoint, dtype="bfloat16", auto_map=code)
    assert read_json(out / "generation_config.json") == GENERATION
    config = read_json(out / "config.json")
    assert config == read_json(checkpoint / "config.json")
    assert config["max_position_embeddings"] == 8192 and config["torch_dtype"] == "float32"
    assert inference.load(out).ends == (2, 5, 77)
    assert "began with `model`" in (out / "README.md").read_text()


def test_an_export_adds_the_ends_that_training_added(chain, checkpoint, tmp_path):
    """A base model's files do not name the end that it learned from conversations."""
    base = {"eos_token_id": 0, "temperature": 0.7, "_from_model_config": True}
    out = exported(chain, tmp_path, checkpoint, generation=base, eos_token_id=0)
    assert read_json(out / "generation_config.json") == {
        "eos_token_id": [0, 2],
        "temperature": 0.7,
    }
    assert read_json(out / "config.json")["eos_token_id"] == [0, 2]


@pytest.mark.parametrize(
    "fields", [{"hidden_size": 77}, {"model_type": "other"}, {"rms_norm_eps": 1e-3}]
)
def test_an_imported_config_of_another_model_is_not_exported(chain, checkpoint, tmp_path, fields):
    config = read_json(exported(chain, tmp_path, checkpoint, **fields) / "config.json")
    assert config["max_position_embeddings"] == 64 and "initializer_range" not in config


def test_a_run_that_reads_more_than_was_imported_exports_its_own_length(
    chain, checkpoint, tmp_path
):
    out = exported(chain, tmp_path, checkpoint, max_position_embeddings=32)
    config = read_json(out / "config.json")
    assert config["max_position_embeddings"] == 64 and config["initializer_range"] == 0.02
    assert config["rope_parameters"]["rope_theta"] == 1e4


def test_ppo_ends_scores_and_exports_by_the_ends_of_its_policy(chain, checkpoint, tmp_path):
    """The policy has ends that its template lacks; the reward model reads behind the template."""
    reward = foreign_reward_model(chain, tmp_path / "reward")
    policy = tmp_path / "policy"
    shutil.copytree(checkpoint, policy)
    ends = list(range(200, 500, 3))  # the tiny model is nearly random: many ends end many responses
    change(policy / "generation_config.json", {"eos_token_id": ends})
    arguments = [f"--config.parents.{role}={policy}" for role in ("policy", "reference", "value")]
    arguments += [f"--config.parents.reward={reward}", "--config.steps=1"]
    run = tmp_path / "ppo"
    assert train.main(["--config", "ppo.py:tiny", "--workdir", str(run), *arguments]) == 0

    model = inference.load(policy)
    assert set(model.ends) == {2, *ends}
    known = [row["prompt"][0]["content"] for row in toy.examples("prompts", "train", 0, 64)]
    samples = [row for row in rows(run / "samples.jsonl") if known.count(row["prompt"]) == 1]
    prompts = [row["prompt"] for row in samples]
    settings = model.sampling_settings(1.0, 0.9, 14, samples=2)
    tokens = model.generate_tokens(
        model.encode(prompts),
        [known.index(prompt) for prompt in prompts],
        len(prompts),
        key=jax.random.fold_in(jax.random.key(0), 0),
        settings=dataclasses.replace(settings, slots=8),
    )
    responses = list(map(model.make_response, tokens))
    assert [response.text for response in responses] == column(samples, "responses")
    assert [response.truncated for response in responses] == column(samples, "truncated")
    scorer = inference.load(reward)
    assert len(scorer.ending) == 2
    ended = [number for number, response in enumerate(responses) if not response.truncated]
    assert any(responses[number].tokens[-1] != 2 for number in ended)
    scores = scorer.score(
        [prompts[number // 2] for number in ended],
        [[*responses[number].tokens[:-1], 2] for number in ended],
    )
    recorded = [column(samples, "score")[number] for number in ended]
    np.testing.assert_allclose(scores, recorded, atol=2e-5)

    convert.export(run, tmp_path / "out", None, "float32")
    generation = read_json(tmp_path / "out/generation_config.json")
    assert generation == {"eos_token_id": [*ends, 2]}
    assert read_json(tmp_path / "out/config.json")["max_position_embeddings"] == 8192


def column(samples: list[dict], name: str) -> list:
    """Return a figure of all responses, one after the other."""
    return [value for row in samples for value in row[name]]


def foreign_reward_model(chain, directory):
    """Write the reward model of the chain as another trainer would have saved it."""
    convert.export(chain.runs / "rm-tiny", directory, None, "float32")
    config = read_json(directory / "config.json")
    del config["alignjax_score_at"]
    tensors = load_file(directory / "model.safetensors")
    del tensors["score.bias"]
    save_file(tensors, directory / "model.safetensors")
    return change(directory / "config.json", config)
