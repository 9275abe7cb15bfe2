"""The adapters of a run as a PEFT adapter: names, shapes, values, and what peft computes of it."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from test_convert import GOLDEN, same
from test_export import make_run, small, to_hf
from test_models import error
from test_models import run as forward
from test_peft import CONFIG, ENDS, KEY, WEIGHTS, close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignjax import config as configs
from alignjax.config import Lora, Model
from alignjax.data import chat
from alignjax.machine import marker, sharding
from alignjax.models import lora
from alignjax.weights import bases, hf, locations, peft_parameters, roles, score_place
from alignjax.weights.hf_layout import layout_of
from alignjax.weights.peft_adapter import open_adapter
from alignjax.weights.peft_export import AdaptersToWrite, write_adapter


@pytest.mark.parametrize("targets", ["all", "q,v,down"])
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen", "qwen3"])
def test_adapters_go_out_and_come_back_to_the_bit(name, targets, tmp_path):
    model = locations.architecture(GOLDEN / name)
    shapes = {path: x for path, x in layout_of(model, "lm").shapes.items()}
    paths = [path for path in shapes if path.startswith("layers/") and path.endswith("/kernel")]
    if targets != "all":
        paths = [path for path in paths if path.split("/")[-2] in targets.split(",")]
    rng = np.random.default_rng(1)
    arrays = {"head/kernel": rng.normal(size=(model.d_model, 1)), "head/bias": np.float32([0.5])}
    for path in paths:
        layers, *sizes = shapes[path]
        inputs = sizes[: 2 if "out/" in path else 1]
        outputs = sizes[len(inputs) :]
        arrays[path.replace("kernel", "lora_a")] = rng.normal(size=(layers, *inputs, 3))
        arrays[path.replace("kernel", "lora_b")] = rng.normal(size=(layers, 3, *outputs))
    arrays = {path: x.astype(np.float32) for path, x in arrays.items()}
    written = AdaptersToWrite(
        model=model, head="scalar", paths=paths, rank=3, alpha=6.0, base=str(GOLDEN / name)
    )
    (tmp_path / "out").mkdir()
    size = write_adapter(written, arrays.__getitem__, tmp_path / "out")
    assert 0 < size < (tmp_path / "out" / WEIGHTS).stat().st_size
    back = open_adapter(tmp_path / "out", model)
    # In some families q, k and v are one module; those without an adapter have zeros there.
    assert set(back.parameters) - set(paths) <= {"layers/attention/k/kernel"}
    head = back.read_head()
    assert np.array_equal(head["kernel"], arrays["head/kernel"]) and head["bias"] == 0.5
    for path in paths:
        parameter = back.parameters[path]
        factors = parameter.read()
        lora_a = arrays[path.replace("kernel", "lora_a")]
        lora_b = arrays[path.replace("kernel", "lora_b")]
        if parameter.rank == 3:
            assert np.array_equal(factors.lora_a, lora_a)
            assert np.array_equal(factors.lora_b, lora_b)
        assert {part.scale for part in parameter.layers} == {2.0}
        rows = (len(factors.lora_b), -1, factors.lora_b.shape[1])
        ours = lora_a.reshape(*rows[:2], 3) @ lora_b.reshape(rows[0], 3, -1)
        theirs = factors.lora_a.reshape(rows) @ factors.lora_b.reshape(rows[0], rows[2], -1)
        assert np.allclose(ours, theirs, atol=1e-6)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    if name == "qwen":
        joined = 3 if targets == "all" else 2
        assert config["rank_pattern"] == {"c_attn": 3 * joined}
        expected = (
            ["c_attn", "c_proj", "w2", "w1"] if targets == "all" else ["c_attn", "mlp.c_proj"]
        )
        assert config["target_modules"] == expected
    elif name == "phi3":
        joined = {"qkv_proj": 9, "gate_up_proj": 6} if targets == "all" else {"qkv_proj": 6}
        assert config["rank_pattern"] == joined
        others = {"o_proj", "down_proj"} if targets == "all" else {"down_proj"}
        assert set(config["target_modules"]) == others | joined.keys()
    else:
        expected = list(ENDS) if targets == "all" else ["q_proj", "v_proj", "down_proj"]
        assert config["target_modules"] == expected and config["rank_pattern"] == {}


# ------------------------------------------------------------------------------ runs with adapters

SETTINGS = Lora(rank=3, alpha=6.0, targets="q,v,down")


@dataclass(frozen=True, kw_only=True)
class AdaptedRun:
    """A complete run with adapters, and its base as a checkpoint."""

    directory: Path
    base: Path
    model: Model
    trained: dict


def adapters(model, params, head):
    """Return random adapters of a model, and the head of a scalar role."""
    drawn = lora.init(SETTINGS, params["layers"], KEY)
    rng = np.random.default_rng(3)
    trained = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, drawn)
    if head == "scalar":
        kernel = rng.normal(size=(model.d_model, 1)).astype(np.float32)
        trained["head"] = {"kernel": kernel, "bias": np.float32([0.5])}
    return trained


def make_adapted_run(directory, tokenizer, head, base, model, trained):
    """Write what a complete run with adapters leaves whose base is `base`."""
    stage = "lm" if head == "lm" else "ranking"
    make_run(directory, tokenizer, stage, model, {"model": trained})
    config = configs.Config(stage=stage, model=model, lora=SETTINGS)
    config.parents = {"model": str(base)}
    (directory / "config.json").write_text(configs.to_json(config))
    entry = {"place": str(base), "item": "", "contents": ""}
    if locations.is_run(base):
        entry = {"place": f"../{base.name}", "item": "model", "contents": bases.contents_of(base)}
    (directory / marker.NAME).write_text(marker.dumps({"run": "x", "bases": {"model": entry}}))
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    chat.train_tokenizer(["Some words to learn from."], directory, 300)
    return directory


@pytest.fixture(params=["lm", "scalar"])
def adapted(request, tokenizer, tmp_path):
    model, params = small("lm")
    hf.save_hf(model, params, tmp_path / "base")
    trained = adapters(model, params, request.param)
    arguments = (tokenizer, request.param, tmp_path / "base", model, trained)
    directory = make_adapted_run(tmp_path / "run", *arguments)
    return AdaptedRun(directory=directory, base=tmp_path / "base", model=model, trained=trained)


def load(directory, head):
    model = locations.architecture(directory)
    return roles.load_trained(model, head, sharding.make_mesh(configs.Mesh()), directory)


def head_of(run):
    return "lm" if locations.read_config(run.directory)["stage"] == "lm" else "scalar"


def test_a_run_goes_out_as_an_adapter_and_merged(adapted, tmp_path, capsys):
    head = head_of(adapted)
    out = tmp_path / "adapter"
    assert to_hf(adapted.directory, out) == 0
    printed = capsys.readouterr().out
    assert f"adapters of model of step 7 written to {out}" in printed
    names = {path.name for path in out.iterdir()}
    assert {CONFIG, WEIGHTS, "README.md", "tokenizer.json", "alignjax.json"} <= names
    assert not {"config.json", "generation_config.json"} & names
    config = json.loads((out / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(adapted.base)
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert config["task_type"] == ("CAUSAL_LM" if head == "lm" else "SEQ_CLS")
    card = (out / "README.md").read_text()
    assert f"base_model: {adapted.base}" in card and "PeftModel.from_pretrained(base" in card
    tree = peft_parameters.factor_tree(
        open_adapter(out, adapted.model), sharding.make_mesh(configs.Mesh())
    )
    assert same(adapted.trained, tree)
    joint = locations.local_directory(str(out))  # which names its base
    assert bases.adapters_of(joint) == SETTINGS
    own = load(adapted.directory, head)
    assert close(load(joint, head), own)
    assert to_hf(adapted.directory, tmp_path / "merged", "--merged") == 0
    merged = load(tmp_path / "merged", head)
    assert close(merged, own)
    if head == "scalar":
        own_tokenizer = chat.load_tokenizer(out)
        assert score_place.ending_of(joint, own_tokenizer) == (chat.end_token(own_tokenizer),)


@pytest.mark.parametrize("adapted", ["lm"], indirect=True)
def test_an_adapter_of_a_base_that_peft_cannot_load_needs_another_name_for_it(
    adapted, tokenizer, tmp_path, capsys
):
    model, params = small("lm", 7)
    params["norm"]["scale"] = params["norm"]["scale"] * 1.25
    base = make_run(tmp_path / "full", tokenizer, "lm", model, {"model": params})
    arguments = (tokenizer, "lm", base, model, adapted.trained)
    child = make_adapted_run(tmp_path / "child", *arguments)
    assert to_hf(child, tmp_path / "out") == 2
    assert f"the base of its adapters is the run {base}; write it as" in capsys.readouterr().err
    assert to_hf(base, tmp_path / "exported", "--dtype=bfloat16") == 0
    assert to_hf(child, tmp_path / "out", "--base", str(tmp_path / "exported")) == 0
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "exported")
    capsys.readouterr()
    assert to_hf(child, tmp_path / "other", "--base", str(adapted.base)) == 2
    assert "its norm/scale differs from that of" in capsys.readouterr().err
    assert to_hf(base, tmp_path / "other", "--merged") == 2
    assert "lora.rank=0, so there are no adapters" in capsys.readouterr().err
    assert to_hf(child, tmp_path / "merged", "--merged") == 0
    assert close(load(tmp_path / "merged", "lm"), load(child, "lm"))


def test_peft_computes_the_same_of_an_adapter_and_of_the_merged_model(adapted, tmp_path):
    """Live, with torch."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    head = head_of(adapted)
    loader = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    options = {"num_labels": 1, "pad_token_id": 0} if head == "scalar" else {}
    assert to_hf(adapted.directory, tmp_path / "adapter") == 0
    assert to_hf(adapted.directory, tmp_path / "merged", "--merged") == 0
    base = loader.from_pretrained(adapted.base, dtype=torch.float32, **options)
    with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = loader.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    params = load(adapted.directory, head)
    tokens = np.random.default_rng(2).integers(3, 300, (3, 40)).astype(np.int32)
    segments = np.ones_like(tokens)
    ours = forward(adapted.model, params, tokens, segments)
    if head == "scalar":
        ours = ours[:, -1]
    for theirs in (with_adapter, merged):
        with torch.no_grad():
            logits = theirs(torch.tensor(tokens).long()).logits.numpy()
        assert error(ours, logits) < 2e-5
