"""A module outside the package registers a model family, and its checkpoints train and export."""

import importlib
import json
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_models import error, run, tiny, words

from alignjax import config as configs
from alignjax import convert, train
from alignjax.config import Mesh, UserError
from alignjax.data import chat
from alignjax.machine import sharding
from alignjax.models import families
from alignjax.weights import hf, roles

PHI3 = """
from alignjax.models.families import Family, llama_like, register

FUSED = {
    "layers/attention/q/kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_up_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.gate_up_proj.weight",
}
FIXED_CONFIG = {"sliding_window": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def read_config(config):
    for field, value in FIXED_CONFIG.items():
        config.allow(field, value)
    return llama_like.read_config_without_bias(config)


def write_config(model):
    return llama_like.write_config(model) | FIXED_CONFIG


PHI3 = register(
    Family(
        name="phi3",
        flags={"qkv_bias": False, "qk_norm": False},
        tensors=llama_like.TENSORS | FUSED,
        classes={"lm": "Phi3ForCausalLM", "scalar": "Phi3ForSequenceClassification"},
        read_config=read_config,
        write_config=write_config,
        presets={"phi-small": {"vocab_size": 320, "d_model": 32, "layers": 2}},
    )
)
"""
PHI_SFT = """
import phi3

from alignjax import config as configs


def config(variant):
    c = configs.load("sft.py:tiny")
    c.name = "phi-sft"
    c.parents = {"model": "phi-tiny"}
    c.steps = 2
    return c
"""
SENTENCES = ["the cat is big .", "sort these words : one two three", "how many cups are there ?"]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A working directory with both modules; what they register is forgotten after the test."""
    (tmp_path / "phi3.py").write_text(PHI3)
    (tmp_path / "phi_sft.py").write_text(PHI_SFT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(families, "PRESETS", dict(families.PRESETS))
    monkeypatch.setitem(configs.CHOICES, "model.family", configs.CHOICES["model.family"])
    yield tmp_path
    sys.modules.pop("phi3", None)


def write_as_phi3(llama, params, directory):
    """Write a Llama's parameters as transformers writes a Phi-3, with the safetensors library."""
    hf.save_hf(llama, params, directory)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(llama.layers):
        prefix = f"model.layers.{layer}"
        fuse(tensors, f"{prefix}.self_attn.qkv_proj", f"{prefix}.self_attn", "qkv")
        fuse(tensors, f"{prefix}.mlp.gate_up_proj", f"{prefix}.mlp", ("gate", "up"))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "resid_pdrop": 0.0}
    (directory / "config.json").write_text(json.dumps(config))


def fuse(tensors, fused, prefix, parts):
    """Replace projections by one tensor that holds them one below the other."""
    rows = [tensors.pop(f"{prefix}.{part}_proj.weight") for part in parts]
    tensors[f"{fused}.weight"] = np.concatenate(rows)


def small_llama():
    return tiny(family="llama", qkv_bias=False, vocab_size=512, d_ff=64, max_length=64)


def test_a_family_from_outside_computes_what_the_same_weights_as_a_llama_do(directory):
    importlib.import_module("phi3")
    llama, params = small_llama()
    write_as_phi3(llama, params, directory / "phi-tiny")
    model, loaded = hf.load_hf(directory / "phi-tiny", "lm")
    assert model.family == "phi3"
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    placed = roles.load(model, "lm", mesh, jax.random.key(0), directory / "phi-tiny")
    tokens = words(0, 2, 9)
    ours = run(model, placed, tokens, np.ones_like(tokens))
    assert error(ours, run(llama, params, tokens, np.ones_like(tokens))) < 2e-6

    hf.save_hf(model, loaded, directory / "again")
    first = load_file(directory / "phi-tiny" / "model.safetensors")
    again = load_file(directory / "again" / "model.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert families.PRESETS["phi-small"].family == "phi3"


def test_a_family_from_outside_refuses_what_it_does_not_compute(directory):
    importlib.import_module("phi3")
    llama, params = small_llama()
    write_as_phi3(llama, params, directory / "phi-tiny")
    config = json.loads((directory / "phi-tiny" / "config.json").read_text())
    with pytest.raises(UserError, match="config.json: sliding_window=2047 is not supported"):
        families.model_from_hf(config | {"sliding_window": 2047})


def test_a_run_starts_from_a_family_from_outside_and_is_exported(directory):
    """The config file imports the module that registers the family."""
    with pytest.raises(UserError, match="model.family='phi3' must be one of 'qwen', 'qwen2'"):
        configs.load("sft.py:tiny", {"model.family": "phi3"})
    llama, params = small_llama()
    write_as_phi3(llama, params, directory / "phi-tiny")
    chat.train_tokenizer(SENTENCES, directory / "phi-tiny", 300)
    arguments = ["--config", "phi_sft.py", "--workdir", "runs/phi-sft"]
    assert train.main(arguments) == 0
    exported = ["--to_hf", "runs/phi-sft", "--out", "exported"]
    assert convert.main(exported) == 0
    model, _ = hf.load_hf(directory / "exported", "lm")
    assert model.family == "phi3" and model.layers == llama.layers
    config = json.loads((directory / "exported" / "config.json").read_text())
    assert config["architectures"] == ["Phi3ForCausalLM"] and config["resid_pdrop"] == 0.0


def test_the_names_that_a_config_accepts_are_those_of_the_families():
    assert configs.CHOICES["model.family"] == tuple(families.FAMILIES)
