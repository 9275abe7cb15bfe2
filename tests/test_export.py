"""A run as a Hugging Face checkpoint: its files, little memory, and user errors in one line."""

import gc
import json
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from test_convert import GOLDEN, same
from test_models import error, family_fields, tiny
from test_models import run as forward
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignjax import config as configs
from alignjax import convert
from alignjax.data import chat
from alignjax.machine import sharding
from alignjax.models import families
from alignjax.weights import checkpoint, hf

MESH = sharding.make_mesh(configs.Mesh(data=1, fsdp=4, tensor=2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory with a ChatML tokenizer: its pad is 0, its end token 2."""
    directory = tmp_path_factory.mktemp("tokenizer")
    chat.train_tokenizer(["Some words to learn from."], directory, 300)
    return directory


def make_run(directory, tokenizer, stage, model, items):
    """Write what a complete run leaves, saved from eight devices; `items` are those of Orbax."""
    directory.mkdir()
    parents = dict.fromkeys(configs.ROLES[stage], "none.py")
    config = configs.Config(stage=stage, model=model, parents=parents)
    (directory / "config.json").write_text(configs.to_json(config))
    (directory / "summary.json").write_text('{"steps": 7}')
    shutil.copytree(tokenizer, directory / "tokenizer")
    placed = {
        name: jax.tree.map(jax.device_put, x, sharding.param_shardings(x, MESH))
        for name, x in items.items()
    }
    saved = checkpoint.Checkpoints(directory / "checkpoints", 1)
    saved.save(7, placed)
    saved.close()
    return directory


def small(head="lm", seed=0, **changes):
    return tiny(seed, head, vocab_size=320, **changes)


@dataclass(frozen=True, kw_only=True)
class PPORun:
    """A complete PPO run, and the parameters that it holds."""

    directory: Path
    model: configs.Model
    policy: dict
    value: dict


@pytest.fixture(scope="module")
def ppo(tmp_path_factory, tokenizer):
    model, policy = small()
    _, value = small("scalar", 1)
    value["head"]["bias"] = np.float32([0.75])
    items = {"policy": policy, "value": value}
    directory = make_run(tmp_path_factory.mktemp("runs") / "ppo", tokenizer, "ppo", model, items)
    return PPORun(directory=directory, model=model, policy=policy, value=value)


def read_json(path):
    return json.loads(path.read_text())


def to_hf(run, out, *more) -> int:
    return convert.main(["--to_hf", str(run), "--out", str(out), *more])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_run_goes_out_whole(family, tokenizer, tmp_path, capsys):
    flags = family_fields(family)
    kv_heads = 4 if family == "qwen" else 2
    model, params = small(family=family, kv_heads=kv_heads, **flags)
    run = make_run(tmp_path / "sft", tokenizer, "lm", model, {"model": params})
    out = tmp_path / "deep" / "out"
    assert to_hf(run, out) == 0
    again, back = hf.load_hf(out, "lm")
    assert again == model and same(params, back)
    config = read_json(out / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 2, 0)
    assert read_json(out / "generation_config.json") == {
        "bos_token_id": None,
        "eos_token_id": [2, 0],  # a model of plain text ends at the token between documents too
        "pad_token_id": 0,
    }
    kept = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= kept.keys()
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            *kept,
            "README.md",
            "alignjax.json",
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert "model of step 7 written to" in capsys.readouterr().out


def test_each_role_of_ppo_goes_out(ppo, tmp_path, capsys):
    run = ppo.directory
    (tmp_path / "default").mkdir()  # --out may be an empty directory
    assert to_hf(run, tmp_path / "default") == to_hf(run, tmp_path / "policy", "--role=policy") == 0
    assert "score.bias" not in capsys.readouterr().out
    assert to_hf(run, tmp_path / "value", "--role=value", "--dtype=bfloat16") == 0
    assert (
        "score.bias=0.75 is written, but transformers does not read it" in capsys.readouterr().out
    )
    assert same(hf.load_hf(tmp_path / "default", "lm")[1], ppo.policy)
    assert same(hf.load_hf(tmp_path / "policy", "lm")[1], ppo.policy)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), ppo.value)
    assert same(hf.load_hf(tmp_path / "value", "scalar")[1], rounded)
    config = read_json(tmp_path / "value/config.json")
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert len(config["id2label"]) == 1
    assert config["pad_token_id"] == 0 and config["torch_dtype"] == "bfloat16"
    assert not (tmp_path / "value/generation_config.json").exists()


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_transformers_computes_the_same_and_saves_what_we_wrote(family, head, tokenizer, tmp_path):
    """Live, with torch. transformers has no class for "qwen", and we run no checkpoint's code."""
    torch = pytest.importorskip("torch")
    model, params = small(head, family=family, **families.FAMILIES[family].flags)
    stage = "lm" if head == "lm" else "ranking"
    loader = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    run = make_run(tmp_path / "run", tokenizer, stage, model, {"model": params})
    assert to_hf(run, tmp_path / "out") == 0
    theirs, report = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= {"score.bias"}
    tokens = np.random.default_rng(2).integers(3, 300, (3, 40)).astype(np.int32)
    segments = (np.arange(40) < np.array([[40], [17], [29]])).astype(np.int32)
    tokens[segments == 0] = 0  # pads, after an end token
    tokens[np.arange(3), segments.sum(1) - 1] = 2
    with torch.no_grad():
        logits = theirs.eval()(
            torch.tensor(tokens).long(), attention_mask=torch.tensor(segments)
        ).logits.numpy()
    ours = forward(model, params, tokens, segments)  # of a scalar head, without its bias
    if head == "lm":
        assert theirs.generation_config.eos_token_id == [2, 0]
        assert error(ours[segments > 0], logits[segments > 0]) < 2e-5
    else:
        assert theirs.config.num_labels == 1
        assert error(ours[np.arange(3), segments.sum(1) - 1], logits) < 2e-5
        params["head"]["bias"] = np.zeros(1, np.float32)  # theirs has none
    theirs.save_pretrained(tmp_path / "saved")
    assert same(hf.load_hf(tmp_path / "saved", head)[1], params)


def test_a_reward_model_never_pads_with_its_end_token(tokenizer, tmp_path):
    """A classifier scores the last token that isn't the pad, which must be the end token."""
    changed = AutoTokenizer.from_pretrained(str(tokenizer))
    changed.pad_token = chat.END
    changed.save_pretrained(tmp_path / "tokenizer")
    model, params = small("scalar")
    run = make_run(tmp_path / "rm", tmp_path / "tokenizer", "ranking", model, {"model": params})
    assert to_hf(run, tmp_path / "out") == 0
    pad = read_json(tmp_path / "out/config.json")["pad_token_id"]
    assert pad == 1 and chat.load_tokenizer(tmp_path / "out").pad_token_id == pad
    assert same(hf.load_hf(tmp_path / "out", "scalar")[1], params)


def test_generation_ends_at_either_end_token(tokenizer, tmp_path):
    """The tokenizer's end token need not be the one that ends the assistant's turn."""
    changed = AutoTokenizer.from_pretrained(str(tokenizer))
    changed.eos_token = chat.PAD
    changed.add_special_tokens({"additional_special_tokens": [chat.START, chat.END]})
    changed.save_pretrained(tmp_path / "tokenizer")
    model, params = small()
    run = make_run(tmp_path / "sft", tmp_path / "tokenizer", "lm", model, {"model": params})
    assert to_hf(run, tmp_path / "out") == 0
    assert read_json(tmp_path / "out/config.json")["eos_token_id"] == 2
    assert read_json(tmp_path / "out/generation_config.json")["eos_token_id"] == [2, 0]


def test_exporting_reads_the_checkpoint_an_array_at_a_time(ppo, tmp_path, monkeypatch):
    """When an array is read, none that was read before is in memory.

    In qwen2 no two parameters share a tensor.
    """
    restore = checkpoint.restore_array
    shapes = hf.layout_of(ppo.model, "lm").shapes
    references = []
    reads = []

    def watched(item, path):
        reads.append((item.name, path))
        gc.collect()  # Orbax leaves what it has read in reference cycles
        assert all(ref() is None for ref in references)
        array = restore(item, path)
        assert array.shape == shapes[path]
        references.append(weakref.ref(array))
        return array

    monkeypatch.setattr(checkpoint, "restore_array", watched)
    assert to_hf(ppo.directory, tmp_path / "out") == 0
    assert sorted(reads) == sorted(("policy", path) for path in shapes)


def test_an_interrupted_export_does_not_look_whole(ppo, tmp_path, monkeypatch):
    restore = checkpoint.restore_array

    def interrupted(item, path):
        if path == "norm/scale":
            raise KeyboardInterrupt
        return restore(item, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "restore_array", interrupted)
        assert to_hf(ppo.directory, tmp_path / "out") == 130
    assert list(tmp_path.iterdir()) == []
    assert to_hf(ppo.directory, tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_mistakes_on_the_command_line_are_one_line(ppo, tokenizer, tmp_path, capsys):
    run = ppo.directory
    other = make_run(tmp_path / "sft", tokenizer, "lm", ppo.model, {"model": ppo.policy})
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("kept")

    def fails(*arguments):
        before = sorted(tmp_path.rglob("*"))
        assert to_hf(*arguments) == 2 and sorted(tmp_path.rglob("*")) == before
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("alignjax: ") and printed.err.count("\n") == 1
        return printed.err

    assert f"--out {full}: already exists" in fails(run, full)
    assert f"--out {full / 'file'}: this is a file" in fails(run, full / "file")
    assert "--role value: " in fails(other, tmp_path / "out", "--role=value")
    assert "--role policy: " in fails(other, tmp_path / "out", "--role=policy")
    assert "no config.json there" in fails(tmp_path, tmp_path / "out")
    assert "config.json names no stage" in fails(GOLDEN / "qwen2", tmp_path / "out")
    (other / "summary.json").unlink()
    assert "this run is not complete" in fails(other, tmp_path / "out")
    (other / "config.json").write_text("{")
    assert "config.json: not JSON" in fails(other, tmp_path / "out")
    assert "argument --dtype: invalid choice: 'float16'" in fails(
        run, tmp_path / "out", "--dtype=float16"
    )


def test_a_damaged_checkpoint_is_named(ppo, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(ppo.directory, run)
    for path in (run / "checkpoints/7/policy").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-5])
    assert to_hf(run, tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert str(run / "checkpoints/7/policy") in printed and "can't be read" in printed
    assert printed.count("\n") == 1
    shutil.rmtree(run / "checkpoints")
    assert to_hf(run, tmp_path / "out") == 2
    assert "checkpoints/7: the last checkpoint of this run is missing" in capsys.readouterr().err
