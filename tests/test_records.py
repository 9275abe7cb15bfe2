"""A run is read as it was written; a missing config and invalid JSON are errors."""

import json

import pytest

from alignjax.config import UserError
from alignjax.runs import records


def test_an_unfinished_run_is_read_without_its_incomplete_last_line(tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "ppo", "name": "ppo", "ppo.clip": 0.2}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 1.0}\n{"step": 2, "lo'
    )
    run = records.read(tmp_path)
    assert run.workdir == tmp_path and run.config["ppo.clip"] == 0.2 and run.summary == {}
    assert run.metrics == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 1.0}]
    assert run.samples == [] and run.evaluations == [] and run.timing == []
    summary = {"name": "ppo", "stage": "ppo", "steps": 3, "training_seconds": 1.5}
    summary["table"] = [["score", "1.0"]]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert records.read(tmp_path).summary == summary


def test_an_error_names_the_file_and_the_line(tmp_path):
    with pytest.raises(UserError, match="no config.json there, so this is not a run"):
        records.read(tmp_path)
    (tmp_path / "config.json").write_text('{"stage": "lm"}')
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"samples.jsonl:2: not JSON: "):
        records.read(tmp_path)
