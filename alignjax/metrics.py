"""What a run writes and shows: metrics.jsonl, samples.jsonl, timing.jsonl, TensorBoard, the bar, and the last table."""

import json
import math
import sys
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from alignjax.config import UserError


class Log:
    """One line a step. Wall-clock figures go to timing.jsonl, so that metrics.jsonl repeats to the bit on a rerun.

    A step's metrics are written when the next step's have been dispatched, so that the device is never waited for.
    """

    def __init__(self, workdir: Path, name: str, start: int, steps: int, shown: tuple[str, ...]):
        """Lines of steps from `start` on, written by a run that was cut off after its last checkpoint, are dropped."""
        self.name, self.shown, self.pending, self.last_time = name, shown, None, time.perf_counter()
        self.main = jax.process_index() == 0
        if not self.main:
            return
        self.files = {}
        for kind in ("metrics", "samples", "timing"):
            path = workdir / f"{kind}.jsonl"
            truncate(path, start)
            self.files[kind] = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
        self.bar = tqdm(total=steps, initial=start, desc=f"{name:>4}", unit="step", dynamic_ncols=True,
                        file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 15)  # fmt: skip

    def write(self, step: int, metrics: dict, late) -> None:
        """Take a step's metrics (device scalars) and late() -> (more metrics, rows of samples); write the step before's."""
        self.flush()
        self.pending = (step, metrics, late)

    def flush(self) -> None:
        """Write what is pending. Raises UserError at a figure that is not finite."""
        if self.pending is None:
            return
        (step, metrics, late), self.pending = self.pending, None
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        self.finite(step, metrics)
        more, samples = late()
        self.finite(step, more)
        if not self.main:
            return
        metrics |= more
        now = time.perf_counter()
        timing = {"seconds": round(now - self.last_time, 4)}
        if "episode" in metrics:
            timing["eps"] = round(metrics["episode"] / (step + 1) / timing["seconds"], 2)
        self.last_time = now
        self.line("metrics", {"step": step, **metrics})
        self.line("timing", {"step": step, **timing})
        for row in samples:
            self.line("samples", {"step": step, **row})
        for key, value in {**metrics, **timing}.items():
            self.board.add_scalar(key, value, step)
        self.bar.update(1)
        self.bar.set_postfix({k.split("/")[-1]: f"{metrics[k]:.3g}" for k in self.shown if k in metrics}, refresh=False)

    def finite(self, step: int, metrics: dict) -> None:
        bad = sorted((k for k, v in metrics.items() if not math.isfinite(v)), key=lambda k: "loss" not in k)
        if bad:
            raise UserError(
                f"{self.name}: {bad[0]} is {metrics[bad[0]]} at step {step}; stopped, the last checkpoint is whole"
            )

    def line(self, kind: str, row: dict) -> None:
        self.files[kind].write(json.dumps(row) + "\n")
        self.files[kind].flush()

    def close(self) -> None:
        if self.main:
            self.bar.close()
            self.board.close()
            for file in self.files.values():
                file.close()


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
