"""A study: what is run and what is not, what is made of it, and what is said where a run or a file is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import rows

from alignjax import claims, study

TINY = """
from alignjax.claims import Study, mean
study = Study("A rate", "What a rate does.", {"whole": {}, "twice": {"optimiser.learning_rate": 2e-3}, "none": {"steps": 1}},
              {"loss": "heldout_loss", "first loss": mean("loss", 0, 2)}, ("loss",), "lm.py:tiny", "Little.")
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "rate.py").write_text(TINY)
    return (
        str(tmp_path / "rate.py"),
        "--workdir",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "docs"),
    )


def pretend(trial, cores, children):
    """A run that is made up: its loss is its seed and a step's share of it, less where the rate is twice as high."""
    config = study.configs.load(
        "lm.py:tiny",
        {"seed": str(trial.seed)}
        | (
            {"optimiser.learning_rate": "2e-3"}
            if trial.arm == "twice"
            else {"steps": "1"}
            if trial.arm == "none"
            else {}
        ),
    )
    loss = trial.seed + 4 - (trial.arm == "twice") * (1 + trial.seed / 10)
    trial.workdir.mkdir(parents=True)
    (trial.workdir / "config.json").write_text(study.configs.to_json(config))
    steps = [json.dumps({"step": i, "loss": loss - i / 4}) for i in range(trial.steps)]
    (trial.workdir / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    (trial.workdir / "summary.json").write_text(
        json.dumps({"heldout_loss": loss, "training_seconds": 1800})
    )


def test_a_study_runs_what_is_not_there_and_writes_what_came_of_it(
    tiny, tmp_path, monkeypatch, capsys
):
    launched = []
    monkeypatch.setattr(
        study, "launch", lambda trial, *more: (launched.append(trial), pretend(trial, *more))
    )
    assert study.main([*tiny, "--seeds", "3", "--jobs", "2"]) == 0
    assert sorted((t.seed, t.workdir.name) for t in launched) == [
        (seed, name)
        for seed in range(3)
        for name in ("lm-tiny", "lm-tiny,optimiser.learning_rate=0.002", "lm-tiny,steps=1")
    ]
    said = capsys.readouterr().out
    assert "5 ± 2.5 " in said and "3.9 ± 2.2 ↓" in said  # 4, 5, 6; 3, 3.9, 4.8
    found = json.loads((tmp_path / "docs/study/rate.json").read_text())
    assert found["arms"]["twice"]["figures"] == {
        "loss": [3, 3.9, 4.8],
        "first loss": [2.875, 3.775, 4.675],
    }
    page = (tmp_path / "docs/study.md").read_text()
    assert (
        "## A rate\n\nWhat a rate does.\n\n|  | loss | first loss |\n|---|---|---|\n| whole | 5 ± 2.5 | 4.88 ± 2.5 |"
        in page
    )
    assert (
        "Little." in page
        and "seeds 0 to 2, 4.5 hours" in page
        and (tmp_path / "docs/study/rate.png").stat().st_size > 9000
    )
    command = (
        "python -m alignjax.train --config lm.py:tiny --config.seed=0 --config.optimiser.learning_rate=0.002 "
        f"--workdir {tmp_path}/runs/0/lm-tiny,optimiser.learning_rate=0.002"
    )
    assert f"{command}  # twice" in page

    launched.clear()
    shutil.rmtree(tmp_path / "runs/1/lm-tiny")
    assert study.main([*tiny, "--seeds", "4"]) == 0
    assert [(t.seed, t.arm) for t in launched] == [
        (1, "whole"),
        (3, "whole"),
        (3, "twice"),
        (3, "none"),
    ]


def test_a_run_is_a_process_that_trains_and_whose_last_words_are_told(
    tiny, chain, tmp_path, capsys
):
    for name in ("lm-tiny", "lm-tiny,optimiser.learning_rate=0.002"):
        shutil.copytree(chain[0] / "lm-tiny", tmp_path / "runs/0" / name)
    stored = tmp_path / "runs/0" / name / "config.json"
    assert study.main([*tiny, "--seeds", "1"]) == 2
    assert capsys.readouterr().err.endswith(
        f"{name} holds a run of another config (optimiser.learning_rate: 0.003 -> 0.002); "
        "name another --workdir\n"
    )
    stored.write_text(
        stored.read_text().replace(
            '"optimiser.learning_rate": 0.003', '"optimiser.learning_rate": 0.002'
        )
    )
    assert study.main([*tiny, "--seeds", "1"]) == 0
    run = tmp_path / "runs/0/lm-tiny,steps=1"
    assert len(rows(run / "metrics.jsonl")) == 1 and not list(run.parent.glob("*.log"))
    assert "nan" in capsys.readouterr().out  # there is no interval of one seed

    shutil.rmtree(run)
    run.mkdir()
    (run / "lock").write_bytes(b"")
    (run / "checkpoints").write_bytes(b"")
    assert study.main([*tiny, "--seeds", "1"]) == 2
    assert "is not empty and has no config.json" in capsys.readouterr().err


def test_a_run_that_fails_is_told_with_its_last_line(tmp_path):
    trial = claims.Trial(
        "an arm", 3, tmp_path / "run", ("python", "-c", "raise SystemExit('alignjax: no')"), 1
    )
    with pytest.raises(
        study.UserError,
        match=r"an arm, seed 3: the run ended with code 1: alignjax: no \(all in .*run.log\)",
    ):
        study.launch(trial, [], set())


@pytest.mark.parametrize(
    "given, said",
    [
        (["warm"], "study warm: no file .*warm.py; did you mean 'warmup'"),
        (["no.py"], "study no.py: no file no.py"),
        (["warmup", "--seeds", "0"], "--seeds=0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(given, said, capsys):
    assert study.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert study.re.search(said, line)


def test_a_file_without_a_study_and_an_arm_without_a_field_are_told(tmp_path):
    (tmp_path / "a.py").write_text("study = 3")
    with pytest.raises(study.UserError, match="a.py has no `study`"):
        study.load(str(tmp_path / "a.py"))
    (tmp_path / "a.py").write_text(TINY.replace('"steps"', '"stepz"'))
    with pytest.raises(
        study.UserError, match="stepz: there is no such field; did you mean 'steps'"
    ):
        study.load(str(tmp_path / "a.py"))


@pytest.mark.parametrize("name", study.known())
def test_every_study_of_the_house_is_sound(name):
    found = study.load(name)
    planned = study.trials(found, 2, Path("runs/none"))
    assert len({trial.workdir for trial in planned}) == len(planned) == 2 * len(found.arms)
    assert all(trial.command[:3] == ("python", "-m", "alignjax.train") for trial in planned)
    assert (
        len(found.arms) <= len(claims.COLOURS)
        and found.claim.strip()
        and all(map(callable_or_name, found.figures.values()))
    )


def callable_or_name(what) -> bool:
    return callable(what) or isinstance(what, str)


def test_an_interval_is_students():
    assert claims.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    assert claims.interval([2.0, 2.0]) == (2.0, 0.0) and np.isnan(claims.interval([1.0])[1])


def test_the_page_is_what_its_figures_and_files_say():
    """docs/study.md is made of docs/study/*.json, whose claims and findings are the files'."""
    docs = Path(__file__).resolve().parent.parent / "docs"
    assert (docs / "study.md").read_text() == claims.document(docs) + "\n"
    for path in (docs / "study").glob("*.json"):
        found, kept = study.load(path.stem), json.loads(path.read_text())
        assert {arm: had["fields"] for arm, had in kept["arms"].items()} == found.arms
        assert (kept["title"], kept["claim"], kept["found"]) == (
            found.title,
            found.claim,
            found.found,
        ) and found.found
    assert {path.stem for path in (docs / "study").glob("*.json")} == set(study.known())
