"""The grid of benchmarks/checkpoints.py: where torch is installed, live; else its table."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import checkpoint_cases  # noqa: E402
import checkpoints  # noqa: E402


def test_the_page_has_a_row_for_every_topic():
    cases = checkpoint_cases.all_cases()
    assert len({case.name for case in cases}) == len(cases) >= 60
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = page.partition(checkpoints.BEGIN)[2].partition(checkpoints.END)[0]
    assert f"Of {len(cases)} small checkpoints" in table
    for topic in checkpoint_cases.by_topic(cases):
        assert f"\n| {topic} |" in table


def test_both_compute_the_same_or_we_refuse(tmp_path):
    """Live: nothing is read in another way, and nothing that transformers refuses is read."""
    pytest.importorskip("torch")
    directory = tmp_path / "cases"
    subprocess.run([sys.executable, str(checkpoints.JUDGE), str(directory)], check=True)
    cases = checkpoint_cases.all_cases()
    outcomes = {case.name: checkpoints.compare(case, directory) for case in cases}
    assert not {name: one.fault for name, one in outcomes.items() if one.fault}
