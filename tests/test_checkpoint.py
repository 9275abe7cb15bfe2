"""Checkpoints: to the bit, onto any mesh, one role alone, and back to the one before when the newest is damaged."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny

from alignjax.config import Mesh, UserError
from alignjax.machine import sharding
from alignjax.weights import checkpoint

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


def bits(tree):
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), tree)


def test_any_type_and_any_bits_come_back(tmp_path):
    state = {
        "float": jnp.array([0.0, -0.0, jnp.nan, jnp.inf, 1e-45, 0.1], jnp.float32),
        "bfloat": jnp.array([-0.0, jnp.nan, 3.140625], jnp.bfloat16),
        "count": jnp.array(2**31 - 1, jnp.int32),
        "place": jnp.arange(24, dtype=jnp.uint32).reshape(2, 3, 4),
    }
    state = jax.tree.map(lambda x: jax.device_put(x, sharding.replicated(MESH)), state)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", 2)
    saved.save(7, {"state": state})
    saved.close()
    (step, items), _ = restored(tmp_path / "checkpoints", {"state": like})
    assert step == 7 and bits(items["state"]) == bits(state)


@pytest.mark.parametrize(
    "keep, left", [(1, ["5"]), (3, ["3", "4", "5"]), (9, ["1", "2", "3", "4", "5"])]
)
def test_as_many_are_kept_as_asked_for(keep, left, tmp_path):
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", keep)
    for step in range(1, 6):
        saved.save(step, {"counter": {"n": np.int32(step)}})
    assert saved.latest() == 5
    saved.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == left


def test_it_comes_back_onto_another_mesh(kept):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    (_, items), _ = restored(kept, shapes(mesh))
    gate = items["policy"]["layers"]["mlp"]["gate"]["kernel"]
    assert dict(gate.sharding.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert equal(jax.tree.map(np.asarray, items["policy"]), jax.tree.map(np.asarray, parameters(3)))


def test_a_checksum_is_of_all_bits_at_their_places_wherever_they_lie():
    x = np.random.default_rng(0).normal(size=(6, 8, 4)).astype(np.float32)
    of = lambda x: int(checkpoint.checksums(x))
    spec = jax.sharding.PartitionSpec(None, "fsdp", None)
    assert (
        of(x)
        == checkpoint.checksum(x)
        == of(jax.device_put(x, jax.sharding.NamedSharding(MESH, spec)))
    )
    flipped = [x.view(np.uint32).copy() for _ in range(32)]
    for bit, words in enumerate(flipped):
        words[3, 5, bit % 4] ^= np.uint32(1 << bit)
    moved = [x[::-1], x[:, ::-1], x[..., ::-1], np.roll(x, 1), -x, np.zeros_like(x)]
    assert len({of(x), *map(of, flipped), *map(of, moved)}) == 1 + 32 + 6
    for y in (
        x.astype(jnp.bfloat16),
        np.int32(-5),
        np.zeros((0, 3), np.float32),
        np.array([True]).astype(np.uint8),
    ):
        assert of(y) == checkpoint.checksum(np.asarray(y))
    large = np.arange(2**20 + 5, dtype=np.int32)
    assert of(large) == checkpoint.checksum(large)


def test_a_wrong_or_missing_checksum_is_damage_wherever_it_is_read(copied):
    sums = copied / "3" / "checksums" / "metadata"
    text = json.loads(sums.read_text())
    text["policy"]["layers/norm1/scale"] ^= 1
    for damage in (lambda: sums.write_text(json.dumps(text)), lambda: shutil.rmtree(sums.parent)):
        damage()
        with pytest.raises(UserError, match="3 is damaged"):
            checkpoint.restore_role(copied.parent, "policy", shapes()["policy"])
        with pytest.raises(UserError, match="policy: layers/norm1/scale can't be read"):
            checkpoint.restore_array(copied / "3" / "policy", "layers/norm1/scale")
    (step, _), said = restored(copied)
    assert step == 2 and len(said) == 1


def test_one_role_is_taken_alone(kept):
    assert equal(checkpoint.restore_role(kept.parent, "policy", shapes()["policy"]), parameters(3))


def test_a_role_does_not_need_the_other_items_and_may_go_onto_another_mesh(copied):
    shutil.rmtree(copied / "3" / "counter")
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    role = checkpoint.restore_role(copied.parent, "policy", shapes(mesh)["policy"])
    assert equal(role, parameters(3))
    assert {tuple(x.sharding.mesh.shape.values()) for x in jax.tree.leaves(role)} == {(1, 4, 2)}


def test_none_is_none_and_a_role_of_none_an_error(tmp_path):
    assert restored(tmp_path / "checkpoints") == (None, [])
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoint.restore_role(tmp_path, "policy", shapes()["policy"])


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: [cut(f) for f in (step / "policy").rglob("*") if f.is_file()],
        lambda step: shutil.rmtree(step / "policy"),
        lambda step: [
            shutil.rmtree(p) if p.is_dir() else p.unlink() for p in (step / "policy").iterdir()
        ],
    ],
)
def test_a_damaged_newest_falls_back_and_says_so(damage, copied):
    damage(copied / "3")
    (step, items), said = restored(copied)
    assert step == 2 and equal(items["policy"], parameters(2))
    assert (
        len(said) == 1
        and str(copied / "3") in said[0]
        and "is damaged" in said[0]
        and "falling back" in said[0]
    )
    assert (copied.parent / "damaged" / "3").is_dir() and not (copied / "3").exists()


COUNTER = {"counter": {"n": jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(MESH))}}


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "policy" / "manifest.ocdbt").unlink(),
        lambda step: (step / "policy" / "manifest.ocdbt").write_bytes(b""),
        lambda step: cut(step / "policy" / "_METADATA"),
        lambda step: shutil.rmtree(step / "policy" / "d"),
        lambda step: [cut(file) for file in (step / "policy" / "d").iterdir()],
        lambda step: [cut(file) for file in (step / "counter" / "d").iterdir()],
        lambda step: shutil.rmtree(step / "counter"),
        lambda step: (shutil.rmtree(step), step.mkdir()),
    ],
    ids=[
        "no manifest",
        "empty manifest",
        "metadata cut",
        "no data",
        "data cut",
        "small item cut",
        "an item gone",
        "nothing left",
    ],
)
def test_any_damage_to_any_item_falls_back(damage, copied):
    damage(copied / "3")
    (step, items), said = restored(copied, {**shapes(), **COUNTER})
    assert (step, int(items["counter"]["n"])) == (2, 2) and equal(items["policy"], parameters(2))
    assert len(said) == 1 and str(copied / "3") in said[0]
    assert [path.name for path in (copied.parent / "damaged").iterdir()] == ["3"]
    assert [path.name for path in copied.iterdir()] == ["2"]


def test_no_flipped_byte_goes_unnoticed(copied):
    """At seeded places of every file: what is restored is what was saved, to the bit, or is said to be damaged. Orbax and
    its codecs let many through; the checksums don't."""
    rng, told = np.random.default_rng(0), []
    files = [
        (path, path.read_bytes())
        for path in (copied / "3").rglob("*")
        if path.is_file() and path.stat().st_size
    ]
    largest = max(len(data) for _, data in files)
    for path, data in files:
        for at in rng.integers(0, len(data), 16 if len(data) == largest else 2):
            path.write_bytes(
                data[:at] + bytes([data[at] ^ 1 << rng.integers(0, 8)]) + data[at + 1 :]
            )
            opened, said = checkpoint.Checkpoints(copied, 2), []
            opened.put_aside = lambda steps: None
            step, items = opened.restore({**shapes(), **COUNTER}, said.append)
            opened.close()
            assert (
                equal(items["policy"], parameters(step)) and int(items["counter"]["n"]) == step
            ), (path, at, said)
            assert [str(copied / "3") in line for line in said] == ([] if step == 3 else [True]), (
                path,
                at,
                said,
            )
            told += said or [""]
        path.write_bytes(data)
    noticed, ours = (sum(word in line for line in told) for word in ("damaged", "checksum differs"))
    assert noticed > len(told) / 4 and ours >= 5, (noticed, ours, len(told))


def test_the_damaged_step_is_saved_again_and_may_be_damaged_again(copied):
    for _ in range(2):
        shutil.rmtree(copied / "3" / "policy")
        opened = checkpoint.Checkpoints(copied, 2)
        assert opened.restore(shapes(), lambda line: None)[0] == 2
        opened.save(3, {"policy": parameters(30), "counter": {"n": np.int32(30)}})
        opened.close()
        (step, items), said = restored(copied, {**shapes(), **COUNTER})
        assert (step, int(items["counter"]["n"]), said) == (3, 30, []) and equal(
            items["policy"], parameters(30)
        )


def test_none_that_can_be_read_is_an_error_the_next_time_too(copied):
    for step in ("2", "3"):
        shutil.rmtree(copied / step / "policy")
    for _ in range(2):
        with pytest.raises(UserError, match="none of the checkpoints"):
            restored(copied)


def test_a_save_that_was_cut_off_is_not_seen(copied):
    (copied / "4.orbax-checkpoint-tmp" / "policy").mkdir(parents=True)
    assert restored(copied)[0][0] == 3


def test_a_temporary_directory_is_not_seen_even_with_everything_in_it(copied):
    shutil.copytree(copied / "3", copied / "4.orbax-checkpoint-tmp")
    (step, items), said = restored(copied)
    assert (step, said) == (3, []) and equal(items["policy"], parameters(3))
    assert equal(
        checkpoint.restore_role(copied.parent, "policy", shapes()["policy"]), parameters(3)
    )
