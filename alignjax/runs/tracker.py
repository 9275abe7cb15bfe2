"""Weights & Biases, where --wandb PROJECT asks for it: the figures of a run by its steps, its config, its summary.

It takes the extra [wandb]. What else there is to say comes by wandb's own variables: WANDB_API_KEY or `wandb login`,
WANDB_ENTITY, WANDB_MODE=offline (`wandb sync DIR` sends it later), WANDB_DIR in place of the work directory. WORKDIR/wandb-id
names the run there, which a run that resumes goes on with. Nothing that goes wrong here stops a run.
"""

import contextlib
import importlib
import os
import secrets

import jax

from alignjax import config as configs
from alignjax.config import Config, UserError
from alignjax.machine import workdir as workdirs


class Tracker:
    """A run of Weights & Biases."""

    def __init__(self, project: str, config: Config, workdir, say=print):
        self.name, self.say, kept = config.name, say, workdir / "wandb-id"
        if not kept.exists():
            workdirs.write_atomically(kept, secrets.token_hex(4))
        os.environ.setdefault(
            "WANDB_FINISH_TIMEOUT", "60"
        )  # seconds; by itself it waits for a network without end
        where = os.environ.get("WANDB_DIR") or (workdir if workdirs.is_local(workdir) else None)
        asked = {
            "project": project,
            "name": config.name,
            "id": kept.read_text().strip(),
            "resume": "allow",
            "config": dict(configs.flatten(config)),
            "dir": where,
        }
        wandb, self.run = package(), None
        try:
            self.run = wandb.init(**asked)
        except Exception as error:
            self.say(
                f"{self.name}: Weights & Biases can't be used ({reason(error)}); the figures are kept offline, "
                "`wandb sync` sends them"
            )
            self.safely(lambda: self.start_offline(wandb, asked))
        self.first = (
            self.run.step if self.run else 0
        )  # what it has already, before a resume, it would refuse

    def start_offline(self, wandb, asked: dict) -> None:
        wandb.teardown()  # for what was begun still has the id
        self.run = wandb.init(**asked, mode="offline")

    def log(self, step: int, figures: dict) -> None:
        """Figures of a step; steps don't go down."""
        if step >= self.first:
            self.safely(lambda: self.run and self.run.log(figures, step=step))

    def summary(self, figures: dict) -> None:
        self.safely(lambda: self.run and self.run.summary.update(figures))

    def finish(self, code: int) -> None:
        self.safely(lambda: self.run and self.run.finish(exit_code=code))

    def safely(self, call) -> None:
        """Call; an error is said, and ends the tracking."""
        try:
            call()
        except Exception as error:
            self.run = None
            self.say(f"{self.name}: Weights & Biases: {reason(error)}; the run goes on without it")


def package():
    """The module wandb, or a UserError that says how to get it."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"--wandb: {error}; it takes the extra [wandb]: pip install -c constraints.txt -e '.[wandb]'"
        ) from None


def reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextlib.contextmanager
def tracking(project: str, config: Config, workdir, say=print):
    """A Tracker for as long as the context lasts; None without a project, and in all processes but the first."""
    if not project or jax.process_index():
        yield None
        return
    tracker = Tracker(project, config, workdir, say)
    try:
        yield tracker
    except BaseException:  # a signal too: the run is not complete
        tracker.finish(1)
        raise
    tracker.finish(0)
