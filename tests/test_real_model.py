"""The runs of docs/real_model.md: their problems, their reward, and how they are measured."""

import importlib
import re

import pytest
from runs import ROOT, rows

from alignjax import train
from alignjax.data import problems
from configs.smollm2 import arithmetic


def numbers_of(row: dict) -> frozenset[int]:
    """Return the numbers that a problem's prompt has."""
    return frozenset(map(int, re.findall(r"\d+", row["prompt"])))


def words_of(row: dict) -> list[str]:
    """Return the words of the list in a problem's prompt."""
    return re.search(r"list: (.*)\?", row["prompt"])[1].split(", ")


def test_held_out_problems_do_not_occur_in_training_in_any_order():
    made = problems.make(seed=0, train=120, heldout=40)
    for task in ("one_digit", "two_digits"):
        trained = {numbers_of(row) for row in made.train if row["task"] == task}
        held_out = {numbers_of(row) for row in made.heldout if row["task"] == task}
        assert len(held_out) > 20
        assert not trained & held_out
    lists = [
        {word for row in side if row["task"] == "last_word" for word in words_of(row)}
        for side in (made.train, made.heldout)
    ]
    assert not lists[0] & lists[1]


def test_the_answers_of_problems_are_right():
    made = problems.make(seed=1, train=50, heldout=20)
    assert made == problems.make(seed=1, train=50, heldout=20)
    assert made != problems.make(seed=2, train=50, heldout=20)
    prompts = [row["prompt"] for row in made.train + made.heldout]
    assert len(set(prompts)) == len(prompts) == 210
    assert [row["task"] for row in made.heldout[:3]] == list(problems.TASKS)
    for row in made.train + made.heldout:
        if row["task"] == "last_word":
            assert row["answer"] == words_of(row)[-1]
        else:
            first, second = map(int, re.findall(r"\d+", row["prompt"]))
            assert row["answer"] == str(first + second)


def test_the_command_writes_problems_to_train_on_and_to_hold_out(tmp_path, capsys):
    out = tmp_path / "problems"
    command = ["--out", str(out), "--train", "5", "--heldout", "2"]
    assert problems.main(command) == 0
    assert len(rows(out / "train.jsonl")) == 15
    assert {row["task"] for row in rows(out / "heldout.jsonl")} == set(problems.TASKS)
    assert problems.main(command) == 0  # its own files
    capsys.readouterr()
    for wrong, message in (
        (["--out", str(out), "--train", "0"], "--train=0 must be at least 1"),
        (["--out", str(tmp_path)], "holds files that the command has not written"),
    ):
        assert problems.main(wrong) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "response, answer, right",
    [
        ("7 + 7 = 14.", "14", True),
        ("14 is 7 + 7", "14", False),
        ("140", "14", False),
        ('The last word is "River."', "river", True),
        ("river, of course", "river", False),
        ("", "river", False),
        ("no idea", "14", False),
        ("0", "0", True),
    ],
)
def test_the_last_number_or_word_is_the_answer(response, answer, right):
    scores = arithmetic.reward([], [response], answer=[answer], task=["any"])
    assert scores == [float(right)]


MARKERS = """# A page
<!-- written by benchmarks/real_model.py arithmetic -->
<!-- end of arithmetic -->
between
<!-- written by benchmarks/real_model.py preferences -->
old
<!-- end of preferences -->
after
"""


@pytest.fixture
def real_model(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("real_model")


@pytest.fixture
def page(tmp_path):
    """A page with the places of both commands."""
    path = tmp_path / "page.md"
    path.write_text(MARKERS)
    return path


def test_ppo_on_problems_is_measured_before_and_after(chain, tmp_path, real_model, page, capsys):
    data = tmp_path / "problems"
    problems.main(["--out", str(data), "--train", "8", "--heldout", "2"])
    run = tmp_path / "arithmetic"
    policy = chain.runs / "sft-tiny"
    changes = {
        "data.train": data / "train.jsonl",
        "data.heldout": data / "heldout.jsonl",
        "data.max_length": 96,
        "model.max_length": 128,
        "parents.policy": policy,
        "parents.reference": policy,
        "parents.value": policy,
    }
    words = [f"--config.{name}={value}" for name, value in changes.items()]
    command = ["--config", "smollm2/arithmetic.py:tiny", "--workdir", str(run), *words]
    assert train.main(command) == 0
    capsys.readouterr()
    real_model.main(["arithmetic", "--run", str(run), "--page", str(page)])
    text = page.read_text()
    for part in ("2 of one digit", "6 of all", "KL to the reference", "4 steps", "between"):
        assert part in text
    assert text.index("6 of all") < text.index("between")
    assert (tmp_path / "real_model_arithmetic.png").stat().st_size > 1000


def test_a_reward_model_and_its_ppo_are_measured(chain, tmp_path, real_model, page):
    run = str(chain.runs / "ppo-tiny")
    runs = ["--rm", str(chain.runs / "rm-tiny"), "--run", run, "--run", run]
    real_model.main(["preferences", *runs, "--page", str(page)])
    text = page.read_text()
    for part in (
        "the reward model",
        "response, as in training",
        "chance",
        "entropy",
        "different responses",
        "4 steps",
    ):
        assert part in text
    assert text.count("after, `ppo.kl_coef=0.04` | after, `ppo.kl_coef=0.04` |") == 2
    assert "old" not in text
    assert text.endswith("after\n")
    assert (tmp_path / "real_model_preferences.png").stat().st_size > 1000


def test_a_run_that_is_not_complete_is_not_measured(chain, tmp_path, real_model, page):
    run = tmp_path / "ppo"
    run.mkdir()
    (run / "config.json").write_bytes((chain.runs / "ppo-tiny" / "config.json").read_bytes())
    with pytest.raises(SystemExit, match="not complete"):
        real_model.main(["arithmetic", "--run", str(run), "--page", str(page)])
    assert page.read_text() == MARKERS
