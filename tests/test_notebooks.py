"""The notebooks run from the first cell to the last, and their saved outputs are those of a run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FULL_SIZE = '\nVARIANT = ""'
TINY = '\nVARIANT = ":tiny"'


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def cells_of(notebook: dict, kind: str) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize(
    "name, runs, result",
    [
        ("quickstart", ("sft-tiny", "rm-tiny", "ppo-tiny"), "ppo-tiny/report.html"),
        ("your_own_reward", ("sft-tiny",), "modest/summary.json"),
    ],
)
def test_a_notebook_runs(chain, tmp_path, name, runs, result):
    """Run all code cells at the tiny size, as one program.

    quickstart reuses complete runs; your_own_reward trains.
    """
    for run in runs:
        shutil.copytree(chain.runs / run, tmp_path / "runs" / run)
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    program = "\n".join(source(cell) for cell in cells_of(notebook, "code"))
    assert program.count(FULL_SIZE) == 1
    (tmp_path / "notebook.py").write_text(program.replace(FULL_SIZE, TINY))
    process = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "runs" / result).stat().st_size


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid(path):
    """It has what nbformat 4.5 requires, is small, and its code cells are plain Python."""
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[\w-]{1,64}", cell_id) for cell_id in ids)
    assert {cell["cell_type"] for cell in cells} == {"code", "markdown"}
    for cell in cells_of(notebook, "code"):
        ast.parse(source(cell))
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_saved_outputs_of_a_notebook_are_those_of_a_run(path):
    """There are pictures, and no errors, no paths of one machine, and no tiny runs."""
    code = cells_of(read(path), "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(tmp|work|root|home)\b", text)
    assert "Traceback" not in text
    assert "\r" not in text
    assert "-tiny" not in text
