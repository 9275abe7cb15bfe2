"""What a run writes and shows: JSON lines (metrics, samples, evaluations, timing), TensorBoard, the bar, the last table."""

import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from alignjax.config import UserError
from alignjax.machine import console, jsonl, processes
from alignjax.runs import advice, records

FLUSH = 60  # seconds, at most, until TensorBoard can see a step


class Log:
    """One line a step. Wall-clock figures go to timing.jsonl, so that metrics.jsonl repeats to the bit on a rerun.

    A step's figures are read when the next step has been dispatched, so the host is never more than one step ahead of
    the device: enough to keep it busy, and a signal still stops a run soon. To decode and write them is the
    work of one other thread, which has until the step after that. What goes wrong there is raised here, by the next
    write, flush or close. With several processes `late` is a collective, whose place among the others only the main
    thread can keep, and is called there.

    A figure that is not finite is left out of its line. Its step, which the device has not applied if it was a loss or a
    gradient (`update.apply_gradients`), leaves all figures and its batch in skipped/STEP.npz, and one more such step than
    `max_skipped` in the whole run is a UserError. `stages` says how to replay one.
    """

    def __init__(
        self,
        workdir: Path,
        name: str,
        start: int,
        steps: int,
        shown: tuple[str, ...],
        max_skipped=0,
        say=print,
        adviser: advice.Adviser | None = None,
        tracker=None,
    ):
        """What is there of steps from `start` on, of a run that was cut off after its last checkpoint, is dropped.

        The adviser's warnings are said, but for those of the steps before `start`, which have been; a tracker gets what
        TensorBoard gets.
        """
        self.name, self.shown, self.last_time = name, shown, time.perf_counter()
        self.max_skipped, self.say, self.kept = max_skipped, say, workdir / "skipped"
        steps_kept = [int(path.stem) for path in self.kept.glob("*.npz")]
        self.skipped = sum(step < start for step in steps_kept)
        if (
            jax.process_count() > 1
        ):  # a shared directory may still look to one as it did before the last file
            self.skipped = int(processes.largest_of_all(self.skipped))
        self.pending = self.ready = (
            None  # the last step, until the next is there; the Future of when it was computed
        )
        self.writing = None  # the Future of the step that is being written
        self.timing, self.costs = (
            None,
            {},
        )  # the last row of timing.jsonl, until its step ends; what the ends have told
        self.adviser, self.tracker = adviser, tracker
        self.thread = ThreadPoolExecutor(1, "log")
        self.main = jax.process_index() == 0
        if not self.main:
            return
        for step in steps_kept:
            if step >= start:
                self.file_of(step).unlink()
        self.files = {}
        for kind in ("metrics", "samples", "timing"):
            path = workdir / f"{kind}.jsonl"
            truncate(path, start)
            self.files[kind] = path.open("a", encoding="utf-8")
        self.evaluations = workdir / "evaluations.jsonl"  # not every run has one
        truncate(self.evaluations, start)
        if adviser:
            advice.follow(
                adviser, records.lines(workdir / "metrics.jsonl"), records.lines(self.evaluations)
            )
        (workdir / "tensorboard").mkdir(exist_ok=True)
        # Without the thread of a SummaryWriter: an error would end it, and leave the run waiting for it.
        self.board, self.flushed = EventsWriter(str(workdir / "tensorboard" / "events")), 0.0
        self.board.write_event(
            Event(
                wall_time=time.time(), step=start, session_log=SessionLog(status=SessionLog.START)
            )
        )
        self.bar = console.progress_bar(steps, f"{name:>4}", "step", initial=start)

    def write(self, step: int, metrics: dict, late, batch=dict) -> None:
        """Take a step's metrics (device scalars), late() -> (more metrics, rows of samples) and batch() -> {name: array},
        what it learnt from; write the step before's.

        Whatever these two read must be host data that stays as it is, or arrays that no later step donates.
        """
        self.hand_over()
        self.pending, self.ready = (step, metrics, late, batch), self.thread.submit(ready, metrics)

    def end_step(self, step: int, costs: dict) -> None:
        """Take what else timing.jsonl is to say of a step, its save included."""
        if self.main:
            self.costs[step] = self.costs.get(step, {}) | costs
            if self.writing is None:  # as after a flush: nobody else holds the files
                self.put_timing()

    def evaluate(self, step: int, evaluate, state) -> None:
        """Write what evaluate(state) -> (figures, samples) says of the state before a step, that is after so many steps:
        what metrics.jsonl says of a step's responses is of the same policy.

        A figure that is not finite is null. The seconds that it takes are no step's.
        """
        self.flush()
        begun = time.perf_counter()
        figures, samples = evaluate(state)
        seconds = time.perf_counter() - begun
        self.last_time += seconds
        if not self.main:
            return
        self.put_timing()  # so that no step comes after a later one
        self.costs[step] = {"evaluation_seconds": round(seconds, 4)}
        if "evaluations" not in self.files:
            self.files["evaluations"] = self.evaluations.open("a", encoding="utf-8")
        row = jsonl.null({"step": step, **figures, "samples": samples})
        self.line("evaluations", row)
        self.chart(step, {f"eval/{name}": x for name, x in figures.items() if math.isfinite(x)})
        found = ", ".join(f"{name} {x:.3g}" for name, x in figures.items())
        self.say(f"{self.name}: after {step} steps, on what is held out: {found}")
        self.warn(self.adviser.evaluation(row) if self.adviser else [])

    def flush(self) -> None:
        """Wait until what is pending is written. Raises UserError where that is a step too many that is not finite."""
        self.hand_over()
        self.wait()

    def hand_over(self) -> None:
        """Let what is pending be written, once it is computed and the step before it is written."""
        if self.pending is None:
            return
        now = self.ready.result()
        self.wait()
        job, self.pending = (*self.pending, now - self.last_time), None
        self.last_time = now
        if jax.process_count() == 1:
            self.writing = self.thread.submit(self.put, *job)
        else:
            self.put(*job)

    def wait(self) -> None:
        """Wait for the step that is being written. After an error what is pending isn't written any more."""
        writing, self.writing = self.writing, None
        try:
            if writing:
                writing.result()
        except Exception:
            self.pending = None
            raise

    def put(self, step: int, metrics: dict, late, batch, seconds: float) -> None:
        """Write a step."""
        more, samples = late()
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()} | more
        bad = not_finite(metrics)
        if bad:
            self.keep(step, metrics, bad[0], batch())
        if self.main:
            self.put_lines(
                step, {k: v for k, v in metrics.items() if k not in bad}, samples, seconds
            )
        if bad and self.skipped > self.max_skipped:
            raise UserError(
                f"{self.name}: {bad[0]} is {metrics[bad[0]]} at step {step}, {self.skipped} such so far, "
                f"max_skipped={self.max_skipped}; stopped, the last checkpoint is whole, what these steps learnt "
                f"from is in {self.kept}"
            )

    def keep(self, step: int, metrics: dict, name: str, batch: dict) -> None:
        """Count a step whose metric `name` is not finite, keep its batch and all its metrics, and say so."""
        self.skipped += 1
        if not self.main:
            return
        self.kept.mkdir(exist_ok=True)
        path = self.file_of(step)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **batch, **{f"metrics/{k}": v for k, v in metrics.items()})
        partial.replace(path)
        self.say(
            f"{self.name}: {name} is {metrics[name]} at step {step} ({self.skipped} such so far, max_skipped="
            f"{self.max_skipped}); what it learnt from is in {path}, see the module alignjax.stages"
        )

    def file_of(self, step: int) -> Path:
        return self.kept / f"{step}.npz"

    def put_lines(self, step: int, metrics: dict, samples: list[dict], seconds: float) -> None:
        self.put_timing()
        self.timing = {"step": step, "seconds": round(seconds, 4)}
        if "episode" in metrics:
            self.timing["eps"] = round(metrics["episode"] / (step + 1) / seconds, 2)
        self.line("metrics", {"step": step, **metrics})
        for row in samples:
            self.line(
                "samples", {"step": step, **row}
            )  # lists of figures, in which null is one that is not finite
        self.chart(step, metrics)
        self.bar.update(1)
        self.bar.set_postfix(
            {k.split("/")[-1]: f"{metrics[k]:.3g}" for k in self.shown if k in metrics},
            refresh=False,
        )
        self.warn(self.adviser.step({"step": step, **metrics}) if self.adviser else [])

    def warn(self, warnings: list[advice.Warning]) -> None:
        for warning in warnings:
            self.say(advice.text(self.name, warning))

    def put_timing(self) -> None:
        """Write the last step's line of timing.jsonl, which waits for what is known only at the step's end."""
        timing, self.timing = self.timing, None
        if timing:
            step = timing["step"]
            timing |= self.costs.pop(step, {})
            self.line("timing", timing)
            self.chart(step, {k: v for k, v in timing.items() if k != "step"})

    def line(self, kind: str, row: dict) -> None:
        self.files[kind].write(jsonl.dumps([row]) + "\n")
        self.files[kind].flush()

    def chart(self, step: int, figures: dict) -> None:
        for key, value in figures.items():
            self.board.write_event(
                Event(wall_time=time.time(), step=step, summary=scalar(key, value))
            )
        if self.tracker:
            self.tracker.log(step, figures)
        if time.monotonic() - self.flushed > FLUSH:
            self.board.flush()
            self.flushed = time.monotonic()

    def close(self) -> None:
        """Finish what is being written. A step that was neither followed nor flushed is dropped: a resume repeats it."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            if self.main:
                with contextlib.ExitStack() as stack:  # all of them, whatever happens to one
                    for file in (*self.files.values(), self.board, self.bar):
                        stack.callback(file.close)
                    self.put_timing()


def not_finite(figures: dict) -> list[str]:
    """Names of the figures that are not finite, losses first."""
    return sorted(
        (k for k, v in figures.items() if not math.isfinite(v)), key=lambda k: "loss" not in k
    )


def ready(metrics: dict) -> float:
    """When these were computed, on the clock of time.perf_counter: waits until then."""
    jax.block_until_ready(metrics)
    return time.perf_counter()


def truncate(path: Path, start: int) -> None:
    """Keep of a JSON-lines file the rows of steps before `start`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in jsonl.lines(path):
        try:
            if jsonl.parse(line.text, line.where)["step"] < start:
                kept.append(line.text.rstrip("\n") + "\n")
        except (UserError, KeyError):
            break
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
