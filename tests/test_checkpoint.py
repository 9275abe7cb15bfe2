"""Checkpoints: exact to the bit, on any mesh, one role at a time, with a fallback if damaged."""

import json
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny

from alignjax.config import Mesh, UserError
from alignjax.machine import sharding
from alignjax.weights import checkpoint

MESH = sharding.make_mesh(Mesh())
NORM_SCALE = "layers/norm1/scale"
COUNTER_SHAPE = jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(MESH))


def parameters(seed):
    params = tiny(seed, vocab_size=96)[1]
    return jax.tree.map(jax.device_put, params, sharding.param_shardings(params, MESH))


def items_of(step):
    """The items that the tests save at a step."""
    return {"policy": parameters(step), "counter": {"n": np.int32(step)}}


def policy_shapes(mesh=MESH):
    return sharding.abstract(tiny(vocab_size=96)[1], mesh)


def all_shapes():
    return {"policy": policy_shapes(), "counter": {"n": COUNTER_SHAPE}}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Checkpoints of steps 1 to 3 with two items; the newest two are kept."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = checkpoint.Checkpoints(directory, 2)
    for step in (1, 2, 3):
        checkpoints.save(step, items_of(step))
    checkpoints.close()
    return directory


@pytest.fixture
def copied(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


class Restored(NamedTuple):
    """What `Checkpoints.restore` returns and reports."""

    result: tuple[int, dict] | None
    lines: list[str]


def restore(directory, shapes=None) -> Restored:
    lines = []
    checkpoints = checkpoint.Checkpoints(directory, 2)
    try:
        result = checkpoints.restore(shapes or {"policy": policy_shapes()}, lines.append)
        return Restored(result, lines)
    finally:
        checkpoints.close()


def equal(tree, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, other)))


def restore_policy(workdir, mesh=MESH):
    return checkpoint.restore_role(workdir, "policy", policy_shapes(mesh))


def test_the_newest_comes_back_to_the_bit_and_the_oldest_is_gone(kept):
    (step, items), lines = restore(kept)
    assert step == 3 and equal(items["policy"], parameters(3)) and not lines
    assert sorted(path.name for path in kept.iterdir()) == ["2", "3"]


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
    shapes = jax.tree.map(lambda x: sharding.abstract_array(x, x.sharding), state)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(7, {"state": state})
    checkpoints.close()
    step, items = restore(tmp_path / "checkpoints", {"state": shapes}).result
    assert step == 7 and bits(items["state"]) == bits(state)


@pytest.mark.parametrize(
    "keep, left", [(1, ["5"]), (3, ["3", "4", "5"]), (9, ["1", "2", "3", "4", "5"])]
)
def test_as_many_are_kept_as_asked_for(keep, left, tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep)
    for step in range(1, 6):
        checkpoints.save(step, {"counter": {"n": np.int32(step)}})
    assert checkpoints.latest() == 5
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == left


def test_it_comes_back_onto_another_mesh(kept):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    _, items = restore(kept, {"policy": policy_shapes(mesh)}).result
    gate = items["policy"]["layers"]["mlp"]["gate"]["kernel"]
    assert dict(gate.sharding.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert equal(jax.tree.map(np.asarray, items["policy"]), jax.tree.map(np.asarray, parameters(3)))


def device_checksum(x) -> int:
    return int(checkpoint.checksums(x))


def test_a_checksum_is_of_all_bits_at_their_places_wherever_they_lie():
    x = np.random.default_rng(0).normal(size=(6, 8, 4)).astype(np.float32)
    spec = jax.sharding.PartitionSpec(None, "fsdp", None)
    sharded = jax.device_put(x, jax.sharding.NamedSharding(MESH, spec))
    assert device_checksum(x) == checkpoint.host_checksum(x) == device_checksum(sharded)
    flipped = [x.view(np.uint32).copy() for _ in range(32)]
    for bit, words in enumerate(flipped):
        words[3, 5, bit % 4] ^= np.uint32(1 << bit)
    moved = [x[::-1], x[:, ::-1], x[..., ::-1], np.roll(x, 1), -x, np.zeros_like(x)]
    assert len({device_checksum(array) for array in (x, *flipped, *moved)}) == 1 + 32 + 6
    for array in (
        x.astype(jnp.bfloat16),
        np.int32(-5),
        np.zeros((0, 3), np.float32),
        np.array([True]).astype(np.uint8),
    ):
        assert device_checksum(array) == checkpoint.host_checksum(np.asarray(array))
    large = np.arange(2**20 + 5, dtype=np.int32)
    assert device_checksum(large) == checkpoint.host_checksum(large)


def test_a_wrong_or_missing_checksum_is_damage_wherever_it_is_read(copied):
    sums = copied / "3" / "checksums" / "metadata"
    text = json.loads(sums.read_text())
    text["policy"][NORM_SCALE] ^= 1
    for damage in (lambda: sums.write_text(json.dumps(text)), lambda: shutil.rmtree(sums.parent)):
        damage()
        with pytest.raises(UserError, match="3 is damaged"):
            restore_policy(copied.parent)
        with pytest.raises(UserError, match=f"policy: {NORM_SCALE} can't be read"):
            checkpoint.restore_array(copied / "3" / "policy", NORM_SCALE)
    (step, _), lines = restore(copied)
    assert step == 2 and len(lines) == 1


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_role_that_is_not_finite_is_refused_by_the_arrays_name(number, tmp_path):
    """One number of one array, wherever it lies on the mesh."""
    items = items_of(1)
    kernel = np.array(items["policy"]["layers"]["mlp"]["down"]["kernel"])
    kernel[1, -1, -1] = number
    items["policy"]["layers"]["mlp"]["down"]["kernel"] = kernel
    items["policy"] = jax.tree.map(
        jax.device_put, items["policy"], sharding.param_shardings(items["policy"], MESH)
    )
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(1, items)
    checkpoints.close()
    path = "layers/mlp/down/kernel"
    with pytest.raises(UserError, match=f"checkpoints/1: policy/{path} is not finite"):
        restore_policy(tmp_path)
    with pytest.raises(UserError, match=f"policy: {path} is not finite"):
        checkpoint.restore_array(tmp_path / "checkpoints" / "1" / "policy", path)
    with pytest.raises(checkpoint.NotFinite, match=f"policy/{path} is not finite"):
        checkpoint.check_finite(items)


def test_one_role_is_taken_alone(kept):
    assert equal(restore_policy(kept.parent), parameters(3))


def test_a_role_does_not_need_the_other_items_and_may_go_onto_another_mesh(copied):
    shutil.rmtree(copied / "3" / "counter")
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    role = restore_policy(copied.parent, mesh)
    assert equal(role, parameters(3))
    assert {tuple(x.sharding.mesh.shape.values()) for x in jax.tree.leaves(role)} == {(1, 4, 2)}


def test_none_is_none_and_a_role_of_none_an_error(tmp_path):
    assert restore(tmp_path / "checkpoints") == (None, [])
    with pytest.raises(UserError, match="no checkpoint there"):
        restore_policy(tmp_path)


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def halve_all(directory):
    for file in directory.rglob("*"):
        if file.is_file():
            halve(file)


def empty(directory):
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: halve_all(step / "policy"),
        lambda step: shutil.rmtree(step / "policy"),
        lambda step: empty(step / "policy"),
    ],
)
def test_a_damaged_newest_falls_back_and_says_so(damage, copied):
    damage(copied / "3")
    (step, items), lines = restore(copied)
    assert step == 2 and equal(items["policy"], parameters(2))
    (line,) = lines
    assert str(copied / "3") in line and "is damaged" in line and "falling back" in line
    assert (copied.parent / "damaged" / "3").is_dir() and not (copied / "3").exists()


def halve_files(directory):
    for file in directory.iterdir():
        halve(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "policy" / "manifest.ocdbt").unlink(),
        lambda step: (step / "policy" / "manifest.ocdbt").write_bytes(b""),
        lambda step: halve(step / "policy" / "_METADATA"),
        lambda step: shutil.rmtree(step / "policy" / "d"),
        lambda step: halve_files(step / "policy" / "d"),
        lambda step: halve_files(step / "counter" / "d"),
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
    (step, items), lines = restore(copied, all_shapes())
    assert (step, int(items["counter"]["n"])) == (2, 2) and equal(items["policy"], parameters(2))
    assert len(lines) == 1 and str(copied / "3") in lines[0]
    assert [path.name for path in (copied.parent / "damaged").iterdir()] == ["3"]
    assert [path.name for path in copied.iterdir()] == ["2"]


def with_a_flipped_bit(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def restore_in_place(directory) -> Restored:
    """Restore without moving damaged checkpoints aside."""
    lines = []
    checkpoints = checkpoint.Checkpoints(directory, 2)
    checkpoints.put_aside = lambda steps: None
    result = checkpoints.restore(all_shapes(), lines.append)
    checkpoints.close()
    return Restored(result, lines)


def test_no_flipped_byte_goes_unnoticed(copied):
    """Flip bits at seeded places of every file.

    What is restored is what was saved, to the bit, or is reported as damaged. Orbax and its
    codecs let many such changes through; the checksums do not.
    """
    rng = np.random.default_rng(0)
    reports = []  # the line of each flip, "" if it did not matter
    contents = {}
    for path in (copied / "3").rglob("*"):
        if path.is_file() and path.stat().st_size:
            contents[path] = path.read_bytes()
    largest = max(map(len, contents.values()))
    for path, data in contents.items():
        for position in rng.integers(0, len(data), 16 if len(data) == largest else 2):
            path.write_bytes(with_a_flipped_bit(data, position, rng.integers(0, 8)))
            (step, items), lines = restore_in_place(copied)
            place = (path, position, lines)
            assert equal(items["policy"], parameters(step)), place
            assert int(items["counter"]["n"]) == step, place
            assert [str(copied / "3") in line for line in lines] == [True] * (step != 3), place
            reports += lines or [""]
        path.write_bytes(data)
    noticed = sum("damaged" in line for line in reports)
    by_checksum = sum("checksum differs" in line for line in reports)
    assert noticed > len(reports) / 4 and by_checksum >= 5, (noticed, by_checksum, len(reports))


def test_the_damaged_step_is_saved_again_and_may_be_damaged_again(copied):
    for _ in range(2):
        shutil.rmtree(copied / "3" / "policy")
        checkpoints = checkpoint.Checkpoints(copied, 2)
        step, _ = checkpoints.restore({"policy": policy_shapes()}, lambda line: None)
        assert step == 2
        checkpoints.save(3, items_of(30))
        checkpoints.close()
        (step, items), lines = restore(copied, all_shapes())
        assert (step, int(items["counter"]["n"]), lines) == (3, 30, [])
        assert equal(items["policy"], parameters(30))


def test_none_that_can_be_read_is_an_error_the_next_time_too(copied):
    for step in ("2", "3"):
        shutil.rmtree(copied / step / "policy")
    for _ in range(2):
        with pytest.raises(UserError, match="none of the checkpoints"):
            restore(copied)


def test_a_save_that_was_cut_off_is_not_seen(copied):
    (copied / "4.orbax-checkpoint-tmp" / "policy").mkdir(parents=True)
    step, _ = restore(copied).result
    assert step == 3


def test_a_temporary_directory_is_not_seen_even_with_everything_in_it(copied):
    shutil.copytree(copied / "3", copied / "4.orbax-checkpoint-tmp")
    (step, items), lines = restore(copied)
    assert (step, lines) == (3, []) and equal(items["policy"], parameters(3))
    assert equal(restore_policy(copied.parent), parameters(3))
