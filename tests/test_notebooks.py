"""The notebooks: their code runs from the first cell to the last, and what is kept of their outputs is that of a real run."""

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


def cells(path: Path, kind: str) -> list[str]:
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == kind
    ]


@pytest.mark.parametrize(
    "name, there, left",
    [
        ("quickstart", ("sft-tiny", "rm-tiny", "ppo-tiny"), "ppo-tiny/report.html"),
        ("your_own_reward", ("sft-tiny",), "modest/summary.json"),
    ],
)
def test_a_notebook_runs(chain, tmp_path, name, there, left):
    """In one process, its code cells one after the other, the tiny way; one finds all runs there, the other trains."""
    for run in there:
        shutil.copytree(chain[0] / run, tmp_path / "runs" / run)
    code = "\n".join(cells(ROOT / "notebooks" / f"{name}.ipynb", "code"))
    assert code.count('\nVARIANT = ""') == 1
    (tmp_path / "notebook.py").write_text(code.replace('\nVARIANT = ""', '\nVARIANT = ":tiny"'))
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / left).stat().st_size


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_whole_and_its_outputs_are_those_of_a_run(path):
    """What nbformat 4.5 asks for; no magics, no outputs of this machine; pictures, and no errors."""
    book = json.loads(path.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and book["metadata"]["kernelspec"][
        "name"
    ] == "python3"
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids)
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert {cell["cell_type"] for cell in book["cells"]} == {"code", "markdown"}
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        ast.parse("".join(cell["source"]))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert (
        not re.search(r"/(tmp|work|root|home)\b", text)
        and "Traceback" not in text
        and "\r" not in text
    )
    assert "-tiny" not in text and path.stat().st_size < 300_000
