"""The code of docs/extending.md works from outside the package, and does what the page says."""

import importlib
import json
import shutil
import sys

import pytest
from pages import ROOT, shown_files
from runs import command, rows

from alignjax import train

FILES = shown_files(ROOT / "docs" / "extending.md")
WORDS = "cat box sun hat cup dog key map pen bus egg fan".split()
# The tasks ask for the last of two words.
TASKS = [
    {"prompt": f"last : {first} {last}", "answer": last}
    for first, last in zip(WORDS, reversed(WORDS), strict=True)
]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A working directory with the page's files, whose modules can be imported."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def imported(name: str, directory):
    """Import a module of the page, and check that it is the page's."""
    module = importlib.import_module(name)
    assert module.__file__ == str(directory / f"{name}.py")
    return module


def test_a_reward_scores_texts(directory):
    reward = imported("concise", directory).reward
    responses = ["it is Three .", "four"]
    scores = reward([None, None], responses, answer=["three", "three"], source=["a", "b"])
    assert scores == pytest.approx([0.96, -0.01])


def test_ppo_learns_from_a_reward_of_the_page(directory, chain):
    for parent in ("sft-tiny", "rm-tiny"):
        shutil.copytree(chain.runs / parent, directory / "runs" / parent)
    tasks = directory / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    overrides = {
        "ppo.reward_fn": "concise:reward",
        "data.train": tasks,
        "data.heldout": tasks,
        "data.heldout_share": 0.4,
        "steps": 1,
    }
    words = [f"--config.{field}={value}" for field, value in overrides.items()]
    assert train.main(command("ppo-tiny", directory / "runs", *words)) == 0
    run = directory / "runs" / "ppo-tiny"
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    assert rows(run / "samples.jsonl")
