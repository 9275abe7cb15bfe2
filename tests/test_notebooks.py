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

from alignjax import convert

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FULL_SIZE = '\nVARIANT = ""'
TINY = '\nVARIANT = ":tiny"'
HUB_CELL = "HUB_MODEL = "  # how the cell begins that loads a model of the hub
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


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
    cache_model(chain, tmp_path / "hub")
    run_program(program.replace(FULL_SIZE, TINY), tmp_path)
    assert (tmp_path / "runs" / result).stat().st_size
    assert (tmp_path / "runs" / "hub-sft" / "summary.json").exists() == (HUB_CELL in program)


def test_without_the_hub_the_notebook_says_so_and_goes_on(tmp_path):
    notebook = read(ROOT / "notebooks" / "quickstart.ipynb")
    [cell] = [one for one in cells_of(notebook, "code") if source(one).startswith(HUB_CELL)]
    program = "from alignjax import config, inference, train\nprompts = []\n" + source(cell)
    output = run_program(program, tmp_path)
    assert output.startswith("No model of the hub here, so nothing is tuned.\n")
    assert f"hf://{HUB_NAME}: not in the hub's cache" in output
    assert not (tmp_path / "runs").exists()


def cache_model(chain, cache: Path) -> None:
    """Put a tiny model into a hub's cache, in the place of the one that a notebook names."""
    directory = cache / f"models--{HUB_NAME.replace('/', '--')}"
    (directory / "refs").mkdir(parents=True)
    (directory / "refs" / "main").write_text("revision")
    (directory / "snapshots").mkdir()
    convert.export(chain.runs / "sft-tiny", directory / "snapshots" / "revision", None, "float32")


def run_program(program: str, directory: Path) -> str:
    """Run a program in a directory, with its subdirectory hub as the hub's cache and no network."""
    (directory / "notebook.py").write_text(program)
    settings = {
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(directory / "hub"),
    }
    process = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=directory,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


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
