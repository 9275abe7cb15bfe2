"""The training loop: from the newest checkpoint to the last step, whatever interrupts it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from alignjax import config as configs
from alignjax.algorithms import optimisation
from alignjax.algorithms.stage import Stage, State
from alignjax.config import Config, UserError
from alignjax.machine import failures, processes
from alignjax.machine import workdir as workdirs
from alignjax.machine.profile import Compilations, Phases
from alignjax.machine.signals import Signals
from alignjax.runs import advice, environment
from alignjax.runs.compiling import CompileAhead
from alignjax.runs.log import TrainingLog
from alignjax.runs.tracker import Tracker
from alignjax.weights.checkpoint import Checkpoints, NotFinite, check_finite


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What the loop drives, and what watches it."""

    config: Config
    workdir: Path
    stage: Stage
    signals: Signals
    phases: Phases
    compilations: Compilations
    say: Callable[[str], None]
    tracker: Tracker | None = None

    def run(self) -> State:
        """Return the state after the last step, which is the last checkpoint.

        Raises:
          Stopped: after SIGTERM or an interrupt, once a checkpoint is saved.
          UserError: if too many steps, or the state, are not finite.
        """
        directory = self.workdir / "checkpoints"
        with contextlib.ExitStack() as stack:
            checkpoints = Checkpoints(directory, self.config.keep_checkpoints)
            stack.enter_context(contextlib.closing(checkpoints))
            stack.enter_context(contextlib.closing(self.phases))
            staging = stack.enter_context(workdirs.staging(self.workdir))
            stack.enter_context(processes.reporting_errors())
            # Within the report, which names the file of a traceback.
            stack.enter_context(failures.tracebacks_in(self.workdir))
            # Parameters are read while the programs are compiled.
            ahead = CompileAhead(
                self.config.name, self.stage.programs_ahead(), self.stage.mesh, self.say
            )
            stack.enter_context(ahead)
            first, state = self.restore_or_init(checkpoints)
            ahead.wait()
            if jax.process_index() == 0:
                environment.record(self.workdir)
            log = stack.enter_context(contextlib.closing(self.open_log(staging.local, first)))
            self.phases.begin(first, self.stage.num_steps)
            for step in range(first, self.stage.num_steps):
                state = self.run_step(state, step, log, checkpoints, staging)
            self.signals.doing = f"{self.config.name} is after its last step"
            return state

    def restore_or_init(self, checkpoints: Checkpoints) -> tuple[int, State]:
        """Return the first step to run and the state before it."""
        abstract = optimisation.to_checkpoint(self.stage.abstract_state)
        restored = checkpoints.restore(abstract, self.say)
        if restored is None:
            return 0, self.stage.init_state()
        step, items = restored
        self.say(f"{self.config.name}: resuming from step {step}")
        state = optimisation.from_checkpoint(items)
        if not compiled_all_finite(state):
            self.stop_not_finite(items, f"in the checkpoint {checkpoints.directory / str(step)}")
        return step, state

    def open_log(self, directory: Path, first: int) -> TrainingLog:
        """Open the files of a run; rows of steps from `first` on are dropped."""
        return TrainingLog(
            directory,
            self.config.name,
            start=first,
            num_steps=self.stage.num_steps,
            progress_metrics=self.stage.progress_metrics,
            max_skipped=self.config.max_skipped,
            say=self.say,
            adviser=advice.Adviser(dict(configs.flatten(self.config))),
            tracker=self.tracker,
        )

    def run_step(
        self,
        state: State,
        step: int,
        log: TrainingLog,
        checkpoints: Checkpoints,
        staging: workdirs.Staging,
    ) -> State:
        """Run a step, and save after it if it is time to, or if a signal has arrived."""
        self.signals.doing = f"{self.config.name} is at step {step} of {self.stage.num_steps}"
        every = self.config.ppo.eval_every
        if self.config.stage == "ppo" and every and step and step % every == 0:
            log.evaluate(step, lambda: self.stage.evaluate_midway(state))
            self.phases.mark("evaluation")
        state, output = self.stage.step(state, step)
        log.write(step, output)
        is_last = step + 1 == self.stage.num_steps
        stop = self.signals.received_anywhere()
        if is_last or stop or (step + 1) % self.config.checkpoint_every == 0:
            log.flush()  # raises if too many steps were skipped
            staging.publish()
            self.phases.mark("other")
            if is_last:
                state = self.stage.finalise(state)
            self.save(state, step, checkpoints)
        log.end_step(step, self.costs(step))
        if stop:
            checkpoints.close()
            raise self.signals.stopped(
                f"{self.config.name} saved at step {step + 1} of {self.stage.num_steps}; "
                "the same command resumes it"
            )
        return state

    def save(self, state: State, step: int, checkpoints: Checkpoints) -> None:
        """Save the state after a step, unless it is not finite."""
        items = optimisation.to_checkpoint(state)
        if not compiled_all_finite(state):  # a step by finite gradients may still overflow
            self.stop_not_finite(items, f"after step {step}; stopped, the last checkpoint is whole")
        checkpoints.save(step + 1, items)
        self.phases.mark("save")

    def stop_not_finite(self, items: dict[str, Any], where: str) -> None:
        """Raise UserError with the name of the first array that is not finite."""
        try:
            check_finite(items)
        except NotFinite as error:
            raise UserError(f"{self.config.name}: {error} {where}") from None

    def costs(self, step: int) -> dict[str, float]:
        """Return what timing.jsonl says of a step beside its seconds."""
        seconds = self.phases.end_step(step)
        costs = {"compilations": self.compilations.end_step(step)}
        return costs | {f"phases/{name}": round(value, 4) for name, value in seconds.items()}


compiled_all_finite = jax.jit(optimisation.all_finite)
