"""Checkpoints: to the bit, onto any mesh, one role alone, and back to the one before when the newest is damaged."""

import shutil

import jax
import numpy as np
import pytest
from test_models import tiny

from alignjax import checkpoint, sharding
from alignjax.config import Mesh, UserError

MESH = sharding.make_mesh(Mesh())


def parameters(seed):
    params = tiny(seed, vocab_size=96)[1]
    return jax.tree.map(jax.device_put, params, sharding.param_shardings(params, MESH))


def shapes(mesh=MESH):
    return {"policy": sharding.abstract(tiny(vocab_size=96)[1], mesh)}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Steps 1 to 3 of two items, of which the newest two are kept."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    saved = checkpoint.Checkpoints(directory, 2)
    for step in (1, 2, 3):
        saved.save(step, {"policy": parameters(step), "counter": {"n": np.int32(step)}})
    saved.close()
    return directory


@pytest.fixture
def copied(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def restored(directory, wanted=None):
    said = []
    opened = checkpoint.Checkpoints(directory, 2)
    try:
        return opened.restore(wanted or shapes(), said.append), said
    finally:
        opened.close()


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def test_the_newest_comes_back_to_the_bit_and_the_oldest_is_gone(kept):
    (step, items), said = restored(kept)
    assert step == 3 and equal(items["policy"], parameters(3)) and not said
    assert sorted(p.name for p in kept.iterdir()) == ["2", "3"]


def test_it_comes_back_onto_another_mesh(kept):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    (_, items), _ = restored(kept, shapes(mesh))
    gate = items["policy"]["layers"]["mlp"]["gate"]["kernel"]
    assert dict(gate.sharding.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert equal(jax.tree.map(np.asarray, items["policy"]), jax.tree.map(np.asarray, parameters(3)))


def test_one_role_is_taken_alone(kept):
    assert equal(checkpoint.restore_role(kept.parent, "policy", shapes()["policy"]), parameters(3))


def test_none_is_none_and_a_role_of_none_an_error(tmp_path):
    assert restored(tmp_path / "checkpoints") == (None, [])
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoint.restore_role(tmp_path, "policy", shapes()["policy"])


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [
    lambda step: [cut(f) for f in (step / "policy").rglob("*") if f.is_file()],
    lambda step: shutil.rmtree(step / "policy"),
    lambda step: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in (step / "policy").iterdir()],
])  # fmt: skip
def test_a_damaged_newest_falls_back_and_says_so(damage, copied):
    damage(copied / "3")
    (step, items), said = restored(copied)
    assert step == 2 and equal(items["policy"], parameters(2))
    assert len(said) == 1 and str(copied / "3") in said[0] and "is damaged" in said[0] and "falling back" in said[0]
    assert (copied.parent / "damaged" / "3").is_dir() and not (copied / "3").exists()


def test_none_that_can_be_read_is_an_error(copied):
    for step in ("2", "3"):
        shutil.rmtree(copied / step / "policy")
    with pytest.raises(UserError, match="none of the checkpoints"):
        restored(copied)


def test_a_save_that_was_cut_off_is_not_seen(copied):
    (copied / "4.orbax-checkpoint-tmp" / "policy").mkdir(parents=True)
    assert restored(copied)[0][0] == 3
