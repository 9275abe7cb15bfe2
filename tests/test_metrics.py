"""What a run writes: one line a step, dropped from the restored step on, nothing of the clock, nothing not finite."""

import itertools
import json
import math
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.config import UserError
from alignjax.machine import console
from alignjax.runs import log as run_log


def log(tmp_path, start=0, steps=4, values=None):
    """Steps with losses 0, 1, ... (or `values`) and one sample in each even one."""
    written = run_log.Log(tmp_path, "run", start, steps, ("loss",))
    try:
        for i in range(start, steps):
            loss = jnp.float32(values[i] if values else i)
            written.write(
                i,
                {"loss": loss, "episode": 8 * (i + 1)},
                lambda i=i: ({"late": i / 2}, [] if i % 2 else [{"prompt": "p"}]),
            )
        written.flush()
    finally:
        written.close()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_object_a_step_with_late_figures_and_samples(tmp_path):
    log(tmp_path)
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": i, "loss": i, "episode": 8 * (i + 1), "late": i / 2} for i in range(4)
    ]
    assert rows(tmp_path / "samples.jsonl") == [{"step": i, "prompt": "p"} for i in (0, 2)]
    timing = rows(tmp_path / "timing.jsonl")
    assert [set(row) for row in timing] == [{"step", "seconds", "eps"}] * 4
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_rows_from_the_restored_step_on_and_a_torn_line_are_written_again(tmp_path):
    log(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log(tmp_path, start=2)
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


def nothing():
    return {}, []


class Figure:
    """A metric whose step is still being computed: there is a figure once `done` is set."""

    def __init__(self, value):
        self.value, self.done = value, threading.Event()

    def block_until_ready(self):
        self.done.wait()

    def __float__(self):
        assert self.done.is_set()
        return self.value


def test_a_step_is_handed_over_when_the_next_is_given_and_none_is_waited_for(tmp_path):
    written, first, second = run_log.Log(tmp_path, "run", 0, 2, ()), Figure(0.5), Figure(0.25)
    written.write(0, {"loss": first}, nothing)  # returns, though this step is not computed yet
    assert rows(tmp_path / "metrics.jsonl") == []
    first.done.set()
    written.write(1, {"loss": second}, nothing)  # likewise
    written.wait()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 0.5}]
    second.done.set()
    written.flush()
    written.flush()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25}]
    written.close()


def test_the_main_thread_goes_on_while_a_step_is_decoded_and_rows_keep_their_order(tmp_path):
    written, decode, threads = run_log.Log(tmp_path, "run", 0, 9, ()), threading.Event(), set()

    def late(i):
        decode.wait()
        threads.add(threading.current_thread())
        return {"late": i}, [{"number": 0}, {"number": 1}]

    written.write(0, {"loss": 0.0}, lambda: late(0))
    written.write(1, {"loss": 1.0}, lambda: late(1))  # returns, though step 0 is not decoded yet
    assert rows(tmp_path / "metrics.jsonl") == []
    decode.set()
    for i in range(2, 9):
        written.write(i, {"loss": float(i)}, lambda i=i: late(i))
    written.flush()
    written.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": i, "loss": i, "late": i} for i in range(9)]
    assert rows(tmp_path / "samples.jsonl") == [
        {"step": i, "number": n} for i in range(9) for n in (0, 1)
    ]
    assert [row["step"] for row in rows(tmp_path / "timing.jsonl")] == list(range(9))
    assert len(threads) == 1 and threading.main_thread() not in threads


def test_of_several_processes_each_calls_late_in_its_main_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(log.jax, "process_count", lambda: 2)
    written, threads = run_log.Log(tmp_path, "run", 0, 2, ()), []
    for i in range(2):
        written.write(
            i, {"loss": 0.0}, lambda: (threads.append(threading.current_thread()), nothing())[1]
        )
        assert len(rows(tmp_path / "metrics.jsonl")) == i
    written.flush()
    written.close()
    assert threads == [threading.main_thread()] * 2 and len(rows(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("where", ["write", "flush", "close"])
def test_what_goes_wrong_while_a_step_is_written_is_raised_once_and_ends_the_rows(where, tmp_path):
    written = run_log.Log(tmp_path, "run", 0, 9, ())

    def late():
        raise OSError("disk full")

    written.write(0, {"loss": 0.0}, nothing)
    written.write(1, {"loss": 1.0}, late)
    written.write(2, {"loss": 2.0}, nothing)
    with pytest.raises(OSError, match="disk full"):
        written.write(3, {"loss": 3.0}, nothing) if where == "write" else getattr(written, where)()
    if where != "close":
        written.flush()
        written.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0]


def test_closing_after_a_crash_leaves_all_steps_but_the_last_given(tmp_path):
    for slow in (False, True):
        written, decode = run_log.Log(tmp_path, "run", 0, 9, ()), threading.Event()
        for i in range(4):
            written.write(
                i,
                {"loss": 0.0},
                lambda i=i, decode=decode: (i == 2 and decode.wait(), nothing())[1],
            )
            written.end_step(i, {})
        threading.Timer(0.05 if slow else 0.0, decode.set).start()
        written.close()
        for kind in ("metrics", "timing"):
            assert [row["step"] for row in rows(tmp_path / f"{kind}.jsonl")] == [0, 1, 2]


def test_the_costs_of_a_step_stand_in_its_line_of_timing(tmp_path):
    written = run_log.Log(tmp_path, "run", 0, 4, ())
    for i in range(4):
        written.write(i, {"loss": 0.0}, nothing)
        if i == 2:
            written.flush()  # a save follows, whose time is in the costs of this step
            assert [row["step"] for row in rows(tmp_path / "timing.jsonl")] == [0, 1]
        written.end_step(i, {"compilations": 10 * i, "phases/save": i / 2})
        if i == 2:
            assert [row["step"] for row in rows(tmp_path / "timing.jsonl")] == [0, 1, 2]
    written.flush()
    written.close()
    found = rows(tmp_path / "timing.jsonl")
    assert [(row["step"], row["compilations"], row["phases/save"]) for row in found] == [
        (i, 10 * i, i / 2) for i in range(4)
    ]
    assert [set(row) for row in rows(tmp_path / "metrics.jsonl")] == [{"step", "loss"}] * 4


def test_a_steps_seconds_end_when_it_is_computed_however_late_it_is_read(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    written = run_log.Log(tmp_path, "run", 0, 2, ())
    for i in range(2):
        now[0] += 1.0
        written.write(i, {"loss": 0.0}, nothing)
        written.ready.result()
        now[0] += 0.25  # the host does something else
    written.flush()
    written.close()
    assert [row["seconds"] for row in rows(tmp_path / "timing.jsonl")] == [1.0, 1.25]


def test_a_float32_keeps_all_its_bits(tmp_path):
    values = [0.1, 1 / 3, 1e-45, 3.4028235e38]
    log(tmp_path, values=values)
    assert [jnp.float32(row["loss"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        jnp.float32(v) for v in values
    ]


def test_another_clock_changes_timing_alone(tmp_path, monkeypatch):
    for name, tick in (("fast", 0.5), ("slow", 2.0)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(log.time, "perf_counter", itertools.count(0.0, tick).__next__)
        log(tmp_path / name)
    for kind in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "fast" / kind).read_bytes() == (tmp_path / "slow" / kind).read_bytes()
    seconds = [
        [row["seconds"] for row in rows(tmp_path / name / "timing.jsonl")]
        for name in ("fast", "slow")
    ]
    assert seconds == [[0.5] * 4, [2.0] * 4]
    assert [row["eps"] for row in rows(tmp_path / "slow" / "timing.jsonl")] == [
        4.0
    ] * 4  # 8 episodes a step of 2 s


@pytest.mark.parametrize("start, left", [(0, []), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])])
def test_opening_drops_the_rows_from_its_start_on(tmp_path, start, left):
    log(tmp_path)
    run_log.Log(tmp_path, "run", start, 4, ()).close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == left
    assert [row["step"] for row in rows(tmp_path / "timing.jsonl")] == left
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [
        step for step in left if step in (0, 2)
    ]


def test_a_line_torn_anywhere_leaves_the_whole_ones(tmp_path):
    path, whole, last = (
        tmp_path / "metrics.jsonl",
        '{"step": 0, "loss": 1.5}\n',
        '{"step": 1, "loss": 2.5}',
    )
    for length in range(len(last)):
        path.write_text(whole + last[:length])
        run_log.truncate(path, 9)
        assert path.read_text() == whole
    path.write_text(whole + last)  # only the line's end is missing
    run_log.truncate(path, 9)
    assert path.read_text() == whole + last + "\n"
    assert [left.name for left in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_is_not_there_is_not_made(tmp_path):
    run_log.truncate(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "figures, name",
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
def test_a_step_too_many_that_is_not_finite_stops_the_run_a_loss_named_before_others(
    tmp_path, figures, name
):
    written, late = (
        run_log.Log(tmp_path, "run", 0, 9, ()),
        {k: v for k, v in figures.items() if k == "late"},
    )
    written.write(5, {k: v for k, v in figures.items() if k != "late"}, lambda: (late, []))
    with pytest.raises(UserError) as raised:
        written.flush()
    written.flush()
    written.close()
    assert str(raised.value) == (
        f"run: {name} at step 5, 1 such so far, max_skipped=0; stopped, the last checkpoint is whole, what these steps "
        f"learnt from is in {tmp_path / 'skipped'}"
    )
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 5, **{k: v for k, v in figures.items() if math.isfinite(v)}}
    ]


def skipping(tmp_path, start, end, bad, most, said):
    """Steps from `start` on, of which those of `bad` are NaN; their batches are their numbers."""
    written = run_log.Log(tmp_path, "run", start, 9, ("loss",), most, said.append)
    try:
        for i in range(start, end):
            loss = float("nan") if i in bad else 0.5
            written.write(
                i,
                {"loss": jnp.float32(loss), "skipped": i in bad},
                lambda loss=loss: ({}, [{"score": [loss, 1]}]),
                lambda i=i: {"tokens": np.array([i])},
            )
        written.flush()
    finally:
        written.close()


def test_steps_that_are_not_finite_are_kept_and_counted_over_the_whole_run(tmp_path):
    """Those from the restored step on are dropped, and come anew; the last of them may be torn."""
    said, found = [], lambda: sorted(path.name for path in (tmp_path / "skipped").iterdir())
    skipping(tmp_path, 0, 6, {1, 4, 5}, 3, said)
    assert found() == ["1.npz", "4.npz", "5.npz"]
    (tmp_path / "skipped" / "5.npz").rename(tmp_path / "skipped" / "5.partial")
    with pytest.raises(UserError, match="loss is nan at step 4, 2 such so far, max_skipped=1"):
        skipping(tmp_path, 3, 6, {4, 5}, 1, said)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    skipping(tmp_path, 3, 6, {4, 5}, 3, said)
    assert found() == ["1.npz", "4.npz", "5.npz"]
    kept = dict(np.load(tmp_path / "skipped" / "4.npz"))
    assert set(kept) == {"tokens", "metrics/loss", "metrics/skipped"}
    assert kept["tokens"] == [4] and np.isnan(kept["metrics/loss"]) and kept["metrics/skipped"] == 1
    assert said[-1] == (
        f"run: loss is nan at step 5 (3 such so far, max_skipped=3); what it learnt from is in "
        f"{tmp_path}/skipped/5.npz, see the module alignjax.stages"
    )
    assert [("loss" in row, row["skipped"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        (i not in (1, 4, 5), i in (1, 4, 5)) for i in range(6)
    ]
    assert [row["score"][0] for row in rows(tmp_path / "samples.jsonl")] == [
        0.5,
        None,
        0.5,
        0.5,
        None,
        None,
    ]
    assert (
        "NaN"
        not in (tmp_path / "samples.jsonl").read_text() + (tmp_path / "metrics.jsonl").read_text()
    )


def test_an_evaluation_is_a_row_that_a_resume_makes_again_and_no_steps_time(tmp_path, monkeypatch):
    """Its figures that are not finite are null; it is of the state before a step, whose seconds it leaves alone."""
    said, given, now = [], [], [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])

    def evaluate(state):
        given.append(state)
        now[0] += 5.0
        return {"score": math.nan, "kl": state / 2}, [{"prompt": "p", "score": [math.nan, 1.0]}]

    def run(start, end):
        written = run_log.Log(tmp_path, "run", start, 4, (), 0, said.append)
        for i in range(start, end):
            if i:
                written.evaluate(i, evaluate, i)
                assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == list(range(i))
            now[0] += 1.0
            written.write(i, {"loss": jnp.float32(i)}, nothing)
            written.ready.result()
            written.end_step(i, {"compilations": i})
        written.flush()
        written.close()

    run(0, 4)
    whole = (tmp_path / "evaluations.jsonl").read_bytes()
    assert rows(tmp_path / "evaluations.jsonl") == [
        {"step": i, "score": None, "kl": i / 2, "samples": [{"prompt": "p", "score": [None, 1.0]}]}
        for i in (1, 2, 3)
    ]
    assert said == [
        f"run: after {i} steps, on what is held out: score nan, kl {i / 2:.3g}" for i in (1, 2, 3)
    ]
    costs = [
        {k: v for k, v in row.items() if k != "step"} for row in rows(tmp_path / "timing.jsonl")
    ]
    assert costs == [{"seconds": 1.0, "compilations": 0}] + [
        {"seconds": 1.0, "evaluation_seconds": 5.0, "compilations": i} for i in (1, 2, 3)
    ]
    assert not (tmp_path / "skipped").exists()
    assert b"eval/kl" in next((tmp_path / "tensorboard").iterdir()).read_bytes()
    run(2, 4)  # as after a checkpoint of two steps
    assert (tmp_path / "evaluations.jsonl").read_bytes() == whole and given == [1, 2, 3, 2, 3]
    run_log.Log(tmp_path, "run", 2, 4, ()).close()  # without any more of them
    assert [row["step"] for row in rows(tmp_path / "evaluations.jsonl")] == [1]


def test_a_table_lines_up():
    lines = console.table("a run", [("one", "1"), ("twenty", "20 %")]).splitlines()
    assert lines == ["a run", "------------", "one     1", "twenty  20 %", "------------"]


def test_a_long_title_sets_the_width_of_the_table():
    assert (
        console.table("a longer title", [("a", "1")])
        == "a longer title\n--------------\na  1\n--------------"
    )
