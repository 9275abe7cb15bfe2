"""`model.remat="auto"` is the least recomputation that fits, found once and then kept."""

import json

import jax
import pytest
from runs import command, cut, fails, rows

from alignjax import config as configs
from alignjax import train
from alignjax.machine import sharding
from alignjax.planning import plans, remat
from alignjax.planning.printing import format_plan

CHANGES = {"model.remat": "auto", "mesh.fsdp": "1", "mesh.tensor": "8"}
NEEDS = {"nothing": 81.25, "dots": 61.0}


@pytest.mark.parametrize("share, level", [(1.01, "nothing"), (0.99, "dots")])
def test_the_first_level_that_fits_the_compiled_programs_is_chosen(share, level, monkeypatch):
    """The programs of a tiny model, compiled; dots saves a fortieth of its memory."""
    config = configs.load("lm.py:tiny", CHANGES)
    mesh = sharding.make_mesh(config.mesh)
    monkeypatch.setattr(remat, "LEVELS", ("nothing", "dots"))
    with jax.set_mesh(mesh):
        work = remat.work_of(remat.with_level(config, "nothing"), mesh)
        need = remat.peak_of(work.programs[0], work)
        choice = remat.choose_remat(config, mesh, share * need / remat.SHARE)
    assert choice.level == level
    assert choice.needs["nothing"] == pytest.approx(need)
    assert choice.needs[level] <= need


def test_what_does_not_fit_at_all_takes_the_last_level(monkeypatch):
    config = configs.load("lm.py:tiny", CHANGES)
    mesh = sharding.make_mesh(config.mesh)
    needs = iter([81.25, 61.0, 60.0])
    monkeypatch.setattr(remat, "peak_of", lambda program, work: next(needs))
    with jax.set_mesh(mesh):
        choice = remat.choose_remat(config, mesh, 59.0)
    assert str(choice) == (
        "remat: everything, 60.0 of 59.0 GiB; nothing would need 81.2; dots would need 61.0"
    )


def test_a_plan_has_the_level_that_fits(monkeypatch):
    choice = remat.RematChoice(level="dots", needs=NEEDS, memory=79.1)
    monkeypatch.setattr(remat, "choose_remat", lambda config, mesh, memory: choice)
    plan = plans.make_plan(configs.load("lm.py:tiny", CHANGES), "")
    assert plan.remat == "dots"
    assert "remat: dots, 61.0 of 79.1 GiB; nothing would need 81.2" in format_plan(plan)


def test_a_run_says_its_level_and_a_resume_keeps_it(tmp_path, monkeypatch, capsys):
    choice = remat.RematChoice(level="dots", needs=NEEDS, memory=79.1)
    monkeypatch.setattr(remat, "choose_here", lambda config, mesh: choice)
    arguments = [f"--config.{name}={value}" for name, value in CHANGES.items()]
    assert train.main(command("lm-tiny", tmp_path / "runs", *arguments)) == 0
    run = tmp_path / "runs" / "lm-tiny"
    line = "lm-tiny: remat: dots, 61.0 of 79.1 GiB; nothing would need 81.2"
    assert line in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["model.remat"] == "dots"
    resumed = tmp_path / "resumed" / "lm-tiny"
    resumed.parent.mkdir()
    cut(run, resumed)
    monkeypatch.setattr(remat, "choose_here", None)  # it is not asked again
    assert train.main(command("lm-tiny", tmp_path / "resumed", *arguments)) == 0
    assert "remat: dots, as when the run began" in capsys.readouterr().out
    assert rows(resumed / "metrics.jsonl") == rows(run / "metrics.jsonl")
    other = [argument.replace("auto", "everything") for argument in arguments]
    assert "model.remat" in fails(capsys, *command("lm-tiny", tmp_path / "resumed", *other))


def test_on_a_cpu_nothing_is_recomputed():
    config = configs.load("lm.py:tiny", CHANGES)
    choice = remat.choose_here(config, sharding.make_mesh(config.mesh))
    assert choice.level == "nothing" and "no memory of its own" in str(choice)
