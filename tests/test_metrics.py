"""What a run writes: one line a step, dropped from the restored step on, nothing of the clock, nothing not finite."""

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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_stops_the_run_with_its_name_and_step(tmp_path, bad):
    with pytest.raises(UserError, match=rf"run: loss is {bad} at step 2; stopped"):
        log(tmp_path, values=[0.5, 0.25, bad, 0.1])
    assert [row["loss"] for row in rows(tmp_path / "metrics.jsonl")] == [0.5, 0.25]


def test_a_table_lines_up():
    lines = metrics.table("a run", [("one", "1"), ("twenty", "20 %")]).splitlines()
    assert lines == ["a run", "------------", "one     1", "twenty  20 %", "------------"]
