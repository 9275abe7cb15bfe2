"""What a run writes: one line a step, dropped from the restored step on, nothing of the clock, nothing not finite."""

import itertools
import json

import jax.numpy as jnp
import pytest

from alignjax import metrics
from alignjax.config import UserError


def log(tmp_path, start=0, steps=4, values=None):
    """Steps with losses 0, 1, ... (or `values`) and one sample in each even one."""
    written = metrics.Log(tmp_path, "run", start, steps, ("loss",))
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


def test_a_step_is_written_when_the_next_is_given(tmp_path):
    written, seen = metrics.Log(tmp_path, "run", 0, 2, ()), []

    def late():
        seen.append("late")
        return {}, []

    written.write(0, {"loss": jnp.float32(0.5)}, late)
    assert rows(tmp_path / "metrics.jsonl") == [] and not seen
    written.write(1, {"loss": jnp.float32(0.25)}, late)
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 0.5}] and seen == ["late"]
    written.flush()
    written.flush()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25}]
    written.close()


def test_a_float32_keeps_all_its_bits(tmp_path):
    values = [0.1, 1 / 3, 1e-45, 3.4028235e38]
    log(tmp_path, values=values)
    assert [jnp.float32(row["loss"]) for row in rows(tmp_path / "metrics.jsonl")] == [jnp.float32(v) for v in values]


def test_another_clock_changes_timing_alone(tmp_path, monkeypatch):
    for name, tick in (("fast", 0.5), ("slow", 2.0)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(metrics.time, "perf_counter", itertools.count(0.0, tick).__next__)
        log(tmp_path / name)
    for kind in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "fast" / kind).read_bytes() == (tmp_path / "slow" / kind).read_bytes()
    seconds = [[row["seconds"] for row in rows(tmp_path / name / "timing.jsonl")] for name in ("fast", "slow")]
    assert seconds == [[0.5] * 4, [2.0] * 4]
    assert [row["eps"] for row in rows(tmp_path / "slow" / "timing.jsonl")] == [4.0] * 4  # 8 episodes a step of 2 s


@pytest.mark.parametrize("start, left", [(0, []), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])])
def test_opening_drops_the_rows_from_its_start_on(tmp_path, start, left):
    log(tmp_path)
    metrics.Log(tmp_path, "run", start, 4, ()).close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == left
    assert [row["step"] for row in rows(tmp_path / "timing.jsonl")] == left
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [step for step in left if step in (0, 2)]


def test_a_line_torn_anywhere_leaves_the_whole_ones(tmp_path):
    path, whole, last = tmp_path / "metrics.jsonl", '{"step": 0, "loss": 1.5}\n', '{"step": 1, "loss": 2.5}'
    for length in range(len(last)):
        path.write_text(whole + last[:length])
        metrics.truncate(path, 9)
        assert path.read_text() == whole
    path.write_text(whole + last)  # only the line's end is missing
    metrics.truncate(path, 9)
    assert path.read_text() == whole + last + "\n"
    assert [left.name for left in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_is_not_there_is_not_made(tmp_path):
    metrics.truncate(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("figures, name", [
    ({"grad_norm": float("nan"), "loss": 1.0}, "grad_norm is nan"),
    ({"loss": float("-inf"), "episode": 1.0}, "loss is -inf"),
    ({"grad_norm": float("inf"), "policy/loss": float("nan"), "kl": float("nan")}, "policy/loss is nan"),
])  # fmt: skip
def test_the_figure_that_is_not_finite_is_named_a_loss_before_others(tmp_path, figures, name):
    written, seen = metrics.Log(tmp_path, "run", 0, 9, ()), []
    written.write(5, figures, lambda: seen.append("late"))
    with pytest.raises(UserError) as raised:
        written.flush()
    written.flush()
    written.close()
    assert str(raised.value) == f"run: {name} at step 5; stopped, the last checkpoint is whole"
    assert rows(tmp_path / "metrics.jsonl") == rows(tmp_path / "samples.jsonl") == [] and not seen


def test_a_late_figure_that_is_not_finite_stops_the_run_too(tmp_path):
    written = metrics.Log(tmp_path, "run", 0, 9, ())
    written.write(5, {"loss": 1.0}, lambda: ({"objective/true_score": float("nan")}, []))
    with pytest.raises(UserError, match="objective/true_score is nan at step 5"):
        written.flush()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_stops_the_run_with_its_name_and_step(tmp_path, bad):
    with pytest.raises(UserError, match=rf"run: loss is {bad} at step 2; stopped"):
        log(tmp_path, values=[0.5, 0.25, bad, 0.1])
    assert [row["loss"] for row in rows(tmp_path / "metrics.jsonl")] == [0.5, 0.25]


def test_a_table_lines_up():
    lines = metrics.table("a run", [("one", "1"), ("twenty", "20 %")]).splitlines()
    assert lines == ["a run", "------------", "one     1", "twenty  20 %", "------------"]


def test_a_long_title_sets_the_width_of_the_table():
    assert metrics.table("a longer title", [("a", "1")]) == "a longer title\n--------------\na  1\n--------------"
