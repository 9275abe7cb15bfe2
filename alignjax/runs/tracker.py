"""Send a run to Weights & Biases if --wandb PROJECT asks for it.

The project receives the config, the figures of each step, and the summary. This needs the extra
[wandb]. Everything else is set by wandb's own variables: WANDB_API_KEY (or `wandb login`),
WANDB_ENTITY, WANDB_MODE=offline (`wandb sync DIR` sends the run later), and WANDB_DIR, which
replaces the work directory. WORKDIR/wandb-id holds the id of the run there; a run that resumes
continues under it. An error of Weights & Biases never stops a run.
"""

import contextlib
import importlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from alignjax import config as configs
from alignjax.config import Config, UserError
from alignjax.machine import outputs
from alignjax.machine import workdir as workdirs

FINISH_TIMEOUT = "60"  # seconds; by default, wandb waits for a network without limit
REASON_LENGTH = 200  # characters of an error message that are printed


class Tracker:
    """A run of Weights & Biases."""

    def __init__(
        self, project: str, config: Config, workdir: Path, say: Callable[[str], Any] = print
    ):
        self.name = config.name
        self.say = say
        self.run = None  # wandb's object; None once tracking has failed
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT)
        settings = {
            "project": project,
            "name": config.name,
            "id": run_id(workdir),
            "resume": "allow",
            "config": dict(configs.flatten(config)),
            "dir": local_directory(workdir),
        }
        self._start(import_wandb(), settings)
        # After a resume, wandb refuses the steps that it already has.
        self.first_step = self.run.step if self.run else 0

    def _start(self, wandb: ModuleType, settings: dict[str, Any]) -> None:
        """Start a run online, or offline if that fails."""
        try:
            self.run = wandb.init(**settings)
        except Exception as error:
            self.say(
                f"{self.name}: cannot use Weights & Biases ({reason(error)}); the figures are "
                "kept offline, and `wandb sync` sends them"
            )
            with self._errors_reported():
                wandb.teardown()  # the run that failed to start still holds the id
                self.run = wandb.init(**settings, mode="offline")

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Send figures of a step; the steps of successive calls must not decrease."""
        if self.run and step >= self.first_step:
            with self._errors_reported():
                self.run.log(figures, step=step)

    def summary(self, figures: dict[str, float]) -> None:
        """Send the figures of the run's summary."""
        if self.run:
            with self._errors_reported():
                self.run.summary.update(figures)

    def finish(self, exit_code: int) -> None:
        """End the run: 0 if it is complete."""
        if self.run:
            with self._errors_reported():
                self.run.finish(exit_code=exit_code)

    @contextlib.contextmanager
    def _errors_reported(self) -> Iterator[None]:
        """Report an error and stop tracking, without stopping the run."""
        try:
            yield
        except Exception as error:
            self.run = None
            self.say(
                f"{self.name}: Weights & Biases: {reason(error)}; the run continues without it"
            )


@contextlib.contextmanager
def tracking(
    project: str, config: Config, workdir: Path, say: Callable[[str], Any] = print
) -> Iterator[Tracker | None]:
    """Track a run inside the context.

    Yields None if there is no project, and in every process but the first.
    """
    if not project or jax.process_index():
        yield None
        return
    tracker = Tracker(project, config, workdir, say)
    try:
        yield tracker
    except BaseException:  # including a signal: the run is not complete
        tracker.finish(1)
        raise
    tracker.finish(0)


def run_id(workdir: Path) -> str:
    """Return the run's id at Weights & Biases, and make one for a new run."""
    path = workdir / "wandb-id"
    if not path.exists():
        outputs.write_text(path, secrets.token_hex(4))
    return path.read_text().strip()


def local_directory(workdir: Path) -> Path | str | None:
    """Return where wandb keeps its files: WANDB_DIR, or the work directory if it is local."""
    given = os.environ.get("WANDB_DIR")
    if given:
        return given
    return workdir if workdirs.is_local(workdir) else None


def import_wandb() -> ModuleType:
    """Return the module wandb; the UserError without it says how to install it."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"--wandb: {error}; install the extra [wandb]: "
            "pip install -c constraints.txt -e '.[wandb]'"
        ) from None


def reason(error: Exception) -> str:
    """Return an error as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]
