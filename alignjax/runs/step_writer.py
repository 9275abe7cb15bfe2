"""Write the steps of a run to its files, TensorBoard, the tracker and the progress bar."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignjax.algorithms.stage import Evaluation
from alignjax.machine import console, jsonl
from alignjax.runs import advice
from alignjax.runs.step_files import StepFiles
from alignjax.runs.tensorboard import TensorBoard
from alignjax.runs.tracker import Tracker


class StepWriter:
    """Writes everything that the first process writes about steps and evaluations.

    One thread at a time may use it, but for `add_costs`, which may be called at any time.
    """

    def __init__(
        self,
        workdir: Path,
        name: str,
        *,
        start: int,
        num_steps: int,
        progress_metrics: tuple[str, ...],
        say: Callable[[str], Any],
        adviser: advice.Adviser | None,
        tracker: Tracker | None,
    ):
        self.name = name
        self.progress_metrics = progress_metrics
        self.say = say
        self.adviser = adviser
        self.tracker = tracker
        self.files = StepFiles(workdir, start, say)
        if adviser:
            # The warnings of these steps have been printed already.
            advice.follow(adviser, self.files.rows("metrics"), self.files.rows("evaluations"))
        self.board = TensorBoard(workdir / "tensorboard", start)
        self.bar = console.progress_bar(num_steps, f"{name:>4}", "step", initial=start)
        # The last step's row of timing.jsonl, which waits for the costs known only at its end.
        self.timing: dict[str, Any] | None = None
        self.costs: dict[int, dict[str, Any]] = {}  # step -> further figures of its row

    def write_step(
        self, step: int, metrics: dict[str, float], samples: list[dict], seconds: float
    ) -> None:
        """Write a step's metrics, which are finite, its samples, and the time that it took."""
        self.finish_timing()
        self.timing = {"step": step, "seconds": round(seconds, 4)}
        if "episode" in metrics:
            responses = metrics["episode"] / (step + 1)
            self.timing["eps"] = round(responses / seconds, 2)
        row = {"step": step, **metrics}
        self.files.append("metrics", row)
        for sample in samples:
            self.files.append("samples", {"step": step, **sample})
        self._chart(step, metrics)
        self._update_bar(metrics)
        if self.adviser:
            self._warn(self.adviser.step(row))

    def write_evaluation(self, step: int, evaluation: Evaluation, seconds: float) -> None:
        """Write an evaluation of the state after `step` steps, and the time that it took."""
        self.finish_timing()  # so the rows of timing.jsonl stay in order
        self.costs[step] = {"evaluation_seconds": round(seconds, 4)}
        figures = evaluation.figures
        row = jsonl.null({"step": step, **figures, "samples": evaluation.rows})
        self.files.append("evaluations", row)
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._chart(step, {f"eval/{name}": value for name, value in finite.items()})
        listed = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        self.say(f"{self.name}: after {step} steps, on held-out data: {listed}")
        if self.adviser:
            self._warn(self.adviser.evaluation(row))

    def add_costs(self, step: int, costs: dict[str, Any]) -> None:
        """Add figures to a step's row of timing.jsonl."""
        self.costs[step] = self.costs.get(step, {}) | costs

    def finish_timing(self) -> None:
        """Write the waiting row of timing.jsonl, if there is one."""
        row = self.timing
        self.timing = None
        if row:
            step = row["step"]
            row |= self.costs.pop(step, {})
            self.files.append("timing", row)
            self._chart(step, {name: value for name, value in row.items() if name != "step"})

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        self.files.sync()

    def close(self) -> None:
        """Write the waiting row, and close every output even if one of them fails."""
        with contextlib.ExitStack() as stack:
            for output in (self.files, self.board, self.bar):
                stack.callback(output.close)
            self.finish_timing()

    def _chart(self, step: int, figures: dict[str, float]) -> None:
        self.board.write(step, figures)
        if self.tracker:
            self.tracker.log(step, figures)

    def _update_bar(self, metrics: dict[str, float]) -> None:
        self.bar.update(1)
        shown = {
            name.split("/")[-1]: f"{metrics[name]:.3g}"
            for name in self.progress_metrics
            if name in metrics
        }
        self.bar.set_postfix(shown, refresh=False)

    def _warn(self, warnings: list[advice.Warning]) -> None:
        for warning in warnings:
            self.say(advice.text(self.name, warning))
