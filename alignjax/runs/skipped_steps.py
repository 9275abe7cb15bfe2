"""Keep the batches of steps whose figures are not finite: WORKDIR/skipped/STEP.npz.

docs/metrics.md says what such a file holds, and how to compute the step's losses again.
"""

from pathlib import Path

import jax
import numpy as np

from alignjax.machine import collectives, outputs


class SkippedSteps:
    """The skipped steps of a run: how many there are, and their files."""

    def __init__(self, directory: Path, start: int):
        """Count the files of steps before `start`, and drop the later ones, which come again."""
        self.directory = directory
        steps = [int(path.stem) for path in directory.glob("*.npz") if is_step(path.stem)]
        self.count = sum(step < start for step in steps)
        if jax.process_count() > 1:
            # In a shared directory, a process may not see the newest file yet.
            self.count = int(collectives.largest_of_all(self.count))
        self.writes = jax.process_index() == 0
        if self.writes:
            outputs.remove_leftovers(directory)
            for step in steps:
                if step >= start:
                    with outputs.writing(self.path(step)):
                        self.path(step).unlink()

    def path(self, step: int) -> Path:
        """Return the path of a step's file."""
        return self.directory / f"{step}.npz"

    def add(self, step: int, metrics: dict[str, float], batch: dict[str, np.ndarray]) -> None:
        """Count a step; the first process keeps its batch and all its metrics."""
        self.count += 1
        if not self.writes:
            return
        with outputs.writing(self.directory):
            self.directory.mkdir(exist_ok=True)
        figures = {f"metrics/{name}": value for name, value in metrics.items()}
        with outputs.new_file(self.path(step)) as file:
            np.savez(file, **batch, **figures)


def is_step(name: str) -> bool:
    """Return whether a name is a step's number as `SkippedSteps.path` writes it."""
    return name.isdecimal() and name == str(int(name))
