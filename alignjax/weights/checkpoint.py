"""Orbax checkpoints: one item for each role, one for the rest of the state, and checksums.

A checkpoint is `<workdir>/checkpoints/<step>/<item>`, and becomes visible only when it is whole.
Items are restored one at a time, onto any mesh; so a run takes one role from another run's
checkpoint. The checksums are those of the arrays in memory, before a save and after a restore:
a flipped bit in a file need not stop its readers, so what can be read may still be wrong. Beside
them a checkpoint keeps its run and its step, so one that was copied or renamed is noticed.
"""

import contextlib
import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from alignjax.config import UserError
from alignjax.machine import collectives, marker, sharding
from alignjax.machine import workdir as workdirs
from alignjax.machine.outputs import disk_problem, free_path

CHECKSUMS = "checksums"  # an item: JSON, item -> path of a leaf -> checksum
ORIGIN = "origin"  # a further entry of it: the run that saved the checkpoint, and the step
CHECKSUM_PART = 1 << 20  # elements of an array that `host_checksum` reads at a time

Tree = Any  # a tree of arrays, or of their shapes


class NotFinite(Exception):
    """An array of a checkpoint has numbers that are not finite; the text names the array."""


def silence_orbax() -> None:
    """Silence the libraries' reports of errors that they also raise.

    Orbax logs every file that it writes, and the traceback of an error that it raises as well.
    What it was still reading or writing at that moment is reported by asyncio, by a closed
    event loop, and by coroutines that were never awaited.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def show_unless_loop_is_closed(error: Any) -> None:
        if str(error.exc_value) != "Event loop is closed":
            show(error)

    sys.unraisablehook = show_unless_loop_is_closed


silence_orbax()


class Misplaced(ValueError):
    """A checkpoint of another run, or of another step than its directory says."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, keep: int | None):
        """Open a directory of checkpoints.

        `keep` is how many of the newest stay; None opens them to read only, and changes nothing.
        """
        self.directory = absolute(directory)
        self.run = run_of(directory)
        read_only = keep is None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            enable_async_checkpointing=True,
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, items: dict[str, Tree]) -> None:
        """Begin to save pytrees by name, in the background.

        The arrays may be donated as soon as this returns. Raises UserError if this save or the
        one before it cannot be written, which may show only now, or at `close`.
        """
        sums = jax.device_get({name: checksums(item) for name, item in items.items()})
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        entries: dict[str, dict] = {name: by_path(item_sums) for name, item_sums in sums.items()}
        entries[ORIGIN] = {"run": self.run, "step": step}
        arguments[CHECKSUMS] = ocp.args.JsonSave(entries)
        with self.writing():
            self.manager.save(step, args=ocp.args.Composite(**arguments), force=True)

    def restore(
        self, shapes: dict[str, Tree], say: Callable[[str], object]
    ) -> tuple[int, dict[str, Tree]] | None:
        """Return (step, items) of the newest checkpoint that can be read, None if there is none.

        Checkpoints that cannot be read are reported with `say` and moved aside. If none can be
        read they all stay where they are, and UserError is raised.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for position, step in enumerate(steps):
            items = None
            problem = "can't be used: another process could not read it"
            try:
                items = self.read(step, shapes)
            except Exception as error:  # Damaged files make the readers raise many types.
                problem = fault(error)
            if collectives.true_in_all(items is not None):
                self.put_aside(steps[:position])
                return step, items
            path = self.directory / str(step)
            say(f"checkpoint {path} {problem}; falling back to the one before")
        if steps:
            raise UserError(f"{self.directory}: none of the checkpoints {steps} can be read")
        return None

    def put_aside(self, steps: list[int]) -> None:
        """Move checkpoints into `damaged/`, beside their directory, to free their steps."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = free_path(self.directory.parent / "damaged" / str(step))
                epath.Path(aside.parent).mkdir(exist_ok=True)
                epath.Path(self.directory / str(step)).rename(aside)
        # The other processes must list the directory only when the moved ones have gone.
        collectives.true_in_all(True)
        self.manager.reload()

    def read(self, step: int, shapes: dict[str, Tree], finite: bool = False) -> dict[str, Tree]:
        """Read items of a checkpoint as arrays with the given shapes, types and shardings.

        Raises some exception if it is damaged, ValueError if an array is not the one that was
        saved, `Misplaced` if another run or another step was, and, with `finite`, NotFinite if an
        array has numbers that are not finite.
        """
        # First, because a checkpoint of another run may have other arrays, which is no damage.
        check_origin(read_checksums(self.directory / str(step)), self.run, step)
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        arguments[CHECKSUMS] = ocp.args.JsonRestore()
        composite = ocp.args.Composite(**arguments)
        items = dict(self.manager.restore(step, args=composite).items())
        saved_sums = items.pop(CHECKSUMS)
        inspections = {name: inspect(items[name]) for name in shapes}
        for name, inspection in jax.device_get(inspections).items():
            for path, number in by_path(inspection.checksums).items():
                verify(saved_sums, name, path, number)
            if finite:
                refuse_not_finite({name: inspection.finite})
        return items

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, None if there is none."""
        return self.manager.latest_step()

    def close(self) -> None:
        """Wait until every save is on disk; raise UserError if one cannot be written."""
        with self.writing():
            self.manager.wait_until_finished()
            self.manager.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an error of the body into a UserError."""
        try:
            yield
        except Exception as error:  # A full disk is another exception in each of the writers.
            reason = disk_problem(error) or short_reason(error)
            raise UserError(
                f"{self.directory}: a checkpoint can't be written ({reason}); the earlier ones "
                "are intact, and the same command resumes from them"
            ) from error


def fault(error: Exception) -> str:
    """Return why a checkpoint can't be used, as words that follow its path."""
    if isinstance(error, Misplaced):
        return str(error)
    return f"is damaged ({short_reason(error)})"


def short_reason(error: Exception) -> str:
    """Return an error's first line, or its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def mix(x: jax.Array) -> jax.Array:
    """Map uint32 numbers one to one onto others that look random.

    This is the finaliser of MurmurHash3. It takes arrays of JAX and of NumPy.
    """
    x = (x ^ x >> 16) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
    return x ^ x >> 16


@jax.jit
def checksums(tree: Tree) -> Tree:
    """Return for each leaf a uint32 checksum of its elements' bits and positions.

    It is the same on any mesh, because whole numbers add up in any order. A change of one
    element always changes it; a change of several goes unnoticed once in 2^32 times.
    """
    return jax.tree.map(checksum, tree)


class Inspection(NamedTuple):
    """What one pass over the arrays of a tree gives, each a tree of scalars."""

    checksums: Tree
    finite: Tree  # whether all numbers of an array are finite


@jax.jit
def inspect(tree: Tree) -> Inspection:
    """Return the checksum of each array, and whether all its numbers are finite."""
    return Inspection(jax.tree.map(checksum, tree), finite_arrays(tree))


def finite_arrays(tree: Tree) -> Tree:
    """Return for each array of a tree whether all its numbers are finite."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def check_finite(items: dict[str, Tree]) -> None:
    """Raise NotFinite with the name of the first array that is not finite, if there is one."""
    refuse_not_finite(jax.device_get(jax.jit(finite_arrays)(items)))


def refuse_not_finite(items: dict[str, Tree]) -> None:
    """Raise NotFinite if `finite_arrays` of some items has found an array."""
    for path, is_finite in by_path(items).items():
        if not is_finite:
            raise NotFinite(f"{path} is not finite")


def checksum(x: jax.Array) -> jax.Array:
    """Return the checksum of one array; for use inside jit."""
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.uint32(0)  # of each element in the flat array
    for axis, size in enumerate(x.shape):
        coordinate = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = position * np.uint32(size) + coordinate
    return jnp.sum(mix(words ^ mix(position)), dtype=jnp.uint32)


def host_checksum(x: np.ndarray) -> int:
    """Return the checksum that `checksum` gives, computed on the host, a part at a time."""
    words = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
    total = 0
    for start in range(0, len(words), CHECKSUM_PART):
        part = words[start : start + CHECKSUM_PART].astype(np.uint32)
        position = np.arange(start, start + len(part)).astype(np.uint32)
        total += int(mix(part ^ mix(position)).sum(dtype=np.uint64))
    return total % 2**32


def by_path(numbers: Tree) -> dict[str, int]:
    """Return a tree of scalars as {path of the leaf: number}."""
    leaves = jax.tree_util.tree_leaves_with_path(numbers)
    return {sharding.path_name(path): int(number) for path, number in leaves}


def verify(saved_sums: dict[str, dict[str, int]], item: str, path: str, number: int) -> None:
    """Raise ValueError unless an array's checksum is the one that was saved."""
    if saved_sums[item][path] != number:
        raise ValueError(f"{item}/{path} is not what was saved: its checksum differs")


def check_origin(saved_sums: dict[str, dict], run: str, step: int) -> None:
    """Raise `Misplaced` if a checkpoint says that it is of another run or another step.

    Old checkpoints say nothing, and an old run has no id, which is "" here.
    """
    origin = saved_sums.get(ORIGIN, {})
    if not isinstance(origin, dict):
        raise Misplaced(f"is damaged: expected an object as its {ORIGIN}")
    if origin.get("step", step) != step:
        raise Misplaced(f"was saved as step {origin['step']}: it has been renamed or copied")
    if run and origin.get("run") and origin["run"] != run:
        raise Misplaced("was saved by another run")


def restore_role(workdir: Path, item: str, shapes: Tree) -> Tree:
    """Read one role's parameters from the last checkpoint of a run.

    Raises UserError if it is not there, if they are not what was saved, or if they are not finite.
    """
    path = newest(workdir)
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=None)) as checkpoints:
        try:
            return checkpoints.read(int(path.name), {item: shapes}, finite=True)[item]
        except NotFinite as error:
            raise UserError(
                f"{path}: {error} (NaN or infinity), so this model can't be used"
            ) from None
        except Exception as error:  # Damaged files make the readers raise many types.
            raise UserError(f"{path} {fault(error)}") from error


def absolute(directory: Path) -> Path:
    """Return a directory as Orbax takes it: absolute, if it is not in a bucket."""
    return directory.absolute() if workdirs.is_local(directory) else directory


def run_of(directory: Path) -> str:
    """Return the id of the run that has this directory of checkpoints, "" if it is not known."""
    return marker.read(directory.parent).get("run", "")


def newest(workdir: Path) -> Path:
    """Return the directory of a run's last checkpoint.

    Its name is the step, and each item is a directory in it. A complete run's last checkpoint is
    the one that its summary names: no other replaces it. Raises UserError if it is not there or
    is not this run's.
    """
    # Not from a `Checkpoints`: to open one is collective, and one process alone may ask this.
    directory = absolute(workdir / "checkpoints")
    complete = ocp.utils.checkpoint_steps_paths(directory)
    steps = [int(path.name) for path in complete if path.name.isdecimal()]
    run = run_of(directory)
    final = final_step(workdir)
    if final is None and not steps:
        raise UserError(f"{workdir}: no checkpoint there")
    step = max(steps) if final is None else final
    path = directory / str(step)
    if step not in steps:
        raise UserError(
            f"{path}: the last checkpoint of this run is missing; its summary.json speaks of "
            f"{step} steps"
        )
    try:
        check_origin(read_checksums(path), run, step)
    except Misplaced as error:
        raise UserError(f"{path} {fault(error)}") from None
    return path


def final_step(workdir: Path) -> int | None:
    """Return the number of steps in a run's summary.json, None if it says nothing of them.

    Raises UserError if the file is damaged.
    """
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        steps = json.loads(path.read_text(encoding="utf-8")).get("steps")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: expected a JSON object: the file is damaged") from None
    return steps if isinstance(steps, int) else None


def read_checksums(path: Path) -> dict[str, dict]:
    """Return what the checksum item of a checkpoint holds, {} if it can't be read."""
    return marker.read_object(path / CHECKSUMS / "metadata")


def contents_id(path: Path) -> str:
    """Return a short hash of the arrays of a checkpoint: equal for equal arrays."""
    sums = {name: item for name, item in read_checksums(path).items() if name != ORIGIN}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def restore_array(item: Path, path: str) -> np.ndarray:
    """Read one whole array of an item's directory, and no other.

    `path` is the array's path, such as "layers/norm1/scale". Raises UserError if it cannot be
    read, is not what was saved, or is not finite.
    """
    tree: Any = 0  # Orbax ignores the value of a leaf.
    for name in reversed(path.split("/")):
        tree = {name: tree}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    arguments = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(item, args=arguments)
        (array,) = jax.tree.leaves(restored)
        saved_sums = json.loads((item.parent / CHECKSUMS / "metadata").read_text(encoding="utf-8"))
        verify(saved_sums, item.name, path, host_checksum(array))
    except Exception as error:  # Damaged files make the readers raise many types.
        raise UserError(f"{item}: {path} can't be read ({short_reason(error)})") from error
    if not np.isfinite(array).all():
        raise UserError(f"{item}: {path} is not finite (NaN or infinity)")
    return array
