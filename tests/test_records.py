"""What a run has left is read as it was written; what isn't there, or isn't JSON, is said."""

import pytest

from alignjax.config import UserError
from alignjax.runs import records


def test_a_run_is_read_as_it_stands(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "ppo", "ppo.clip": 0.2}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 1.0}\n{"step": 2, "lo'
    )
    found = records.read(tmp_path)
    assert (found.workdir, found.config["ppo.clip"], found.summary) == (tmp_path, 0.2, {})
    assert found.metrics == [
        {"step": 0, "loss": 1.5},
        {"step": 1, "loss": 1.0},
    ]  # the third is being written
    assert (found.samples, found.evaluations, found.timing) == ([], [], [])
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    assert records.read(tmp_path).summary == {"steps": 3}


def test_what_is_wrong_names_the_file_and_the_line(tmp_path):
    with pytest.raises(UserError, match="no config.json there, so this is not a run"):
        records.read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"samples.jsonl:2: not JSON: "):
        records.read(tmp_path)
