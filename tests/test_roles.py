"""Parents: a checkpoint's arrays on any mesh, read in parts, and models named on the hub."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_models import family_fields, tiny

from alignjax.config import Mesh, UserError
from alignjax.machine import sharding
from alignjax.models import families
from alignjax.weights import hf, hf_views, locations, roles, safetensors

GOLDEN = Path(__file__).parent / "golden"
KEY = jax.random.key(3)
MESHES = [Mesh(data=1, fsdp=4, tensor=2), Mesh(data=4, fsdp=1, tensor=2), Mesh(data=8)]


def equal(tree, other):
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, tree, other))
    )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen", "qwen2_tied", "qwen3"])
def test_a_mesh_gets_what_the_files_hold(name, mesh):
    model, params = hf.load_hf(GOLDEN / name, "lm")
    mesh = sharding.make_mesh(mesh)
    placed = roles.load(model, "lm", mesh, KEY, GOLDEN / name)
    assert equal(placed, params)
    assert jax.tree.map(lambda x: x.sharding, placed) == sharding.param_shardings(params, mesh)


def test_a_scalar_role_takes_the_head_that_is_there_or_a_fresh_one():
    mesh = sharding.make_mesh(MESHES[0])
    model, params = hf.load_hf(GOLDEN / "qwen2_score", "scalar")
    assert equal(roles.load(model, "scalar", mesh, KEY, GOLDEN / "qwen2_score"), params)
    for name in ("qwen2", "qwen2_tied"):
        model, params = hf.load_hf(GOLDEN / name, "lm")
        params["head"] = roles.init_params(model, "scalar", mesh, KEY, "head")["head"]
        kernel = params["head"]["kernel"]
        assert kernel.shape == (32, 1) and np.asarray(kernel).std() > 0.02
        assert equal(roles.load(model, "scalar", mesh, KEY, GOLDEN / name), params)
        assert "head" not in hf.load_hf(GOLDEN / name, "scalar")[1]


def test_a_language_model_is_no_reward_model():
    mesh = sharding.make_mesh(MESHES[0])
    model, params = hf.load_hf(GOLDEN / "qwen2_score", "scalar")
    assert equal(roles.load_trained(model, "scalar", mesh, GOLDEN / "qwen2_score"), params)
    model, params = hf.load_hf(GOLDEN / "qwen2", "lm")
    assert equal(roles.load_trained(model, "lm", mesh, GOLDEN / "qwen2"), params)
    with pytest.raises(UserError, match="qwen2: a reward model is wanted, .* language model"):
        roles.load_trained(model, "scalar", mesh, GOLDEN / "qwen2")


@pytest.fixture
def parts_read(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the parts of parameters that are read; each reads only its own elements."""
    shapes = []
    sizes = []
    read_tensor = safetensors.StoredTensor.read
    read_view = hf_views.ParameterView.read

    def read_counted_tensor(tensor, index):
        part = read_tensor(tensor, index)
        sizes.append(part.size)
        return part

    def read_counted_view(view, index):
        before = sum(sizes)
        part = read_view(view, index)
        assert sum(sizes) - before == part.size
        shapes.append(part.shape)
        return part

    monkeypatch.setattr(safetensors.StoredTensor, "read", read_counted_tensor)
    monkeypatch.setattr(hf_views.ParameterView, "read", read_counted_view)
    return shapes


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_device_reads_its_part_of_the_files_and_no_more(family, mesh, tmp_path, parts_read):
    """Each shard reads as many elements of the files as it has; equal shards are read once."""
    model, params = tiny(
        family=family,
        **family_fields(family),
        kv_heads=4 if family == "qwen" else 2,
        vocab_size=96,
    )
    hf.save_hf(model, params, tmp_path)
    placed = roles.load(model, "lm", sharding.make_mesh(mesh), KEY, tmp_path)
    assert equal(placed, params)
    expected = []
    for x in jax.tree.leaves(placed):
        shard_shape = x.sharding.shard_shape(x.shape)
        distinct_shards = x.size // np.prod(shard_shape)
        expected += [shard_shape] * distinct_shards
    assert sorted(parts_read) == sorted(expected)
    layers = placed["layers"]
    gate = layers["experts" if model.experts else "mlp"]["gate"]["kernel"]
    split = max(mesh.fsdp, 1) * max(mesh.tensor, 1)
    assert gate.addressable_shards[0].data.size * split == gate.size


def test_the_hub_is_asked_once_and_for_no_pickles(tmp_path, monkeypatch):
    downloads = []

    def download(name, revision=None, allow_patterns=None):
        downloads.append((name, revision))
        on_the_hub = [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "pytorch_model.bin",
            "modeling.py",
            "onnx/model.onnx",
            "model-00001-of-00002.safetensors",
            "original/consolidated.00.pth",
            "consolidated.safetensors",
            "training_args.bin",
            "chat_template.jinja",
        ]
        allowed = huggingface_hub.utils.filter_repo_objects(
            on_the_hub, allow_patterns=allow_patterns
        )
        assert list(allowed) == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "model-00001-of-00002.safetensors",
            "chat_template.jinja",
        ]
        shutil.copytree(GOLDEN / "qwen2", tmp_path / "snapshot", dirs_exist_ok=True)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locations.download.cache_clear()
    directory = locations.local_directory("hf://Org/A-model_1.5")
    assert directory == locations.local_directory("hf://Org/A-model_1.5") == tmp_path / "snapshot"
    locations.local_directory("hf://Org/A-model_1.5@refs/pr/1")
    assert downloads == [("Org/A-model_1.5", None), ("Org/A-model_1.5", "refs/pr/1")]
    assert locations.architecture(directory) == hf.load_hf(GOLDEN / "qwen2", "lm")[0]
    assert locations.local_directory("runs/sft") == Path("runs/sft") and len(downloads) == 2


def test_a_hub_id_that_leads_nowhere_is_named(monkeypatch):
    def download(*arguments, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nfor\nyou")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = "hf://org/name@v1: .*LocalEntryNotFoundError: no network for you"
    with pytest.raises(UserError, match=message) as raised:
        locations.local_directory("hf://org/name@v1")
    assert "\n" not in str(raised.value) and "name a directory" in str(raised.value)
    for spec in ("hf://name", "hf://a/b/c", "hf://a/b@", "hf://a b/c"):
        with pytest.raises(UserError, match="expected hf://ORG/NAME or hf://ORG/NAME@REVISION"):
            locations.local_directory(spec)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path):
    shutil.copytree(GOLDEN / "qwen2_score", tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    model, params = hf.load_hf(tmp_path / "in", "scalar")
    assert len(config["id2label"]) == 1
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors["score.weight"] = np.concatenate([tensors["score.weight"]] * 2)
    save_file(tensors, tmp_path / "in/model.safetensors")
    with pytest.raises(UserError, match=r"tensor score.weight is \[2, 32\], \[1, 32\] wanted"):
        roles.load(model, "scalar", sharding.make_mesh(Mesh()), KEY, tmp_path / "in")
