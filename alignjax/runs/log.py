"""The log of a training run: writes the output of a step while the next step runs."""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from alignjax.algorithms.stage import Evaluation, StepOutput
from alignjax.config import UserError
from alignjax.runs.advice import Adviser
from alignjax.runs.skipped_steps import SkippedSteps
from alignjax.runs.step_writer import StepWriter
from alignjax.runs.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class PendingStep:
    """A step whose successor has not been given to the log yet."""

    step: int
    output: StepOutput
    computed: Future[float]  # when its metrics were computed, on the clock of perf_counter


class TrainingLog:
    """Writes one row for each step of a run.

    Wall-clock figures go to timing.jsonl, so a repeated run writes metrics.jsonl to the bit.

    The figures of a step are read after the next step has been dispatched. The host is therefore
    never more than one step ahead of the device: enough to keep the device busy, and a signal
    still stops a run soon. A single background thread decodes and writes a step, and has until
    the step after the next to do so. An error there is raised by the next `write`, `flush` or
    `close`. With several processes, `StepOutput.details` takes part in a collective. Only the main
    thread can keep the order of collectives, so it is called there.

    A figure that is not finite is left out of its row. If it was a loss or a gradient, the device
    has not applied the step (`optimisation.apply_gradients`). All figures and the batch of such a
    step are kept in skipped/STEP.npz. More than `max_skipped` of them in the whole run are a
    UserError. docs/metrics.md says how to replay one.
    """

    def __init__(
        self,
        workdir: Path,
        name: str,
        *,
        start: int,
        num_steps: int,
        progress_metrics: tuple[str, ...] = (),
        max_skipped: int = 0,
        say: Callable[[str], Any] = print,
        adviser: Adviser | None = None,
        tracker: Tracker | None = None,
    ):
        """Open the log of a run at the step `start`, and drop what it holds from there on.

        There are later rows if the run was cut off after its last checkpoint. The adviser's
        warnings are printed, except those of earlier steps, which have been printed before. A
        tracker receives the same figures as TensorBoard.
        """
        self.name = name
        self.max_skipped = max_skipped
        self.say = say
        self.last_time = time.perf_counter()  # when the step before was computed
        self.skipped = SkippedSteps(workdir / "skipped", start)
        self.pending: PendingStep | None = None
        self.writing: Future[None] | None = None  # of the step that the thread is writing
        self.thread = ThreadPoolExecutor(1, "log")
        self.writer: StepWriter | None = None  # in the first process only
        if jax.process_index() == 0:
            self.writer = StepWriter(
                workdir,
                name,
                start=start,
                num_steps=num_steps,
                progress_metrics=progress_metrics,
                say=say,
                adviser=adviser,
                tracker=tracker,
            )

    def write(self, step: int, output: StepOutput) -> None:
        """Take the output of a step, and let the step before it be written."""
        self._write_pending()
        computed = self.thread.submit(time_when_computed, output.metrics)
        self.pending = PendingStep(step=step, output=output, computed=computed)

    def end_step(self, step: int, costs: dict[str, Any]) -> None:
        """Add figures to the step's row of timing.jsonl, those of its save included."""
        if self.writer:
            self.writer.add_costs(step, costs)
            if self.writing is None:  # after a flush: no other thread is using the files
                self.writer.finish_timing()

    def evaluate(self, step: int, evaluate: Callable[[], Evaluation]) -> None:
        """Evaluate the state before a step, and write the result.

        The state is the one after `step` steps, which also produced the responses that
        metrics.jsonl describes in that step's row. A figure that is not finite is null. The time
        of the evaluation is not charged to any step.
        """
        self.flush()
        started = time.perf_counter()
        evaluation = evaluate()
        seconds = time.perf_counter() - started
        self.last_time += seconds
        if self.writer:
            self.writer.write_evaluation(step, evaluation, seconds)

    def flush(self) -> None:
        """Wait until every step is on the disk; UserError if too many of them were skipped."""
        self._write_pending()
        self.wait()
        if self.writer:
            self.writer.sync()

    def close(self) -> None:
        """Finish the step that is being written, and close all outputs.

        The pending step is dropped: it comes after the last flush, so a resume repeats it.
        """
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            if self.writer:
                self.writer.close()

    def _write_pending(self) -> None:
        """Write the pending step, once it is computed and the step before it is written."""
        if self.pending is None:
            return
        now = self.pending.computed.result()
        self.wait()
        pending = self.pending
        self.pending = None
        seconds = now - self.last_time
        self.last_time = now
        if jax.process_count() == 1:
            self.writing = self.thread.submit(self._write_step, pending, seconds)
        else:
            self._write_step(pending, seconds)

    def wait(self) -> None:
        """Wait for the step that is being written; after an error, drop the pending step."""
        writing = self.writing
        self.writing = None
        try:
            if writing:
                writing.result()
        except Exception:
            self.pending = None
            raise

    def _write_step(self, pending: PendingStep, seconds: float) -> None:
        """Read a step's figures, and write what is finite; keep the batch if some are not."""
        step = pending.step
        details = pending.output.details()
        on_host = jax.device_get(pending.output.metrics)
        metrics = {name: float(value) for name, value in on_host.items()} | details.metrics
        problems = not_finite(metrics)
        reason = explain(problems, metrics, pending.output.causes)
        if problems:
            # In every process, because reading the batch may be a collective.
            self.skipped.add(step, metrics, pending.output.batch())
        if self.writer:
            if problems:
                self._report_skipped(step, reason)
            finite = {name: value for name, value in metrics.items() if name not in problems}
            self.writer.write_step(step, finite, details.samples, seconds)
        if problems and self.skipped.count > self.max_skipped:
            raise UserError(
                f"{self.name}: {reason} at step {step} "
                f"({self._skipped_so_far()}); stopped. The last checkpoint is intact, and the "
                f"batches of the skipped steps are in {self.skipped.directory}"
            )

    def _report_skipped(self, step: int, reason: str) -> None:
        self.say(
            f"{self.name}: {reason} at step {step} ({self._skipped_so_far()}); "
            f"its batch is in {self.skipped.path(step)}, see docs/metrics.md"
        )

    def _skipped_so_far(self) -> str:
        return f"{self.skipped.count} skipped so far, max_skipped={self.max_skipped}"


def not_finite(figures: dict[str, float]) -> list[str]:
    """Return the names of the figures that are not finite, losses first."""
    names = [name for name, value in figures.items() if not math.isfinite(value)]
    return sorted(names, key=lambda name: "loss" not in name)


def explain(problems: list[str], metrics: dict[str, float], causes: Mapping[str, str]) -> str:
    """Return why a step is skipped: the cause if it is known, and the metric that shows it."""
    for name, cause in causes.items():
        if name in problems:
            return f"{cause}: {name} is {metrics[name]}"
    return f"{problems[0]} is {metrics[problems[0]]}" if problems else ""


def time_when_computed(metrics: dict[str, jax.Array]) -> float:
    """Wait until the metrics are computed, and return the time on the clock of perf_counter."""
    jax.block_until_ready(metrics)
    return time.perf_counter()
