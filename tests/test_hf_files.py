"""Files of Hugging Face checkpoints: which of several count, and which faults are named."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax import inference
from alignjax.config import UserError
from alignjax.weights import hf, locations, safetensors

GOLDEN = Path(__file__).parent / "golden"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def directory(tmp_path):
    """Return a copy of a golden checkpoint, a tiny Qwen2."""
    return shutil.copytree(GOLDEN / "qwen2", tmp_path / "model")


def edit(directory, **fields):
    """Change fields of config.json; None drops one."""
    path = directory / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: x for key, x in content.items() if x is not None}))


def norm_of(directory, head="lm") -> np.ndarray:
    """Read a checkpoint and return the scale of its last norm."""
    return hf.load_hf(directory, head)[1]["norm"]["scale"]


def refusal(directory, head="lm") -> str:
    """Return the error for a checkpoint, which must be one line that names the directory."""
    with pytest.raises(UserError) as raised:
        hf.load_hf(directory, head)
    message = str(raised.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


def write_shards(directory, norm=None) -> dict[str, str]:
    """Write a checkpoint's tensors in two shards, with another norm if given; return the map."""
    tensors = load_file(directory / SINGLE)
    if norm is not None:
        tensors[NORM] = norm
    names = sorted(tensors)
    file_of = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        file_of |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return file_of


def test_a_whole_file_comes_before_an_index(directory):
    """As in transformers: save_pretrained into a directory of shards leaves their index behind."""
    expected = norm_of(directory)
    (directory / INDEX).write_text(json.dumps({"weight_map": {NORM: "gone.safetensors"}}))
    assert np.array_equal(norm_of(directory), expected)
    write_shards(directory, norm=np.zeros(32, np.float32))
    assert np.array_equal(norm_of(directory), expected)
    (directory / SINGLE).unlink()
    assert not norm_of(directory).any()


def test_a_tensor_in_two_shards_is_refused(directory):
    file_of = write_shards(directory)
    (directory / SINGLE).unlink()
    other = next(file for file in file_of.values() if file != file_of[NORM])
    tensors = load_file(directory / other)
    save_file(tensors | {NORM: np.zeros(32, np.float32)}, directory / other)
    assert f"tensor {NORM} is both in model-00001-of" in refusal(directory)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "no weight_map"),
        ({}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {NORM: 1}}, f"weight_map.{NORM}=1 must be the name of a file"),
        ({"weight_map": {NORM: "../x.safetensors"}}, "there is no file ../x.safetensors"),
        ({"weight_map": {NORM: "/etc/passwd"}}, "there is no file /etc/passwd"),
        ({"weight_map": {NORM: ".."}}, "there is no file .."),
        ({"weight_map": {NORM: ""}}, "there is no file "),
    ],
)
def test_an_index_of_another_form_is_named(directory, index, message):
    (directory / SINGLE).rename(directory.parent / "x.safetensors")
    (directory / INDEX).write_text(json.dumps(index))
    assert message in refusal(directory)


def test_a_tensor_that_the_index_names_and_no_shard_has_is_named(directory):
    file_of = write_shards(directory)
    (directory / SINGLE).unlink()
    tensors = load_file(directory / file_of[NORM])
    del tensors[NORM]
    save_file(tensors, directory / file_of[NORM])
    assert f"tensor {NORM} should be in {file_of[NORM]}, but is not" in refusal(directory)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        {"w": ENTRY | {"data_offsets": [-8, 0]}},
        {"w": ENTRY | {"data_offsets": [0, 16]}},
        {"w": ENTRY | {"data_offsets": [8, 0]}},
        {"w": ENTRY, "v": ENTRY},
        {"w": ENTRY | {"shape": [-1]}},
        {"w": ENTRY | {"shape": None}},
        {"w": ENTRY | {"shape": [2**62, 4]}},
        {"w": ENTRY | {"shape": [3]}},
        {"w": ENTRY | {"dtype": "F99"}},
        {"w": ENTRY | {"dtype": None}},
        {"w": 5},
        {"__metadata__": {"format": 5}, "w": ENTRY},
        [],
        {},
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(directory, header):
    text = json.dumps(header).encode()
    data = bytes(8) if header else b"too much"
    (directory / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert "model.safetensors: not a whole safetensors file" in refusal(directory)


@pytest.mark.parametrize("length", [0, 2**31, 2**63])
def test_a_header_of_an_absurd_length_is_refused(directory, length):
    (directory / SINGLE).write_bytes(struct.pack("<Q", length) + b"{}")
    assert "model.safetensors: not a whole safetensors file" in refusal(directory)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_with_its_tensor(directory, dtype, value):
    tensors = {name: x.astype(dtype) for name, x in load_file(directory / SINGLE).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, directory / SINGLE)
    assert f"numbers read of tensor {name} are NaN or infinite" in refusal(directory)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_and_smallest_numbers_are_finite(dtype):
    limits = ml_dtypes.finfo(dtype)
    numbers = np.array([limits.max, limits.min, limits.smallest_subnormal, 0.0, -0.0], dtype)
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[np.dtype(dtype).name]
    bits = safetensors.FLOAT_BITS[name]
    assert safetensors.is_finite(numbers, bits)
    many = np.tile(numbers, safetensors.FINITE_BLOCK // 2)
    assert safetensors.is_finite(many, bits)
    many[-1] = np.nan
    assert not safetensors.is_finite(many, bits)
    assert safetensors.is_finite(numbers[:0], bits)


def test_pickles_alone_are_named_with_the_way_out(directory):
    (directory / SINGLE).rename(directory / "pytorch_model.bin")
    message = refusal(directory)
    assert "there is pytorch_model.bin: load it with transformers" in message


def test_tensors_that_were_saved_without_a_head_have_no_prefix(directory):
    expected = norm_of(directory)
    tensors = load_file(directory / SINGLE)
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    save_file(bare, directory / SINGLE)
    assert np.array_equal(norm_of(directory), expected)


def test_a_shape_that_follows_from_an_absent_field_says_so(directory):
    edit(directory, vocab_size=None)
    assert "config.json lacks fields, whose defaults are vocab_size=151936" in refusal(directory)


def test_a_classifier_is_known_by_its_tensors_where_config_json_does_not_say(tmp_path):
    score = shutil.copytree(GOLDEN / "qwen2_score", tmp_path / "score")
    assert hf.head_of(score) == "scalar"
    edit(score, architectures=None)
    assert hf.head_of(score) == "scalar"
    assert inference.is_reward_model(score)
    plain = shutil.copytree(GOLDEN / "qwen2", tmp_path / "plain")
    edit(plain, architectures=None)
    assert hf.head_of(plain) == "lm"
    edit(score, architectures=["Qwen2ForCausalLM"])
    assert "but score.weight: this is a sequence classifier" in refusal(score, "lm")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "A", "1": "B"}}, "id2label has 2 labels"),
        ({"id2label": None, "num_labels": 2}, "num_labels=2"),
    ],
)
def test_a_classifier_that_says_to_have_several_labels_is_refused(tmp_path, fields, message):
    score = shutil.copytree(GOLDEN / "qwen2_score", tmp_path / "score")
    edit(score, **fields)
    assert message in refusal(score, "scalar")


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_says_what_it_is(directory, beside):
    config = {"peft_type": "LORA", "target_modules": "all-linear"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    if not beside:
        (directory / "config.json").unlink()
    for read in (locations.read_config, locations.is_run):
        with pytest.raises(UserError, match="a PEFT adapter .* must be named here: BASE") as raised:
            read(directory)
        assert str(directory) in str(raised.value)
    with pytest.raises(UserError, match="base_model_name_or_path='' names no base"):
        inference.load(directory)
    assert "a PEFT adapter" in refusal(directory)


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{", b"\xff", b"[" * 100_000, b"null"])
def test_a_config_json_that_is_no_object_is_one_line(directory, content):
    (directory / "config.json").write_bytes(content)
    assert "config.json" in refusal(directory)


def test_a_directory_that_is_a_file_holds_no_model(directory):
    assert "no config.json there" in refusal(directory / SINGLE)
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    assert "config.json" in refusal(directory)
