"""The files of the training log: their rows, their order, and figures that are not finite."""

import itertools
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import rows, step_output

from alignjax.algorithms.stage import Evaluation, StepDetails
from alignjax.config import UserError
from alignjax.machine import console, outputs
from alignjax.runs.log import TrainingLog
from alignjax.runs.step_files import restore_rows

NO_DETAILS = StepDetails(metrics={}, samples=[])


def open_log(workdir: Path, start: int = 0, num_steps: int = 9, **arguments) -> TrainingLog:
    return TrainingLog(workdir, "run", start=start, num_steps=num_steps, **arguments)


def write_run(workdir: Path, start: int = 0, values: list[float] | None = None) -> None:
    """Write four steps with losses 0, 1, ... (or `values`), and a sample in each even one."""
    log = open_log(workdir, start, 4, progress_metrics=("loss",))
    try:
        for step in range(start, 4):
            loss = jnp.float32(values[step] if values else step)
            log.write(
                step,
                step_output(
                    {"loss": loss, "episode": 8 * (step + 1)},
                    late_metrics={"late": step / 2},
                    samples=[] if step % 2 else [{"prompt": "p"}],
                ),
            )
        log.flush()
    finally:
        log.close()


def steps_in(path: Path) -> list[int]:
    return [row["step"] for row in rows(path)]


def test_each_step_has_one_row_with_its_late_figures_and_samples(tmp_path):
    write_run(tmp_path)
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": i, "loss": i, "episode": 8 * (i + 1), "late": i / 2} for i in range(4)
    ]
    assert rows(tmp_path / "samples.jsonl") == [{"step": i, "prompt": "p"} for i in (0, 2)]
    timing = rows(tmp_path / "timing.jsonl")
    assert [set(row) for row in timing] == [{"step", "seconds", "eps"}] * 4
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_rows_from_the_restored_step_on_and_an_incomplete_line_are_written_again(tmp_path):
    write_run(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write_run(tmp_path, start=2)
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


class Figure:
    """A metric whose step is still being computed, until `done` is set."""

    def __init__(self, value: float):
        self.value = value
        self.done = threading.Event()

    def block_until_ready(self) -> None:
        self.done.wait()

    def __float__(self) -> float:
        assert self.done.is_set()
        return self.value


def test_a_step_is_written_once_the_next_is_given_and_no_call_waits_for_the_device(tmp_path):
    log = open_log(tmp_path, 0, 2)
    first = Figure(0.5)
    second = Figure(0.25)
    log.write(0, step_output({"loss": first}))  # returns, although this step is not computed yet
    assert rows(tmp_path / "metrics.jsonl") == []
    first.done.set()
    log.write(1, step_output({"loss": second}))  # likewise
    log.wait()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 0.5}]
    second.done.set()
    log.flush()
    log.flush()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25}]
    log.close()


def test_the_main_thread_continues_while_a_step_is_decoded_and_rows_keep_their_order(tmp_path):
    log = open_log(tmp_path)
    may_decode = threading.Event()
    threads = set()

    def output_of(step: int):
        def details() -> StepDetails:
            may_decode.wait()
            threads.add(threading.current_thread())
            return StepDetails(metrics={"late": step}, samples=[{"number": 0}, {"number": 1}])

        return step_output({"loss": float(step)}, details=details)

    log.write(0, output_of(0))
    log.write(1, output_of(1))  # returns, although step 0 is not decoded yet
    assert rows(tmp_path / "metrics.jsonl") == []
    may_decode.set()
    for step in range(2, 9):
        log.write(step, output_of(step))
    log.flush()
    log.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": i, "loss": i, "late": i} for i in range(9)]
    assert rows(tmp_path / "samples.jsonl") == [
        {"step": i, "number": n} for i in range(9) for n in (0, 1)
    ]
    assert steps_in(tmp_path / "timing.jsonl") == list(range(9))
    assert len(threads) == 1 and threading.main_thread() not in threads


def test_with_several_processes_details_are_read_in_the_main_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    log = open_log(tmp_path, 0, 2)
    threads = []

    def details() -> StepDetails:
        threads.append(threading.current_thread())
        return NO_DETAILS

    for step in range(2):
        log.write(step, step_output({"loss": 0.0}, details=details))
        assert len(rows(tmp_path / "metrics.jsonl")) == step
    log.flush()
    log.close()
    assert threads == [threading.main_thread()] * 2 and len(rows(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("call", ["write", "flush", "close"])
def test_an_error_while_a_step_is_written_is_raised_once_and_ends_the_rows(call, tmp_path):
    log = open_log(tmp_path)

    def details() -> StepDetails:
        raise OSError("disk full")

    log.write(0, step_output({"loss": 0.0}))
    log.write(1, step_output({"loss": 1.0}, details=details))
    log.write(2, step_output({"loss": 2.0}))
    with pytest.raises(OSError, match="disk full"):
        if call == "write":
            log.write(3, step_output({"loss": 3.0}))
        else:
            getattr(log, call)()
    if call != "close":
        log.flush()
        log.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [0]


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_closing_after_a_crash_leaves_all_steps_but_the_last(tmp_path, delay):
    log = open_log(tmp_path)
    may_decode = threading.Event()

    def slow_details() -> StepDetails:
        may_decode.wait()
        return NO_DETAILS

    for step in range(4):
        log.write(step, step_output({"loss": 0.0}, details=slow_details if step == 2 else None))
        log.end_step(step, {})
    threading.Timer(delay, may_decode.set).start()
    log.close()
    for kind in ("metrics", "timing"):
        assert steps_in(tmp_path / f"{kind}.jsonl") == [0, 1, 2]


def test_the_costs_of_a_step_are_in_its_row_of_timing(tmp_path):
    log = open_log(tmp_path, 0, 4)
    for step in range(4):
        log.write(step, step_output({"loss": 0.0}))
        if step == 2:
            log.flush()  # a save follows, whose time is among the costs of this step
            assert steps_in(tmp_path / "timing.jsonl") == [0, 1]
        log.end_step(step, {"compilations": 10 * step, "phases/save": step / 2})
        if step == 2:
            assert steps_in(tmp_path / "timing.jsonl") == [0, 1, 2]
    log.flush()
    log.close()
    timing = rows(tmp_path / "timing.jsonl")
    assert [(row["step"], row["compilations"], row["phases/save"]) for row in timing] == [
        (i, 10 * i, i / 2) for i in range(4)
    ]
    assert [set(row) for row in rows(tmp_path / "metrics.jsonl")] == [{"step", "loss"}] * 4


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_the_seconds_of_a_step_end_when_it_is_computed_however_late_it_is_read(
    tmp_path, monkeypatch
):
    clock = Clock(monkeypatch)
    log = open_log(tmp_path, 0, 2)
    for step in range(2):
        clock.now += 1.0
        log.write(step, step_output({"loss": 0.0}))
        log.pending.computed.result()
        clock.now += 0.25  # the host does something else
    log.flush()
    log.close()
    assert [row["seconds"] for row in rows(tmp_path / "timing.jsonl")] == [1.0, 1.25]


def test_a_float32_keeps_all_its_bits(tmp_path):
    values = [0.1, 1 / 3, 1e-45, 3.4028235e38]
    write_run(tmp_path, values=values)
    assert [jnp.float32(row["loss"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        jnp.float32(v) for v in values
    ]


def test_another_clock_changes_timing_alone(tmp_path, monkeypatch):
    for name, tick in (("fast", 0.5), ("slow", 2.0)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(time, "perf_counter", itertools.count(0.0, tick).__next__)
        write_run(tmp_path / name)
    for kind in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "fast" / kind).read_bytes() == (tmp_path / "slow" / kind).read_bytes()
    seconds = [
        [row["seconds"] for row in rows(tmp_path / name / "timing.jsonl")]
        for name in ("fast", "slow")
    ]
    assert seconds == [[0.5] * 4, [2.0] * 4]
    # 8 episodes in a step of 2 s.
    assert [row["eps"] for row in rows(tmp_path / "slow" / "timing.jsonl")] == [4.0] * 4


@pytest.mark.parametrize("start, left", [(0, []), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])])
def test_opening_the_log_drops_the_rows_from_its_start_on(tmp_path, start, left):
    write_run(tmp_path)
    open_log(tmp_path, start, 4).close()
    assert steps_in(tmp_path / "metrics.jsonl") == left
    assert steps_in(tmp_path / "timing.jsonl") == left
    assert steps_in(tmp_path / "samples.jsonl") == [step for step in left if step in (0, 2)]


def test_a_line_cut_off_anywhere_leaves_the_complete_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "loss": 1.5}\n'
    last = '{"step": 1, "loss": 2.5}'
    for length in range(len(last)):
        path.write_text(whole + last[:length])
        restore_rows(path, 9, pytest.fail)
        assert path.read_text() == whole
    path.write_text(whole + last)  # only the end of the line is missing
    restore_rows(path, 9, pytest.fail)
    assert path.read_text() == whole + last + "\n"
    assert [left.name for left in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_missing_file_is_not_made(tmp_path):
    restore_rows(tmp_path / "samples.jsonl", 3, pytest.fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "figures, problem",
    [
        ({"grad_norm": float("nan"), "loss": 1.0}, "grad_norm is nan"),
        ({"loss": float("-inf"), "episode": 1.0}, "loss is -inf"),
        (
            {"grad_norm": float("inf"), "policy/loss": float("nan"), "kl": float("nan")},
            "policy/loss is nan",
        ),
        ({"loss": 1.0, "late": float("inf")}, "late is inf"),
    ],
)
def test_one_skipped_step_too_many_stops_the_run_and_the_error_names_a_loss_first(
    tmp_path, figures, problem
):
    log = open_log(tmp_path)
    late_metrics = {name: value for name, value in figures.items() if name == "late"}
    metrics = {name: value for name, value in figures.items() if name != "late"}
    log.write(5, step_output(metrics, late_metrics=late_metrics))
    with pytest.raises(UserError) as raised:
        log.flush()
    log.flush()
    log.close()
    assert str(raised.value) == (
        f"run: {problem} at step 5 (1 skipped so far, max_skipped=0); stopped. The last checkpoint "
        f"is intact, and the batches of the skipped steps are in {tmp_path / 'skipped'}"
    )
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 5, **{k: v for k, v in figures.items() if math.isfinite(v)}}
    ]


def write_with_skipped_steps(
    workdir: Path, start: int, bad: set[int], max_skipped: int, say: Callable[[str], None]
) -> None:
    """Write the steps from `start` to 5. A batch holds its step; the loss of `bad` ones is NaN."""
    log = open_log(workdir, start, progress_metrics=("loss",), max_skipped=max_skipped, say=say)
    try:
        for step in range(start, 6):
            loss = float("nan") if step in bad else 0.5
            output = step_output(
                {"loss": jnp.float32(loss), "skipped": step in bad},
                samples=[{"score": [loss, 1]}],
                batch={"tokens": np.array([step])},
            )
            log.write(step, output)
        log.flush()
    finally:
        log.close()


def test_skipped_steps_are_kept_and_counted_over_the_whole_run(tmp_path):
    """Those from the restored step on are dropped, and come again."""
    printed = []
    skipped = tmp_path / "skipped"

    def names() -> list[str]:
        return sorted(path.name for path in skipped.iterdir())

    write_with_skipped_steps(tmp_path, 0, {1, 4, 5}, 3, printed.append)
    assert names() == ["1.npz", "4.npz", "5.npz"]
    (skipped / "5.npz").rename(outputs.temporary_beside(skipped / "5.npz"))  # as a kill leaves it
    (skipped / "notes.npz").write_text("mine")
    with pytest.raises(UserError, match=r"loss is nan at step 4 \(2 skipped so far, max_skipped=1"):
        write_with_skipped_steps(tmp_path, 3, {4, 5}, 1, printed.append)
    assert steps_in(tmp_path / "metrics.jsonl") == [0, 1, 2, 3, 4]
    write_with_skipped_steps(tmp_path, 3, {4, 5}, 3, printed.append)
    assert names() == ["1.npz", "4.npz", "5.npz", "notes.npz"]
    kept = dict(np.load(skipped / "4.npz"))
    assert set(kept) == {"tokens", "metrics/loss", "metrics/skipped"}
    assert kept["tokens"] == [4] and np.isnan(kept["metrics/loss"]) and kept["metrics/skipped"] == 1
    assert printed[-1] == (
        "run: loss is nan at step 5 (3 skipped so far, max_skipped=3); its batch is in "
        f"{tmp_path}/skipped/5.npz, see docs/metrics.md"
    )
    assert [("loss" in row, row["skipped"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        (i not in (1, 4, 5), i in (1, 4, 5)) for i in range(6)
    ]
    scores = [row["score"][0] for row in rows(tmp_path / "samples.jsonl")]
    assert scores == [0.5, None, 0.5, 0.5, None, None]
    for kind in ("samples", "metrics"):
        assert "NaN" not in (tmp_path / f"{kind}.jsonl").read_text()


def test_a_resume_repeats_evaluations_and_no_step_is_charged_for_them(tmp_path, monkeypatch):
    """Figures that are not finite are null, and are no skipped step."""
    printed = []
    evaluated = []
    clock = Clock(monkeypatch)

    def evaluation_after(steps: int) -> Callable[[], Evaluation]:
        def evaluate() -> Evaluation:
            evaluated.append(steps)
            clock.now += 5.0
            return Evaluation(
                figures={"score": math.nan, "kl": steps / 2},
                rows=[{"prompt": "p", "score": [math.nan, 1.0]}],
            )

        return evaluate

    def run_from(start: int) -> None:
        log = open_log(tmp_path, start, 4, say=printed.append)
        for step in range(start, 4):
            if step:
                log.evaluate(step, evaluation_after(step))
                assert steps_in(tmp_path / "metrics.jsonl") == list(range(step))
            clock.now += 1.0
            log.write(step, step_output({"loss": jnp.float32(step)}))
            log.pending.computed.result()
            log.end_step(step, {"compilations": step})
        log.flush()
        log.close()

    run_from(0)
    whole = (tmp_path / "evaluations.jsonl").read_bytes()
    assert rows(tmp_path / "evaluations.jsonl") == [
        {"step": i, "score": None, "kl": i / 2, "samples": [{"prompt": "p", "score": [None, 1.0]}]}
        for i in (1, 2, 3)
    ]
    assert printed == [
        f"run: after {i} steps, on held-out data: score nan, kl {i / 2:.3g}" for i in (1, 2, 3)
    ]
    costs = [
        {k: v for k, v in row.items() if k != "step"} for row in rows(tmp_path / "timing.jsonl")
    ]
    assert costs == [{"seconds": 1.0, "compilations": 0}] + [
        {"seconds": 1.0, "evaluation_seconds": 5.0, "compilations": i} for i in (1, 2, 3)
    ]
    assert not (tmp_path / "skipped").exists()
    assert b"eval/kl" in next((tmp_path / "tensorboard").iterdir()).read_bytes()
    run_from(2)  # as after a checkpoint of two steps
    assert (tmp_path / "evaluations.jsonl").read_bytes() == whole and evaluated == [1, 2, 3, 2, 3]
    open_log(tmp_path, 2, 4).close()  # without further evaluations
    assert steps_in(tmp_path / "evaluations.jsonl") == [1]


def test_a_table_lines_up():
    lines = console.table("a run", [("one", "1"), ("twenty", "20 %")]).splitlines()
    assert lines == ["a run", "------------", "one     1", "twenty  20 %", "------------"]


def test_a_long_title_sets_the_width_of_the_table():
    assert (
        console.table("a longer title", [("a", "1")])
        == "a longer title\n--------------\na  1\n--------------"
    )
