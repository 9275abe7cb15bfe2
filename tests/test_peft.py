"""PEFT adapters as parents: merged exactly, or refused in one line that says why."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import bad_inputs
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import GOLDEN
from test_models import LM

from alignjax import inference, plan
from alignjax.config import Config, Lora, Mesh, UserError
from alignjax.data import chat
from alignjax.machine import sharding
from alignjax.models import families, lora
from alignjax.runs import lineage
from alignjax.weights import (
    bases,
    hf,
    locations,
    peft_config,
    role_reader,
    roles,
    score_place,
)
from alignjax.weights.hf_layout import layout_of

KEY = jax.random.key(0)
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
ENDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULTS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 3,
    "lora_alpha": 6,
    "target_modules": list(ENDS),
    "base_model_name_or_path": None,
    "lora_dropout": 0.1,
    "qalora_group_size": 16,
    "megatron_core": "megatron.core",
    "loftq_config": {},
}


def modules_of(base, model):
    """Return module name -> [outputs, inputs] of the layers' products in a checkpoint."""
    layout = layout_of(model, "lm")
    return {
        tensor.name.removesuffix(".weight"): layout.file_shape(tensor)
        for tensor in layout.tensors
        if tensor.place and tensor.paths[0].endswith("kernel")
    }


def write_adapter(directory, base, modules, extra=None, **fields):
    """Write an adapter of some modules, name -> rank, with random factors; return its tensors."""
    directory.mkdir()
    shapes = modules_of(base, locations.architecture(base))
    rng = np.random.default_rng(5)
    tensors = dict(extra or {})
    for module, rank in modules.items():
        outputs, inputs = shapes[module]
        for name, shape in {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}.items():
            tensors[f"{PREFIX}{module}.{name}.weight"] = rng.normal(size=shape).astype(np.float32)
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(DEFAULTS | fields))
    return tensors


def merged(base, tensors, scales, tmp_path):
    """Return the parameters of a base whose files have the products added, by numpy alone."""
    copy = shutil.copytree(base, tmp_path / "merged")
    weights = load_file(copy / "model.safetensors")
    for module, scale in scales.items():
        down = tensors[f"{PREFIX}{module}.lora_A.weight"].astype(np.float64)
        up = tensors[f"{PREFIX}{module}.lora_B.weight"].astype(np.float64)
        name = f"{module}.weight"
        weights[name] = (weights[name] + scale * up @ down).astype(np.float32)
    save_file(weights, copy / "model.safetensors")
    return hf.load_hf(copy, "lm")[1]


def close(ours, theirs):
    return jax.tree.all(
        jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-6, atol=2e-6), ours, theirs)
    )


def load(spec, head="lm", mesh=Mesh()):  # noqa: B008
    directory = locations.local_directory(str(spec))
    model = locations.architecture(directory)
    return roles.load(model, head, sharding.make_mesh(mesh), KEY, directory)


@pytest.mark.parametrize("name", [*(name for name in LM if name != "qwen2_yarn"), "phi3"])
def test_an_adapter_of_every_family_is_added_to_its_base(name, tmp_path):
    base = GOLDEN / name
    modules = dict.fromkeys(modules_of(base, locations.architecture(base)), 3)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    tensors = write_adapter(tmp_path / "adapter", base, modules, target_modules=targets)
    scales = dict.fromkeys(modules, 2.0)
    expected = merged(base, tensors, scales, tmp_path)
    mesh = Mesh(data=1, fsdp=4, tensor=2) if name == "qwen2" else Mesh()
    assert close(load(f"{base}+{tmp_path / 'adapter'}", mesh=mesh), expected)


LAYER = "model.layers.{}.{}"
Q, DOWN = "self_attn.q_proj", "mlp.down_proj"


@pytest.mark.parametrize(
    ("fields", "ranks", "scales"),
    [
        ({"target_modules": "all-linear"}, None, 2.0),
        ({"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"}, None, 2.0),
        ({"exclude_modules": ["mlp.up_proj"], "use_rslora": True}, "no up", 6 / math.sqrt(3)),
        ({"target_modules": [Q], "layers_to_transform": [1]}, {LAYER.format(1, Q): 3}, 2.0),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
            {LAYER.format(0, Q): 3},
            2.0,
        ),
        (
            {
                "target_modules": ["q_proj", "down_proj"],
                "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 1},
                "alpha_pattern": {"mlp.down_proj": 2},
            },
            {
                LAYER.format(0, Q): 5,
                LAYER.format(1, Q): 5,
                LAYER.format(0, DOWN): 3,
                LAYER.format(1, DOWN): 1,
            },
            {LAYER.format(0, DOWN): 2 / 3, LAYER.format(1, DOWN): 2.0, "": 6 / 5},
        ),
    ],
)
def test_fields_that_choose_modules_ranks_and_scales_mean_what_peft_means(
    fields, ranks, scales, tmp_path
):
    base = GOLDEN / "qwen2"
    everything = dict.fromkeys(modules_of(base, locations.architecture(base)), 3)
    if ranks is None:
        ranks = everything
    elif ranks == "no up":
        ranks = {module: 3 for module in everything if not module.endswith("up_proj")}
    tensors = write_adapter(tmp_path / "adapter", base, ranks, **fields)
    if not isinstance(scales, dict):
        scales = {"": scales}
    by_module = {module: scales.get(module, scales.get("")) for module in ranks}
    expected = merged(base, tensors, by_module, tmp_path)
    assert close(load(f"{base}+{tmp_path / 'adapter'}"), expected)


def simple(tmp_path, name="qwen2", **fields):
    """Write an adapter of all queries; return its directory."""
    base = GOLDEN / name
    modules = [module for module in modules_of(base, locations.architecture(base)) if Q in module]
    fields = {"target_modules": ["q_proj"]} | fields
    write_adapter(tmp_path / "adapter", base, dict.fromkeys(modules, 3), **fields)
    return tmp_path / "adapter"


def test_an_adapter_alone_is_read_with_the_base_that_it_names(tmp_path):
    adapter = simple(tmp_path, base_model_name_or_path=str(GOLDEN / "qwen2"))
    directory = locations.local_directory(str(adapter))
    assert directory == locations.local_directory(f"{GOLDEN / 'qwen2'}+{adapter}")
    assert not locations.is_run(directory)
    assert lineage.local_architecture(str(adapter)) == locations.architecture(GOLDEN / "qwen2")
    assert plan.architecture(str(adapter)).family == "qwen2"
    assert close(load(adapter), load(f"{GOLDEN / 'qwen2'}+{adapter}"))


def test_bases_and_adapters_come_from_the_hub(tmp_path, monkeypatch):
    adapter = simple(tmp_path, base_model_name_or_path="Org/Base", revision="v2")
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append((name, revision))
        return str(adapter if name == "Org/Adapter" else GOLDEN / "qwen2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    locations.download.cache_clear()
    expected = Path(f"{GOLDEN / 'qwen2'}+{adapter}")
    assert locations.local_directory("hf://Org/Adapter@main") == expected
    assert asked == [("Org/Adapter", "main"), ("Org/Base", "v2")]
    assert locations.local_directory("hf://Other/Base@a+hf://Org/Adapter") == expected
    assert locations.local_directory(f"hf://Other/Base@a+{adapter}") == expected
    assert asked[2:] == [("Other/Base", "a"), ("Org/Adapter", None)]
    assert plan.architecture("hf://Qwen/Qwen-7B+hf://Org/Adapter") is families.PRESETS["qwen-7b"]
    locations.download.cache_clear()


def test_the_adapter_of_a_classifier_brings_its_head(tmp_path):
    score = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    head = {f"{PREFIX}score.weight": score}
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"], "extra": head}
    adapter = simple(tmp_path, **fields)
    directory = locations.local_directory(f"{GOLDEN / 'qwen2'}+{adapter}")
    params = load(directory, "scalar")
    assert np.array_equal(params["head"]["kernel"], score.T) and params["head"]["bias"] == 0
    assert hf.head_of(directory) == "scalar" and inference.is_reward_model(directory)
    assert not score_place.is_our_export(directory, {})
    model = locations.architecture(directory)
    with pytest.raises(UserError, match="a language model is wanted, but the adapter is one of"):
        roles.load(model, "lm", sharding.make_mesh(Mesh()), KEY, directory)


def test_an_adapters_own_tokenizer_counts(tmp_path):
    base = shutil.copytree(GOLDEN / "qwen2", tmp_path / "base")
    adapter = simple(tmp_path)
    directory = locations.local_directory(f"{base}+{adapter}")
    assert locations.tokenizer_source(directory) == base
    chat.train_tokenizer(["Some words to learn from."], adapter, 300)
    assert locations.tokenizer_source(directory) == adapter


def refusal(adapter, base=GOLDEN / "qwen2"):
    """Return the one line by which an adapter is refused."""
    with pytest.raises(UserError) as raised:
        load(f"{base}+{adapter}")
    message = str(raised.value)
    assert "\n" not in message and str(adapter) in message
    return message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=true is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported, only 'LORA'"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS' is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported, only 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=true is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save='embed_tokens' is not supported"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=[1, 2] is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]] is not supported"),
        ({"invented_later": 1}, "invented_later=1 is not supported"),
        ({"target_modules": ["q_proj", "lm_head"]}, "has lm_head, but only products within layers"),
        ({"target_modules": ["c_attn"]}, "has no place in an adapter of 'qwen2'"),
        ({"target_modules": None}, "target_modules=null must be a list of names or a text"),
        ({"target_modules": "("}, "target_modules='(' is not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj=0 must be a whole number"),
        ({"r": 4}, "q_proj.lora_A.weight is [3, 32], [4, 32] wanted"),
        ({"r": True}, "r=true must be a whole number"),
        ({"lora_alpha": "x"}, "lora_alpha='x' must be a finite number"),
        ({"target_modules": ["q_proj", "up_proj"]}, "there is no tensor base_model.model.model."),
        ({"task_type": "SEQ_CLS"}, "there is no tensor base_model.model.score.weight [1, 32]"),
    ],
)
def test_what_is_not_computed_is_refused_by_field_and_value(fields, message, tmp_path):
    assert message in refusal(simple(tmp_path, **fields))


def test_damaged_and_mismatched_adapters_are_one_line(tmp_path):
    adapter = simple(tmp_path)
    shallow = shutil.copytree(GOLDEN / "qwen2", tmp_path / "shallow")
    config = json.loads((shallow / "config.json").read_text())
    weights = load_file(shallow / "model.safetensors")
    (shallow / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 1, "layer_types": None})
    )
    kept = {name: x for name, x in weights.items() if "layers.1." not in name}
    save_file(kept, shallow / "model.safetensors")
    assert "layers.1.self_attn.q_proj.lora_A.weight [3, 32] has no place" in refusal(
        adapter, shallow
    )
    assert "has no place" in refusal(adapter, GOLDEN / "qwen")
    tensors = load_file(adapter / WEIGHTS)
    narrow = {name: x[:, :24] if "lora_A" in name else x for name, x in tensors.items()}
    save_file({name: x.copy() for name, x in narrow.items()}, adapter / WEIGHTS)
    assert "is [3, 24], [3, 32] wanted" in refusal(adapter)
    (adapter / WEIGHTS).write_bytes(b"\0" * 40)
    assert "not a whole safetensors file" in refusal(adapter)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert "there is no file adapter_model.safetensors (pickled" in refusal(adapter)
    (adapter / "adapter_model.bin").unlink()
    assert refusal(adapter).endswith("there is no file adapter_model.safetensors")
    for content in (b"[]", b"{", b"\xff"):
        (adapter / CONFIG).write_bytes(content)
        assert CONFIG in refusal(adapter)
    (adapter / CONFIG).unlink()
    assert "so no PEFT adapter" in refusal(adapter)


def test_bases_that_cannot_be_meant_are_one_line(tmp_path):
    adapter = simple(tmp_path)
    with pytest.raises(UserError, match="names no base; name the base too: BASE"):
        locations.local_directory(str(adapter))
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    with pytest.raises(UserError, match="is an adapter itself"):
        locations.local_directory(f"{adapter}+{other}")
    with pytest.raises(UserError, match="no config.json there"):
        locations.local_directory(f"{tmp_path / 'nowhere'}+{other}")
    (other / CONFIG).write_text(json.dumps(DEFAULTS | {"base_model_name_or_path": "/gone/away"}))
    with pytest.raises(UserError, match="'/gone/away' is no directory here, and no name on the"):
        locations.local_directory(str(other))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"stage": "lm"}')
    with pytest.raises(UserError, match="is a run; write it as one with alignjax.convert first"):
        locations.local_directory(f"{run}+{adapter}")


def test_a_directory_whose_name_has_a_plus_is_itself(tmp_path):
    plus = shutil.copytree(GOLDEN / "qwen2", tmp_path / "c++")
    assert locations.local_directory(str(plus)) == plus
    assert locations.adapted_model(plus) is None
    adapter = simple(tmp_path)
    assert close(load(f"{plus}+{adapter}"), load(f"{GOLDEN / 'qwen2'}+{adapter}"))


def test_a_child_with_the_same_form_goes_on_with_an_adapter(tmp_path):
    base = GOLDEN / "qwen2"
    model = locations.architecture(base)
    modules = [module for module in modules_of(base, model) if Q in module]
    write_adapter(tmp_path / "adapter", base, dict.fromkeys(modules, 3), target_modules=["q_proj"])
    directory = locations.local_directory(f"{base}+{tmp_path / 'adapter'}")
    same_form = Lora(rank=3, alpha=6.0, targets="q")
    origin = bases.origin_of(directory, "lm", same_form)
    assert (origin.base, origin.adapters) == (base, directory)
    other_form = dataclasses.replace(same_form, rank=4)
    origin = bases.origin_of(directory, "lm", other_form)
    assert (origin.base, origin.adapters) == (directory, None)
    parents = {"model": directory}
    for settings in (same_form, other_form):
        config = Config(stage="lm", lora=settings, model=model, parents={"model": str(directory)})
        reader = role_reader.RoleReader(config, sharding.make_mesh(Mesh()), parents)
        whole = lora.merge(lora.combine(reader.base("model"), reader.initial("model")))
        assert close(whole, load(directory))
        place = bases.record(config, tmp_path / "run", parents, {"model": "lm"})["model"]["place"]
        assert locations.local_directory(place) == (base if settings == same_form else directory)


@pytest.mark.parametrize("content", bad_inputs.RUBBISH)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_anything_in_the_place_of_an_adapters_file_is_one_line(name, content, tmp_path):
    adapter = simple(tmp_path)
    bad_inputs.replace(adapter / name, bad_inputs.RUBBISH[content])
    refusal(adapter)


@pytest.mark.parametrize("field", sorted(peft_config.KNOWN))
def test_a_field_of_any_type_is_computed_or_refused_in_one_line(field, tmp_path):
    module = LAYER.format(1, Q)
    for value in bad_inputs.WRONG_VALUES:
        (tmp_path / CONFIG).write_text(json.dumps(DEFAULTS | {field: value}))
        try:
            config = peft_config.read_adapter_config(tmp_path)
            assert config.targets(module) in (True, False)
            assert config.rank(module) > 0 and config.scale(module) > 0
        except UserError as error:
            assert "\n" not in str(error) and CONFIG in str(error)
