"""A study: which runs it starts, what it makes of them, and how it reports errors."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import rows

from alignjax import claims, study
from alignjax import config as configs
from alignjax.config import UserError
from alignjax.data import sources, toy
from alignjax.reports import study_picture, study_results, study_runs
from alignjax.runs import records
from alignjax.runs.record_checks import EXAMPLE_OF_SUMMARY

DOCS = Path(__file__).resolve().parent.parent / "docs"
TINY = """
from alignjax.claims import Study, mean

study = Study(
    title="A rate",
    claim="What a rate does.",
    arms={"whole": {}, "twice": {"optimiser.learning_rate": 2e-3}, "none": {"steps": 1}},
    figures={"loss": "heldout_loss", "first loss": mean("loss", 0, 2)},
    curves=("loss",),
    config="lm.py:tiny",
    found="Little.",
)
"""
ARMS = {"whole": {}, "twice": {"optimiser.learning_rate": "2e-3"}, "none": {"steps": "1"}}


@pytest.fixture
def tiny_study(tmp_path):
    """Return the command line of a study of three arms of the tiny language model."""
    path = tmp_path / "rate.py"
    path.write_text(TINY)
    return [str(path), "--workdir", str(tmp_path / "runs"), "--out", str(tmp_path / "docs")]


def make_up_run(trial):
    """Write a run without training: its loss is given by its seed, and lower in arm "twice"."""
    config = configs.load("lm.py:tiny", {"seed": str(trial.seed)} | ARMS[trial.arm])
    loss = trial.seed + 4
    if trial.arm == "twice":
        loss -= 1 + trial.seed / 10
    trial.workdir.mkdir(parents=True)
    (trial.workdir / "config.json").write_text(configs.to_json(config))
    steps = [json.dumps({"step": step, "loss": loss - step / 4}) for step in range(trial.steps)]
    (trial.workdir / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    summary = {"heldout_loss": loss, "training_seconds": 1800}
    (trial.workdir / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def launched(monkeypatch):
    """Make up runs in place of processes; return the list of the trials that are launched."""
    trials = []

    def launch(trial, cores, processes):
        trials.append(trial)
        make_up_run(trial)

    monkeypatch.setattr(study_runs, "launch", launch)
    return trials


def test_a_study_runs_what_is_missing_and_writes_its_results(
    tiny_study, launched, tmp_path, capsys
):
    assert study.main([*tiny_study, "--seeds", "3", "--jobs", "2"]) == 0
    names = ("lm-tiny", "lm-tiny,optimiser.learning_rate=0.002", "lm-tiny,steps=1")
    expected = [(seed, name) for seed in range(3) for name in names]
    assert sorted((trial.seed, trial.workdir.name) for trial in launched) == expected
    printed = capsys.readouterr().out
    assert "5 ± 2.5 " in printed and "3.9 ± 2.2 ↓" in printed  # of 4, 5, 6 and 3, 3.9, 4.8
    record = json.loads((tmp_path / "docs/study/rate.json").read_text())
    assert record["arms"]["twice"]["figures"] == {
        "loss": [3, 3.9, 4.8],
        "first loss": [2.875, 3.775, 4.675],
    }
    page = (tmp_path / "docs/study.md").read_text()
    table = "|  | loss | first loss |\n|---|---|---|\n| whole | 5 ± 2.5 | 4.88 ± 2.5 |"
    assert f"## A rate\n\nWhat a rate does.\n\n{table}" in page
    assert "Little." in page
    assert "seeds 0 to 2, 4.5 hours" in page
    assert (tmp_path / "docs/study/rate.png").stat().st_size > 9000
    command = (
        "python -m alignjax.train --config lm.py:tiny --config.seed=0 "
        "--config.optimiser.learning_rate=0.002 "
        f"--workdir {tmp_path}/runs/0/lm-tiny,optimiser.learning_rate=0.002"
    )
    assert f"{command}  # twice" in page

    launched.clear()
    shutil.rmtree(tmp_path / "runs/1/lm-tiny")
    assert study.main([*tiny_study, "--seeds", "4"]) == 0
    again = [(trial.seed, trial.arm) for trial in launched]
    assert again == [(1, "whole"), (3, "whole"), (3, "twice"), (3, "none")]


def test_a_run_is_a_process_that_trains_and_its_errors_are_reported(
    tiny_study, chain, tmp_path, capsys
):
    twice = "lm-tiny,optimiser.learning_rate=0.002"
    for name in ("lm-tiny", twice):
        shutil.copytree(chain.runs / "lm-tiny", tmp_path / "runs/0" / name)
    stored = tmp_path / "runs/0" / twice / "config.json"
    assert study.main([*tiny_study, "--seeds", "1"]) == 2
    assert capsys.readouterr().err.endswith(
        f"{twice} holds a run of another config (optimiser.learning_rate: 0.003 -> 0.002); "
        "name another --workdir\n"
    )
    old_rate = '"optimiser.learning_rate": 0.003'
    new_rate = '"optimiser.learning_rate": 0.002'
    stored.write_text(stored.read_text().replace(old_rate, new_rate))
    assert study.main([*tiny_study, "--seeds", "1"]) == 0
    run = tmp_path / "runs/0/lm-tiny,steps=1"
    assert len(rows(run / "metrics.jsonl")) == 1
    assert not list(run.parent.glob("*.log"))
    assert "nan" in capsys.readouterr().out  # one seed has no interval

    shutil.rmtree(run)
    run.mkdir()
    (run / "lock").write_bytes(b"")
    (run / "checkpoints").write_bytes(b"")
    assert study.main([*tiny_study, "--seeds", "1"]) == 2
    assert "is not empty and has no config.json" in capsys.readouterr().err


def test_an_arm_without_training_answers_by_the_parents_of_an_earlier_arm(tmp_path):
    """It has no metrics, and a figure that its summary lacks is a dash."""
    path = tmp_path / "methods.py"
    text = TINY.replace("lm.py:tiny", "ppo.py:tiny").replace("import Study", "import BestOf, Study")
    path.write_text(text.replace('{"steps": 1}', "BestOf(n=2)"))
    loaded = study.load(str(path))
    *_, trial = study_runs.plan_trials(loaded, 1, tmp_path / "runs")
    runs = tmp_path / "runs/0"
    assert trial.workdir == runs / "best-of-2,of=ppo-tiny"
    assert trial.command_line == (
        f"python -m alignjax.evals.best_answers --policy {runs}/sft-tiny --reward {runs}/rm-tiny "
        "--prompts toy/prompts --n 2 --examples 64 --temperature 1.0 --top_p 0.9 "
        f"--max_tokens 14 --out {trial.workdir}"
    )
    trial.workdir.mkdir(parents=True)
    summary = EXAMPLE_OF_SUMMARY | {"kl/after": 0.2}
    (trial.workdir / "summary.json").write_text(json.dumps(summary))
    run = records.read_result(trial.workdir)
    assert run.metrics == [] and study_results.figure_value("kl/after", run, True) == 0.2
    assert study_results.figure_value("heldout_loss", run, may_lack=True) is None
    with pytest.raises(UserError, match="summary.json: there is no figure heldout_loss"):
        study_results.figure_value("heldout_loss", run)
    assert study_results.figure_cell([None], [1.0]) == "-"
    path.write_text(text.replace('"whole": {}', '"whole": BestOf()'))
    with pytest.raises(UserError, match=r"arms\['whole'\] must be \{dotted field: value\}"):
        study.load(str(path))


def test_a_failed_run_is_reported_with_its_last_line(tmp_path):
    trial = study_runs.Trial(
        arm="an arm",
        seed=3,
        workdir=tmp_path / "run",
        command=("python", "-c", "raise SystemExit('alignjax: no')"),
        steps=1,
    )
    message = r"an arm, seed 3: the run ended with code 1: alignjax: no \(all in .*run.log\)"
    with pytest.raises(UserError, match=message):
        study_runs.launch(trial, [], set())


def test_a_failed_run_is_what_is_reported_if_further_seeds_wait(tiny_study, monkeypatch, capsys):
    def fail(trial, cores, processes):
        raise UserError(f"{trial.label}: no")

    monkeypatch.setattr(study_runs, "launch", fail)
    assert study.main([*tiny_study, "--seeds", "4", "--jobs", "2"]) == 2
    assert re.search(r"seed [01]: no\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    "words, message",
    [
        (["warm"], "study warm: no file .*warm.py; did you mean 'warmup'"),
        (["no.py"], "study no.py: no file no.py"),
        (["warmup", "--seeds", "0"], "--seeds=0 must be at least 1"),
    ],
)
def test_a_user_error_is_reported_in_one_line(words, message, capsys):
    assert study.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_file_without_a_study_and_an_arm_with_an_unknown_field_are_reported(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("study = 3")
    with pytest.raises(UserError, match="a.py has no `study`"):
        study.load(str(path))
    path.write_text(TINY.replace('"steps"', '"stepz"'))
    with pytest.raises(UserError, match="stepz: there is no such field; did you mean 'steps'"):
        study.load(str(path))


@pytest.mark.parametrize("name", study.known())
def test_every_study_of_the_repository_is_sound(name):
    loaded = study.load(name)
    trials = study_runs.plan_trials(loaded, 2, Path("runs/none"))
    assert len({trial.workdir for trial in trials}) == len(trials) == 2 * len(loaded.arms)
    commands = {("python", "-m", f"alignjax.{name}") for name in ("train", "evals.best_answers")}
    assert {trial.command[:3] for trial in trials} <= commands
    assert len(loaded.arms) <= len(study_picture.COLOURS)
    assert loaded.claim.strip()
    arms = [fields for fields in loaded.arms.values() if not isinstance(fields, claims.BestOf)]
    for fields in arms:
        for name in ("data.train", "data.heldout"):
            for source in sources.parse(fields.get(name, "")):
                toy.parse_spec(source.name.removeprefix("toy/"))
    assert all(callable(figure) or isinstance(figure, str) for figure in loaded.figures.values())


def test_an_interval_is_students():
    expected = pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    assert study_results.interval([1.0, 2.0, 3.0]) == expected
    assert study_results.interval([2.0, 2.0]) == (2.0, 0.0)
    assert np.isnan(study_results.interval([1.0])[1])


def test_the_page_of_studies_follows_from_the_records_and_the_files():
    """docs/study.md is made of docs/study/*.json, whose claims and outcomes are the files'."""
    assert (DOCS / "study.md").read_text() == study_results.document(DOCS) + "\n"
    paths = list((DOCS / "study").glob("*.json"))
    assert {path.stem for path in paths} == set(study.known())
    for path in paths:
        loaded = study.load(path.stem)
        record = json.loads(path.read_text())
        arms = {arm: claims.fields_of(fields) for arm, fields in loaded.arms.items()}
        assert {arm: kept["fields"] for arm, kept in record["arms"].items()} == arms
        texts = (record["title"], record["claim"], record["found"])
        assert texts == (loaded.title, loaded.claim, loaded.found)
        assert loaded.found


def test_each_run_is_read_once(tiny_study, launched, monkeypatch):
    """A curve of the picture does not read the runs again."""
    read = []
    read_run = records.read
    monkeypatch.setattr(records, "read", lambda path: (read.append(path), read_run(path))[1])
    assert study.main([*tiny_study, "--seeds", "2"]) == 0
    assert len(read) == len(set(read)) == len(launched)
