"""What a run writes and shows: metrics.jsonl, samples.jsonl, timing.jsonl, TensorBoard, the bar, and the last table."""

import contextlib
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from alignjax.config import UserError

FLUSH = 60  # seconds, at most, until TensorBoard can see a step


class Log:
    """One line a step. Wall-clock figures go to timing.jsonl, so that metrics.jsonl repeats to the bit on a rerun.

    A step's figures are read when the next step has been dispatched, so the host is never more than one step ahead of
    the device: enough to keep it busy, and a signal or a NaN still stops a run soon. To decode and write them is the
    work of one other thread, which has until the step after that. What goes wrong there is raised here, by the next
    write, flush or close. With several processes `late` is a collective, whose place among the others only the main
    thread can keep, and is called there.
    """

    def __init__(self, workdir: Path, name: str, start: int, steps: int, shown: tuple[str, ...]):
        """Lines of steps from `start` on, written by a run that was cut off after its last checkpoint, are dropped."""
        self.name, self.shown, self.last_time = name, shown, time.perf_counter()
        self.pending = self.ready = None  # the last step, until the next is there; the Future of when it was computed
        self.writing = None  # the Future of the step that is being written
        self.timing, self.costs = None, {}  # the last row of timing.jsonl, until its step ends; what the ends have told
        self.thread = ThreadPoolExecutor(1, "log")
        self.main = jax.process_index() == 0
        if not self.main:
            return
        self.files = {}
        for kind in ("metrics", "samples", "timing"):
            path = workdir / f"{kind}.jsonl"
            truncate(path, start)
            self.files[kind] = path.open("a", encoding="utf-8")
        (workdir / "tensorboard").mkdir(exist_ok=True)
        # Without the thread of a SummaryWriter: an error would end it, and leave the run waiting for it.
        self.board, self.flushed = EventsWriter(str(workdir / "tensorboard" / "events")), 0.0
        self.board.write_event(
            Event(wall_time=time.time(), step=start, session_log=SessionLog(status=SessionLog.START))
        )
        self.bar = tqdm(total=steps, initial=start, desc=f"{name:>4}", unit="step", dynamic_ncols=True,
                        file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 15)  # fmt: skip

    def write(self, step: int, metrics: dict, late) -> None:
        """Take a step's metrics (device scalars) and late() -> (more metrics, rows of samples); write the step before's.

        Whatever `late` reads must be host data that stays as it is, or arrays that no later step donates.
        """
        self.hand_over()
        self.pending, self.ready = (step, metrics, late), self.thread.submit(ready, metrics)

    def end_step(self, step: int, costs: dict) -> None:
        """Take what else timing.jsonl is to say of a step, its save included."""
        if self.main:
            self.costs[step] = costs
            if self.writing is None:  # as after a flush: nobody else holds the files
                self.put_timing()

    def flush(self) -> None:
        """Wait until what is pending is written. Raises UserError at a figure that is not finite."""
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

    def put(self, step: int, metrics: dict, late, seconds: float) -> None:
        """Write a step."""
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        self.finite(step, metrics)
        more, samples = late()
        self.finite(step, more)
        if not self.main:
            return
        metrics |= more
        self.put_timing()
        self.timing = {"step": step, "seconds": round(seconds, 4)}
        if "episode" in metrics:
            self.timing["eps"] = round(metrics["episode"] / (step + 1) / seconds, 2)
        self.line("metrics", {"step": step, **metrics})
        for row in samples:
            self.line("samples", {"step": step, **row})
        self.chart(step, metrics)
        self.bar.update(1)
        self.bar.set_postfix({k.split("/")[-1]: f"{metrics[k]:.3g}" for k in self.shown if k in metrics}, refresh=False)

    def put_timing(self) -> None:
        """Write the last step's line of timing.jsonl, which waits for what is known only at the step's end."""
        timing, self.timing = self.timing, None
        if timing:
            step = timing["step"]
            timing |= self.costs.pop(step, {})
            self.line("timing", timing)
            self.chart(step, {k: v for k, v in timing.items() if k != "step"})

    def finite(self, step: int, metrics: dict) -> None:
        bad = sorted((k for k, v in metrics.items() if not math.isfinite(v)), key=lambda k: "loss" not in k)
        if bad:
            raise UserError(
                f"{self.name}: {bad[0]} is {metrics[bad[0]]} at step {step}; stopped, the last checkpoint is whole"
            )

    def line(self, kind: str, row: dict) -> None:
        self.files[kind].write(json.dumps(row) + "\n")
        self.files[kind].flush()

    def chart(self, step: int, figures: dict) -> None:
        for key, value in figures.items():
            self.board.write_event(Event(wall_time=time.time(), step=step, summary=scalar(key, value)))
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


def ready(metrics: dict) -> float:
    """When these were computed, on the clock of time.perf_counter: waits until then."""
    jax.block_until_ready(metrics)
    return time.perf_counter()


def truncate(path: Path, start: int) -> None:
    """Keep of a JSON-lines file the rows of steps before `start`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < start:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def table(title: str, rows: list[tuple[str, str]]) -> str:
    """A two-column table as text."""
    width = max(len(name) for name, _ in rows)
    rule = "-" * max(len(title), width + 2 + max(len(value) for _, value in rows))
    return "\n".join([title, rule, *(f"{name:<{width}}  {value}" for name, value in rows), rule])
