"""The code of docs/extending.md works from outside the package, and does what the page says."""

import dataclasses
import importlib
import json
import shutil
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import outside
import pyarrow
import pyarrow.parquet
import pytest
from pages import ROOT, shown_files
from runs import Chain, command, rows
from safetensors.numpy import load_file
from test_models import GOLDEN, error, golden, golden_case, run, tiny

from alignjax import config as configs
from alignjax import convert, train
from alignjax.algorithms import reward_endpoints
from alignjax.algorithms.estimators import AdvantageInputs
from alignjax.config import PPO, Mesh, Model, Reward, UserError
from alignjax.data import chat, formats, mixture, sources
from alignjax.machine import sharding
from alignjax.models import families, layer_kinds, transformer
from alignjax.sampling.external import ExternalSampler
from alignjax.sampling.types import Prompts, SamplingSettings
from alignjax.weights import hf, roles

FILES = shown_files(ROOT / "docs" / "extending.md")
WORDS = "cat box sun hat cup dog key map pen bus egg fan".split()
# The tasks ask for the last of two words.
TASKS = [
    {"prompt": f"last : {first} {last}", "answer": last}
    for first, last in zip(WORDS, reversed(WORDS), strict=True)
]
SENTENCES = ["the cat is big .", "sort these words : one two three", "how many cups are there ?"]


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    """A working directory with the page's files, whose modules can be imported."""
    outside.install(FILES, tmp_path, monkeypatch)
    return tmp_path


def imported(name: str, directory: Path) -> ModuleType:
    """Import a module of the page, and check that it is the page's."""
    module = importlib.import_module(name)
    assert module.__file__ == str(directory / f"{name}.py")
    return module


def write_lines(path: Path, entries: list[dict]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_the_page_shows_every_file_that_its_tests_use():
    assert set(FILES) == {
        "leave_one_out.py",
        "exaone4.py",
        "exaone_sft.py",
        "rated.jsonl",
        "rated_rm.py",
        "concise.py",
        "random_words.py",
        "server.py",
    }


# ---------------------------------------------------------------------- a new advantage estimator


def test_an_estimator_compares_the_responses_to_a_prompt(directory):
    estimate = imported("leave_one_out", directory).leave_one_out
    inputs = AdvantageInputs(
        rewards=np.float32([[1, 2], [5, 9], [0, 4], [0, 1]]),
        values=np.zeros((4, 2), np.float32),
        mask=np.array([[True, True], [True, False], [True, True], [True, True]]),
    )
    estimated = estimate(inputs, PPO(samples_per_prompt=2))
    # The totals are 3 and 5 for the first prompt, 4 and 1 for the second.
    assert estimated.advantages.tolist() == [[-2, -2], [2, 0], [3, 3], [-3, -3]]
    assert estimated.returns.tolist() == [[3, 3], [5, 0], [4, 4], [1, 1]]


# ----------------------------------------------------------------------------- a new model family


def test_a_family_computes_the_logits_of_torch(directory):
    """Its golden checkpoint has rows longer than the window, and a layer without RoPE."""
    imported("exaone4", directory)
    model, params, data = golden("outside/exaone4")
    assert layer_kinds.names(model) == ["window", "window", "full_nope", "window"]
    tokens, mask, theirs = golden_case(data, "left")
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    placed = roles.load(model, "lm", mesh, jax.random.key(0), GOLDEN / "outside" / "exaone4")
    logits = run(model, placed, tokens, mask)
    assert error(logits[mask > 0], theirs[mask > 0]) < 2e-5

    hf.save_hf(model, params, directory / "again", "bfloat16")
    first = load_file(GOLDEN / "outside" / "exaone4" / "model.safetensors")
    again = load_file(directory / "again" / "model.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert hf.load_hf(directory / "again", "lm")[0] == model


def test_a_family_has_presets(directory):
    imported("exaone4", directory)
    preset = families.PRESETS["exaone-4.0-1.2b"]
    assert preset.family == "exaone4"
    assert preset.norms == "after"
    shapes = jax.eval_shape(lambda: transformer.init(preset, jax.random.key(0), "lm"))
    assert sum(shape.size for shape in jax.tree.leaves(shapes)) == 1_279_391_488


def test_a_family_refuses_what_it_does_not_compute(directory):
    imported("exaone4", directory)
    config = json.loads((GOLDEN / "outside" / "exaone4" / "config.json").read_text())
    with pytest.raises(UserError, match="config.json: hidden_act='gelu' is not supported"):
        families.model_from_hf(config | {"hidden_act": "gelu"})
    with pytest.raises(UserError, match="config.json: layer_types=null is not a value for it"):
        families.model_from_hf(config | {"layer_types": None})
    with pytest.raises(UserError, match="sliding_window=null .* is no window"):
        families.model_from_hf(config | {"sliding_window": None})
    everywhere = config | {"sliding_window": None, "layer_types": ["full_attention"] * 4}
    assert families.model_from_hf(everywhere).layer_types == "full"


def test_a_run_starts_from_a_family_of_the_page_and_is_exported(directory):
    """The config file imports the module that registers the family."""
    with pytest.raises(UserError, match="model.family='exaone4' must be one of 'qwen', 'qwen2'"):
        configs.load("sft.py:tiny", {"model.family": "exaone4"})
    family = imported("exaone4", directory).EXAONE4
    sizes = {"vocab_size": 512, "d_ff": 64, "max_length": 64}
    model, params = tiny(family="exaone4", **family.flags, **sizes)
    hf.save_hf(model, params, directory / "exaone-tiny")
    chat.train_tokenizer(SENTENCES, directory / "exaone-tiny", 300)
    arguments = ["--config", "exaone_sft.py:tiny", "--config.steps=2"]
    assert train.main([*arguments, "--workdir", "runs/exaone-sft"]) == 0
    assert convert.main(["--to_hf", "runs/exaone-sft", "--out", "exported"]) == 0
    exported, _ = hf.load_hf(directory / "exported", "lm")
    assert exported.family == "exaone4"
    assert exported.layers == model.layers
    config = json.loads((directory / "exported" / "config.json").read_text())
    assert config["architectures"] == ["Exaone4ForCausalLM"]
    assert config["layer_types"] == ["full_attention"] * 2


def test_the_full_config_of_the_page_starts_from_the_hub(directory):
    parents = {"model": "hf://LGAI-EXAONE/EXAONE-4.0-1.2B"}
    assert configs.load("exaone_sft.py").parents == parents


def test_the_names_that_a_config_accepts_are_those_of_the_families():
    assert configs.CHOICES["model.family"] == tuple(families.FAMILIES)


# -------------------------------------------------------------------------------- a new row format


def rated(number: int) -> dict:
    return {
        "instruction": f"question {number}",
        "responses": ["poor", f"good {number}", "fair"],
        "ratings": [1, 4.5, 3],
    }


def refuse_to_print(text: str) -> None:
    raise AssertionError(f"nothing should be printed, not: {text}")


def test_the_pages_own_rows_become_comparisons(directory):
    config = configs.load("rated_rm.py")
    sets = mixture.sets(
        config, "comparisons", config.data.train, config.data.heldout, refuse_to_print
    )
    [train_rows] = sets.train
    heldout_rows = sets.heldout["rated.jsonl"]
    assert len(train_rows) >= 1
    assert len(heldout_rows) >= 1
    margins = {(row["chosen"], row["rejected"]): row["margin"] for row in train_rows + heldout_rows}
    assert margins == {
        ("Three minutes.", "Who knows."): 4,
        ("No, a shrub.", "Yes."): 2,
        ("A herb.", "A tree."): 3,
        ("Eight.", "Two."): 3,
    }


def test_the_format_of_a_config_file_reads_its_data(directory):
    write_lines(directory / "rated.jsonl", [rated(number) for number in range(20)])
    config = configs.load("rated_rm.py")
    sets = mixture.sets(
        config, "comparisons", config.data.train, config.data.heldout, refuse_to_print
    )
    [train_rows] = sets.train
    heldout_rows = sets.heldout["rated.jsonl"]
    assert len(train_rows) + len(heldout_rows) == 20
    assert len(heldout_rows) > 0
    for row in train_rows + heldout_rows:
        number = int(row["where"].partition(":")[2]) - 1
        assert row == {
            "where": f"rated.jsonl:{number + 1}",
            "prompt": [{"role": "user", "content": f"question {number}"}],
            "chosen": f"good {number}",
            "rejected": "poor",
            "margin": 3.5,
        }


def test_a_reward_model_learns_from_the_rows_of_a_new_format(directory, chain):
    """One step from pmp-tiny."""
    shutil.copytree(chain.runs / "pmp-tiny", directory / "runs" / "pmp-tiny")
    write_lines(directory / "rated.jsonl", [rated(number) for number in range(20)])
    overrides = {
        "parents.model": "runs/pmp-tiny",
        "ranking.demonstrations": "",
        "data.batch": 8,
        "steps": 1,
    }
    arguments = [f"--config.{field}={value}" for field, value in overrides.items()]
    assert train.main(["--config", "rated_rm.py", *arguments]) == 0
    assert json.loads((directory / "runs" / "rated-rm" / "summary.json").read_text())["steps"] == 1


def test_without_the_config_file_the_rows_are_no_comparisons(directory):
    expected = "rated.jsonl:1: a row of comparisons needs a field 'chosen'"
    with pytest.raises(UserError, match=expected):
        sources.load("rated.jsonl", "comparisons", "train")


def test_a_file_may_mix_built_in_rows_with_those_of_a_new_format(directory):
    built_in = {"prompt": "a", "chosen": "b", "rejected": "c"}
    write_lines(directory / "mixed.jsonl", [built_in, rated(7), built_in | rated(8)])
    configs.load("rated_rm.py")
    examples = sources.load("mixed.jsonl", "comparisons", "train")
    # Both formats take the third row: they have three fields each, and the last registered wins.
    assert [example["chosen"] for example in examples] == ["b", "good 7", "good 8"]


def test_the_same_format_reads_rows_of_parquet(directory):
    table = pyarrow.Table.from_pylist([rated(3)])
    pyarrow.parquet.write_table(table, directory / "rated.parquet")
    configs.load("rated_rm.py")
    [example] = sources.load("rated.parquet", "comparisons", "train")
    assert example["chosen"] == "good 3"
    assert example["where"] == "rated.parquet: row 1"


def test_a_bad_row_of_a_new_format_is_named_or_skipped(directory):
    same = {"instruction": "a", "responses": ["b", "c"], "ratings": [2, 2]}
    write_lines(directory / "rated.jsonl", [rated(1), same])
    configs.load("rated_rm.py")
    expected = r"rated.jsonl:2: ratings: expected two that differ, found \[2, 2\]"
    with pytest.raises(UserError, match=expected):
        sources.load("rated.jsonl", "comparisons", "train")
    printed = []
    options = sources.ReadOptions(skip_bad_rows=True, say=printed.append)
    examples = sources.load("rated.jsonl", "comparisons", "train", options)
    assert len(examples) == 1
    assert "1 bad rows skipped of 2" in printed[0]


def test_a_config_file_that_is_loaded_twice_registers_its_format_once(directory):
    before = len(formats.FORMATS)
    configs.load("rated_rm.py")
    configs.load("rated_rm.py")
    assert len(formats.FORMATS) == before + 1


def test_a_reader_that_returns_no_example_is_a_user_error_that_names_the_field(directory):
    formats.row_format("comparisons", "instruction", "responses")(lambda row: {"prompt": "a"})
    with pytest.raises(UserError, match="rated.jsonl:1: chosen: expected text, found NoneType"):
        sources.load("rated.jsonl", "comparisons", "train")


def test_an_exception_of_a_reader_names_the_row(directory):
    formats.row_format("comparisons", "instruction")(lambda row: {"prompt": row["question"]})
    expected = (
        r"^rated.jsonl:1: a row format of comparisons: KeyError: 'question' \(test_extending.py:"
    )
    with pytest.raises(UserError, match=expected):
        sources.load("rated.jsonl", "comparisons", "train")


def test_a_format_may_have_a_condition(directory):
    formats.row_format("text", "body", condition=lambda row: row["language"] == "en")(
        lambda row: {"text": row["body"]}
    )
    write_lines(directory / "pages.jsonl", [{"body": "hello", "language": "en"}])
    assert sources.load("pages.jsonl", "text", "train")[0]["text"] == "hello"
    write_lines(directory / "pages.jsonl", [{"body": "bonjour", "language": "fr"}])
    expected = "pages.jsonl:1: text: no row format takes a row with the fields body, language"
    with pytest.raises(UserError, match=expected):
        sources.load("pages.jsonl", "text", "train")


def test_an_unknown_kind_is_a_user_error():
    with pytest.raises(UserError, match="no such kind; did you mean 'comparisons'"):
        formats.row_format("comparison", "a")


# ------------------------------------------------------------------------------------ a new reward


def test_a_reward_scores_texts(directory):
    reward = imported("concise", directory).reward
    responses = ["it is Three .", "four"]
    scores = reward([None, None], responses, answer=["three", "three"], source=["a", "b"])
    assert scores == pytest.approx([0.96, -0.01])


def test_a_server_answers_with_the_scores_of_its_function(directory):
    handler = imported("server", directory).Handler
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Reward(source=f"http://127.0.0.1:{server.server_port}/score")
        endpoint = reward_endpoints.load("ppo.rewards.words.source", source, ["answer"], None)
        prompt = [{"role": "user", "content": "how many are one , two and three ?"}]
        scores = endpoint([{"prompt": prompt, "columns": {"answer": "three"}}], ["it is Three ."])
        server.shutdown()
    np.testing.assert_allclose(scores, [0.96], rtol=1e-6)


# --------------------------------------------------------------------------------- another sampler


PROMPTS = Prompts(
    tokens=np.arange(12).reshape(3, 4), lengths=np.array([4, 3, 2]), index=np.arange(3)
)
SETTINGS = SamplingSettings(
    model=Model(vocab_size=12),
    samples_per_prompt=2,
    response_length=5,
    temperature=1.0,
    top_p=1.0,
    end_tokens=(1,),
)


def test_a_sampler_returns_a_rollout(directory):
    sample = imported("random_words", directory).sample
    rollout = sample({}, PROMPTS, jax.random.key(0), SETTINGS)
    assert rollout.tokens.shape == (6, 9)
    assert rollout.tokens[:, :4].tolist() == np.repeat(PROMPTS.tokens, 2, axis=0).tolist()
    assert rollout.prompt_lengths.tolist() == [4, 4, 3, 3, 2, 2]
    for response, length in zip(rollout.tokens[:, 4:], rollout.lengths, strict=True):
        assert (response == SETTINGS.end_tokens[0]).tolist().index(True) == length - 1
    assert (rollout.logprobs != 0).sum(axis=1).tolist() == rollout.lengths.tolist()
    assert not rollout.truncated.any()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("tokens", np.zeros((6, 8), np.int32), r"tokens is int32\[6, 8\], not integer\[6, 9\]"),
        ("lengths", np.full(6, 6), "lengths from 6 to 6 must lie in 1 to 5"),
        ("lengths", None, r"lengths is object\[\], not integer\[6\]"),
        ("tokens", np.full((6, 9), 99), "tokens from 99 to 99 must lie in 0 to "),
        ("tokens", np.zeros((6, 9), np.int32), r"tokens\[0\] does not begin with the tokens"),
        ("prompt_lengths", np.full(6, 4), r"prompt_lengths\[2\] is 4, the prompt has 3 tokens"),
    ],
)
def test_a_wrong_rollout_is_a_user_error_that_names_the_field(directory, field, value, message):
    sample = imported("random_words", directory).sample

    def sample_wrong(*arguments):
        return dataclasses.replace(sample(*arguments), **{field: value})

    sampler = ExternalSampler(
        spec="random_words:sample",
        function=sample_wrong,
        settings=SETTINGS,
        mesh=sharding.make_mesh(Mesh(data=1, fsdp=1, tensor=1), jax.devices()[:1]),
    )
    with pytest.raises(UserError, match=f"ppo.sampler=random_words:sample: {message}"):
        sampler({}, PROMPTS, jax.random.key(0))


def test_an_exception_of_a_sampler_shows_its_own_frames():
    sampler = ExternalSampler(
        spec="m:f",
        function=lambda *arguments: [][0],
        settings=SETTINGS,
        mesh=sharding.make_mesh(Mesh(data=1, fsdp=1, tensor=1), jax.devices()[:1]),
    )
    expected = r"ppo.sampler=m:f: IndexError: list index out of range \(test_extending.py:"
    with pytest.raises(UserError, match=expected) as caught:
        sampler({}, PROMPTS, jax.random.key(0))
    assert caught.value.details.count("  File ") == 1


# ------------------------------------------------------------------------------------- all in PPO


def run_ppo(directory: Path, chain: Chain, overrides: dict[str, str]) -> Path:
    """Take one step of PPO at the tiny size, on tasks with the reward of the page."""
    for parent in ("sft-tiny", "rm-tiny"):
        shutil.copytree(chain.runs / parent, directory / "runs" / parent)
    write_lines(directory / "tasks.jsonl", TASKS)
    overrides = overrides | {
        "ppo.reward_fn": "concise:reward",
        "data.train": "tasks.jsonl",
        "data.heldout": "tasks.jsonl",
        "data.heldout_share": "0.4",
        "steps": "1",
    }
    arguments = [f"--config.{field}={value}" for field, value in overrides.items()]
    assert train.main(command("ppo-tiny", directory / "runs", *arguments)) == 0
    return directory / "runs" / "ppo-tiny"


def test_ppo_learns_with_the_estimator_the_reward_and_the_sampler_of_the_page(directory, chain):
    finished = run_ppo(
        directory,
        chain,
        {
            "ppo.advantage_estimator": "leave_one_out:leave_one_out",
            "ppo.sampler": "random_words:sample",
        },
    )
    assert json.loads((finished / "summary.json").read_text())["steps"] == 1
    [metrics] = rows(finished / "metrics.jsonl")
    # The responses are not the policy's, so the sampler and the scorer disagree.
    assert metrics["sampler/drift_mean"] > 0.01
    assert metrics["response/truncated"] == 0
    assert metrics["value/skipped"] == 0
    assert rows(finished / "samples.jsonl")
