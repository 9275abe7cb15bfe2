"""Hugging Face checkpoints: exact round trips, little memory, and errors that name the fault."""

import dataclasses
import json
import shutil
import tracemalloc
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_models import tiny

from alignjax.config import Model, UserError
from alignjax.models import families
from alignjax.weights import hf, hf_views

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))


def head_of(name):
    return "scalar" if name.endswith("score") else "lm"


def same(a, b):
    """Return whether two trees have the same structure and equal arrays."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def read_model(directory):
    return families.model_from_hf(json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_export_gives_the_files_tensors_back(name, dtype, tmp_path):
    """The safetensors library reads each tensor bit for bit (those of qwen3 need float32)."""
    model, params = hf.load_hf(GOLDEN / name, head_of(name))
    hf.save_hf(model, params, tmp_path, dtype)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(GOLDEN / name / "model.safetensors")
    if head_of(name) == "scalar":
        assert ours.pop("score.bias").tolist() == [0]
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        assert ours[key].dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        assert np.array_equal(ours[key].astype(np.float32), x.astype(np.float32)), key
    again, back = hf.load_hf(tmp_path, head_of(name))
    assert again == model and same(params, back)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("family", "head"),
    [(name, head) for name, family in families.FAMILIES.items() for head in family.classes],
)
def test_in_and_out_again_gives_the_same_bytes(family, head, dtype, tmp_path):
    """Tensors that the safetensors library wrote come back byte for byte, in their own type."""
    rng = np.random.default_rng(0)
    tensors = load_file(GOLDEN / family / "model.safetensors")
    if head == "scalar":
        size = read_model(GOLDEN / family).d_model
        tensors |= {"score.weight": np.zeros((1, size)), "score.bias": np.zeros(1)}
        tensors.pop("lm_head.weight", None)
    tensors = {name: rng.normal(size=x.shape).astype(dtype) for name, x in tensors.items()}
    (tmp_path / "in").mkdir()
    shutil.copy(GOLDEN / family / "config.json", tmp_path / "in")
    save_file(tensors, tmp_path / "in/model.safetensors")
    hf.save_hf(*hf.load_hf(tmp_path / "in", head), tmp_path / "out", np.dtype(dtype).name)
    again = load_file(tmp_path / "out/model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert again[name].tobytes() == tensor.tobytes(), name
    assert read_model(tmp_path / "out") == read_model(GOLDEN / family)


def test_shards_hold_what_one_file_holds(tmp_path):
    model, params = hf.load_hf(GOLDEN / "qwen", "lm")
    hf.save_hf(model, params, tmp_path, max_shard_bytes=30_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    assert all((tmp_path / file).stat().st_size < 32_000 for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(params))
    assert same(hf.load_hf(tmp_path, "lm")[1], params)


def test_the_reward_shift_survives(tmp_path):
    model, params = hf.load_hf(GOLDEN / "qwen2_score", "scalar")
    params["head"]["bias"] = np.float32([-1.25])
    hf.save_hf(model, params, tmp_path)
    assert hf.load_hf(tmp_path, "scalar")[1]["head"]["bias"].tolist() == [-1.25]


def faulty(tmp_path, name="qwen2", **tensors):
    """Copy a golden checkpoint with tensors replaced, added, or left out (None).

    In the names of tensors, "__" stands for ".".
    """
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    all_tensors = load_file(GOLDEN / name / "model.safetensors")
    for key, tensor in tensors.items():
        key = key.replace("__", ".")
        if tensor is None:
            del all_tensors[key]
        else:
            all_tensors[key] = tensor
    save_file(all_tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"model__norm__weight": None}, r"there is no tensor model.norm.weight \[32\]"),
        ({"model__extra": np.zeros(3, np.float32)}, r"tensor model.extra \[3\] has no place"),
        (
            {"lm_head__weight": np.zeros((65, 32), np.float32)},
            r"lm_head.weight is \[65, 32\], \[64, 32\] wanted",
        ),
        ({"model__norm__weight": np.zeros(32, np.int8)}, "model.norm.weight is of type I8"),
    ],
)
def test_faulty_tensors_are_named(tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        hf.load_hf(faulty(tmp_path, **tensors), "lm")


def test_harmless_extras(tmp_path):
    embedding = load_file(GOLDEN / "qwen2_tied/model.safetensors")["model.embed_tokens.weight"]
    hf.load_hf(faulty(tmp_path, "qwen2_tied", lm_head__weight=embedding), "lm")
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf.load_hf(faulty(tmp_path, "qwen2_tied", lm_head__weight=embedding * 2), "lm")
    hf.load_hf(
        faulty(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(4, np.float32)),
        "lm",
    )


def test_pickles_and_torn_files_are_refused(tmp_path):
    faulty(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for cut in (4, 500, len(whole) - 2):
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            hf.load_hf(tmp_path, "lm")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no file model.safetensors .pickled"):
        hf.load_hf(tmp_path, "lm")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no file ../elsewhere"):
        hf.load_hf(tmp_path, "lm")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: no weight_map"):
        hf.load_hf(tmp_path, "lm")


def test_a_parameter_that_is_missing_or_misshapen_is_named(tmp_path):
    model, params = tiny()
    with pytest.raises(UserError, match="parameter norm/scale is absent"):
        hf.save_hf(model, {name: x for name, x in params.items() if name != "norm"}, tmp_path)
    with pytest.raises(UserError, match="parameter more is one too many"):
        hf.save_hf(model, params | {"more": np.zeros(1)}, tmp_path)
    with pytest.raises(UserError, match=r"parameter norm/scale is \[31\], \[32\] wanted"):
        hf.save_hf(model, params | {"norm": {"scale": np.zeros(31)}}, tmp_path)


SIZES = ("vocab_size", "d_model", "heads", "head_size", "d_ff")
ROPE_SCALING = (
    "rope_scaling",
    "rope_factor",
    "rope_original_length",
    "rope_short_factors",
    "rope_long_factors",
)


def model_and_shapes(family, head, layers=4, **changes):
    """Return a small model of a family, and the shapes of its parameters by path."""
    golden = read_model(GOLDEN / family)
    sizes = {field: getattr(Model(), field) for field in SIZES} | {"layers": layers} | changes
    sizes["kv_heads"] = 4 if family == "qwen" else 2
    # Factors of longrope would have to fit the size of heads.
    scaling = {name: getattr(Model(), name) for name in ROPE_SCALING}
    model = dataclasses.replace(golden, **sizes, **scaling)
    if golden.embedding_multiplier == golden.d_model**0.5:  # as in Gemma
        model.embedding_multiplier = model.d_model**0.5
    return model, hf.layout_of(model, head).shapes


@pytest.mark.parametrize("family", families.FAMILIES)
def test_writing_holds_the_parameters_of_one_tensor_at_a_time(family, tmp_path):
    """When a parameter is read, only parameters of the same tensor are still in memory.

    Beside them there is at most one tensor as the file has it.
    """
    model, shapes = model_and_shapes(family, "lm", layers=16, vocab_size=512, d_model=128, d_ff=352)
    names = families.weight_names(model, "lm")
    references = {}
    most = 0

    def read(path):
        nonlocal most
        alive = {other: ref() for other, ref in references.items() if ref() is not None}
        assert {names[other] for other in alive} <= {names[path]}
        param = np.ones(shapes[path], np.float32)
        references[path] = weakref.ref(param)
        most = max(most, param.nbytes + sum(other.nbytes for other in alive.values()))
        return param

    hf.layout_of(model, "lm")  # what jax allocates when it traces is not measured
    tracemalloc.start()
    try:
        total = hf.write_hf(model, "lm", read, tmp_path, max_shard_bytes=10**6)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(references) == len(shapes)
    assert len(list(tmp_path.glob("*.safetensors"))) > 8
    assert total > 2 * most and peak < 1.2 * most


def test_reading_holds_the_part_that_is_asked_for(tmp_path):
    model, shapes = model_and_shapes("qwen", "lm", layers=32, vocab_size=512)

    def read(path):
        return np.full(shapes[path], len(path), np.float32)

    hf.write_hf(model, "lm", read, tmp_path, "bfloat16")
    hf.open_hf(tmp_path, "lm")  # what is imported and traced the first time is not measured
    tracemalloc.start()
    try:
        _, views = hf.open_hf(tmp_path, "lm")
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        part = views["layers/mlp/gate/kernel"].read((slice(None), slice(0, 64), slice(None)))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert part.shape == (32, 64, 352) and part.dtype == np.float32
    assert (part == len("layers/mlp/gate/kernel")).all()
    # Beside it there are the layers that threads are reading, in the file's type and in ours.
    assert peak < (1 + 1.5 * hf_views.READERS / 32 + 0.05) * part.nbytes


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("qwen2", "model_type", "mamba"),
        ("qwen2", "hidden_act", "gelu"),
        ("qwen2", "layer_types", ["chunked_attention"] * 2),
        ("llama", "layer_types", ["sliding_attention"] * 2),
        ("llama", "attention_bias", "yes"),
        ("granite", "logits_scaling", 0),
        ("smollm3", "no_rope_layers", [1, 0]),
        ("qwen", "no_bias", False),
        ("qwen", "rotary_pct", 0.5),
        ("qwen2", "rope_parameters", {"rope_type": "longrope", "factor": 2.0}),
        ("qwen2", "rope_parameters", {"rope_type": "yarn", "factor": 2.0, "truncate": False}),
        ("qwen2", "num_hidden_layers", None),
    ],
)
def test_what_we_cannot_run_is_refused_by_name(name, field, value):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    families.model_from_hf(config)
    with pytest.raises(UserError, match=rf"config.json: {field}"):
        families.model_from_hf(config | {field: value})


def test_old_configs_say_the_same():
    """rope_theta and rope_scaling at the top, as before transformers 5."""
    config = json.loads((GOLDEN / "llama/config.json").read_text())
    rope = config.pop("rope_parameters")
    old = config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert families.model_from_hf(old) == hf.load_hf(GOLDEN / "llama", "lm")[0]


@pytest.mark.parametrize("name", families.PRESETS)
def test_presets_survive_their_config(name):
    preset = families.PRESETS[name]
    back = families.model_from_hf(families.hf_from_model(preset, "lm"))
    assert dataclasses.replace(back, dtype=preset.dtype, remat=preset.remat) == preset


def test_a_model_outside_its_family_is_not_written(tmp_path):
    model = Model(family="qwen2", d_model=32, layers=1, vocab_size=50, qkv_bias=False)
    with pytest.raises(UserError, match=r"model.qk_norm must be \(True, False\)"):
        hf.save_hf(model, {"head": {}}, tmp_path)
