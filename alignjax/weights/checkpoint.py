"""Orbax checkpoints: one item for each role, one for the rest of the training state, and a checksum of every array.

`<workdir>/checkpoints/<step>/<item>`; a save becomes visible only when it is whole. Items restore one at a time, which
is how one role is taken from another run's checkpoint, onto any mesh. The checksums are of the arrays in memory, before
a save and after a restore: a flipped bit in a file need not stop its readers, and what reads well may still be wrong.
"""

import contextlib
import json
import logging
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from alignjax.config import UserError
from alignjax.machine import sharding
from alignjax.machine import workdir as workdirs
from alignjax.machine.lock import unwritable

# Orbax tells of every file that it writes, and shows the traceback of an error that it also raises; what it was still
# reading or writing then is heard of from asyncio, from a loop that is closed, and from coroutines that are dropped.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
show = sys.unraisablehook
sys.unraisablehook = lambda found: (
    None if str(found.exc_value) == "Event loop is closed" else show(found)
)

SUMS = "checksums"  # an item: JSON, item -> path of a leaf -> number


class Checkpoints:
    def __init__(self, directory: Path, keep: int | None):
        """`keep` is how many stay, the newest; None is to read only, and touches nothing."""
        self.directory = directory.absolute() if workdirs.is_local(directory) else directory
        reads = keep is None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not reads,
            cleanup_tmp_directories=not reads,
            read_only=reads,
            enable_async_checkpointing=True,
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, items: dict) -> None:
        """Begin to save pytrees by name, in the background; the arrays may be donated as soon as this returns.

        UserError if this or the save before can't be written: that may show only now, or when they are closed.
        """
        save = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        sums = jax.device_get({name: checksums(item) for name, item in items.items()})
        save[SUMS] = ocp.args.JsonSave({name: by_path(item) for name, item in sums.items()})
        with self.writing():
            self.manager.save(step, args=ocp.args.Composite(**save), force=True)

    def restore(self, shapes: dict, say) -> tuple[int, dict] | None:
        """(step, items) of the newest checkpoint that can be read, or None where there is none.

        Those that cannot be read are moved aside, saying so; if none can, they stay, and that is a UserError.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            items = told = None
            try:
                items = self.read(step, shapes)
            except Exception as error:  # whatever a damaged file makes the readers raise
                told = reason(error)
            if everywhere(items is not None):
                self.put_aside(steps[:i])
                return step, items
            damaged = f"checkpoint {self.directory / str(step)} is damaged ({told or 'as another process found'})"
            say(f"{damaged}; falling back to the one before")
        if steps:
            raise UserError(f"{self.directory}: none of the checkpoints {steps} can be read")
        return None

    def put_aside(self, steps: list[int]) -> None:
        """Move checkpoints into `damaged/` beside theirs, so that their steps can be saved again."""
        for step in steps if jax.process_index() == 0 else ():
            aside = epath.Path(self.directory.parent / "damaged" / str(step))
            aside.parent.mkdir(exist_ok=True)
            aside.rmtree(missing_ok=True)
            epath.Path(self.directory / str(step)).rename(aside)
        if steps:
            everywhere(True)  # only when they have gone do the others look at what there is
            self.manager.reload()

    def read(self, step: int, shapes: dict) -> dict:
        """Some of a checkpoint's items, as arrays with the shapes, types and shardings of `shapes`.

        Raises, one thing or another, if it is damaged, and ValueError unless the arrays are those that were saved.
        """
        restore = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        restore[SUMS] = ocp.args.JsonRestore()
        items = dict(self.manager.restore(step, args=ocp.args.Composite(**restore)).items())
        saved = items.pop(SUMS)
        for name, found in jax.device_get(
            {name: checksums(items[name]) for name in shapes}
        ).items():
            for path, number in by_path(found).items():
                agree(saved, name, path, number)
        return items

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def close(self) -> None:
        """Wait until what was begun is on disk; UserError if it can't be written."""
        with self.writing():
            self.manager.wait_until_finished()
            self.manager.close()

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except Exception as error:  # a full disk has a different name in each of the writers
            raise UserError(
                f"{self.directory}: a checkpoint can't be written ({unwritable(error) or reason(error)}); "
                "those before it are whole, and the same command goes on from them"
            ) from error


def reason(error: Exception) -> str:
    """An error's first line, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def mixed(x):
    """uint32 numbers, each made another by a map that is one to one: the finalizer of MurmurHash3."""
    x = (x ^ x >> 16) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
    return x ^ x >> 16


@jax.jit
def checksums(tree):
    """For each leaf a uint32 number by its bits and their places: the same on any mesh, as whole numbers add in any order.

    That one element is another is always seen; that more are, but for one time in 2^32.
    """

    def of(x):
        words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.uint32(0)
        for axis, size in enumerate(x.shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(mixed(words ^ mixed(place)), dtype=jnp.uint32)

    return jax.tree.map(of, tree)


def checksum(x: np.ndarray) -> int:
    """The number that `checksums` gives, made on the host and a part at a time."""
    words, total, size = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}"), 0, 2**20
    for first in range(0, len(words), size):
        part = words[first : first + size].astype(np.uint32)
        place = np.arange(first, first + len(part)).astype(np.uint32)
        total += int(mixed(part ^ mixed(place)).sum(dtype=np.uint64))
    return total % 2**32


def by_path(sums) -> dict[str, int]:
    return {
        sharding.path_name(path): int(x) for path, x in jax.tree_util.tree_leaves_with_path(sums)
    }


def agree(saved: dict, item: str, path: str, number: int) -> None:
    if saved[item][path] != number:
        raise ValueError(f"{item}/{path} is not what was saved: its checksum differs")


def everywhere(holds: bool) -> bool:
    """Whether something holds in every process; all wait for all."""
    return (
        holds
        if jax.process_count() == 1
        else bool(multihost_utils.process_allgather(np.array(holds)).all())
    )


def restore_role(workdir: Path, item: str, shapes):
    """One role's parameters from the newest checkpoint of a finished run; UserError if they aren't what was saved."""
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=None)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{workdir}: no checkpoint there")
        try:
            return checkpoints.read(step, {item: shapes})[item]
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise UserError(
                f"{checkpoints.directory / str(step)} is damaged ({reason(error)})"
            ) from error


def newest(workdir: Path) -> Path:
    """The directory of a run's newest checkpoint, named by its step; an item is a directory in it."""
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=None)) as checkpoints:
        step = checkpoints.latest()
    if step is None:
        raise UserError(f"{workdir}: no checkpoint there")
    return checkpoints.directory / str(step)


def restore_array(item: Path, path: str) -> np.ndarray:
    """One array of an item's directory by its path, such as "layers/norm1/scale", whole; no other is read.

    UserError if it can't be read, or isn't what was saved.
    """
    wanted = 0  # the value of a leaf is not looked at
    for name in reversed(path.split("/")):
        wanted = {name: wanted}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            found = reader.restore(
                item, args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
            )
        (array,) = jax.tree.leaves(found)
        saved = json.loads((item.parent / SUMS / "metadata").read_text(encoding="utf-8"))
        agree(saved, item.name, path, checksum(array))
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise UserError(f"{item}: {path} can't be read ({reason(error)})") from error
    return array
