"""Orbax checkpoints: one item for each role, and one for the rest of the training state.

`<workdir>/checkpoints/<step>/<item>`; a save becomes visible only when it is whole. Items restore one at a time, which
is how one role is taken from another run's checkpoint, onto any mesh.
"""

import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from alignjax import workdir as workdirs
from alignjax.config import UserError

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file that it writes


class Checkpoints:
    def __init__(self, directory: Path, keep: int):
        self.directory = directory.absolute() if workdirs.is_local(directory) else directory
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, items: dict) -> None:
        """Begin to save pytrees by name, in the background; the arrays may be donated as soon as this returns."""
        save = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self.manager.save(step, args=ocp.args.Composite(**save), force=True)

    def restore(self, shapes: dict, say) -> tuple[int, dict] | None:
        """(step, items) of the newest checkpoint that can be read, or None where there is none.

        Those that cannot be read are moved aside, saying so; if none can, they stay, and that is a UserError.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            try:
                items = self.read(step, shapes)
            except Exception as error:  # whatever a damaged file makes the readers raise
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
                say(f"checkpoint {self.directory / str(step)} is damaged ({reason}); falling back to the one before")
                continue
            self.put_aside(steps[:i])
            return step, items
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
            self.manager.reload()

    def read(self, step: int, shapes: dict) -> dict:
        """Some of a checkpoint's items, as arrays with the shapes, types and shardings of `shapes`."""
        restore = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        return dict(self.manager.restore(step, args=ocp.args.Composite(**restore)).items())

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def close(self) -> None:
        """Wait until what was begun is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


def restore_role(workdir: Path, item: str, shapes):
    """One role's parameters from the newest checkpoint of a finished run."""
    checkpoints = Checkpoints(workdir / "checkpoints", keep=None)
    try:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{workdir}: no checkpoint there")
        return checkpoints.read(step, {item: shapes})[item]
    finally:
        checkpoints.close()


def newest(workdir: Path) -> Path:
    """The directory of a run's newest checkpoint, named by its step; an item is a directory in it."""
    checkpoints = Checkpoints(workdir / "checkpoints", keep=None)
    step = checkpoints.latest()
    checkpoints.close()
    if step is None:
        raise UserError(f"{workdir}: no checkpoint there")
    return checkpoints.directory / str(step)


def restore_array(item: Path, path: str) -> np.ndarray:
    """One array of an item's directory by its path, such as "layers/norm1/scale", whole; no other is read."""
    wanted = 0  # the value of a leaf is not looked at
    for name in reversed(path.split("/")):
        wanted = {name: wanted}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            found = reader.restore(item, args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True))
    except Exception as error:  # whatever a damaged file makes the readers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{item}: {path} can't be read ({reason})") from error
    return jax.tree.leaves(found)[0]
