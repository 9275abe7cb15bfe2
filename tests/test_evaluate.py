"""Table 4: statistics against hand-worked numbers, scores against each response alone, and the command's answers."""

import functools
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from matplotlib.collections import PathCollection
from PIL import Image

from alignjax import evaluate, train
from alignjax.algorithms import ranking
from alignjax.config import Mesh
from alignjax.data import chat, encoding, sources
from alignjax.evals import calibration
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.weights import locations, roles
from alignjax.weights.checkpoint import restore_role

CLEAN = "toy/comparisons-clean"
LENGTH = 30
ONE = jax.make_mesh(
    (1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
)
MESHES = {
    "1 device": ONE,
    "8 devices": sharding.make_mesh(Mesh()),
    "2 x 2 x 2": sharding.make_mesh(Mesh(2, 2, 2)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The tiny language model, PMP and RM, trained by one command."""
    directory = tmp_path_factory.mktemp("runs")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    assert train.main(["--config", "rm.py:tiny", "--workdir", str(directory / "rm-tiny")]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return directory


@pytest.fixture(scope="module")
def rm(runs):
    """The reward model's architecture, tokenizer and compiled scores."""
    model = locations.architecture(runs / "rm-tiny")
    tokenizer = chat.load_tokenizer(runs / "rm-tiny" / "tokenizer")
    return model, tokenizer, jax.jit(functools.partial(ranking.score_pairs, model))


class Bar:
    def __init__(self):
        self.total = 0

    def update(self, n):
        self.total += n


def mixed() -> list[dict]:
    """42 pairs of the world, but that the 11th row's responses are equal and those of the 6th and all from 36th on too long."""
    rows = sources.load(CLEAN, "comparisons", "heldout", sources.ReadOptions(limit=42))
    rows[10] = {**rows[10], "rejected": rows[10]["chosen"]}
    for i in (5, *range(35, 42)):
        rows[i] = {**rows[i], "rejected": "dog " * LENGTH}
    return rows


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0, 0.2775328),
        (10, 10, 0.7224672, 1),
        (1, 2, 0.0945312, 0.9054688),
    ],
)
def test_the_interval_is_wilsons(right, n, low, high):
    """Its ends p are where (right / n - p)^2 = z^2 p (1 - p) / n."""
    found = calibration.interval(right, n)
    assert found == pytest.approx((low, high), abs=1e-7)
    for p in found:
        assert (right / n - p) ** 2 == pytest.approx(
            1.959963984540054**2 * p * (1 - p) / n, abs=1e-12
        )


def apart(*probabilities) -> np.ndarray:
    """Differences of scores that give these probabilities; negative where the rejected one is preferred."""
    p = np.abs(probabilities)
    return np.log(p / (1 - p)) * np.sign(probabilities)


def test_the_curve_is_that_of_pairs_worked_out_by_hand():
    """3 of 4 right at 0.77, 1 of 2 at 0.88, 1 of 1 at 1 - e^-800, which is 1, and two ties, left out."""
    difference = np.concatenate([apart(0.77, -0.77, 0.77, 0.77, 0.88, -0.88), [0, 800, 0]])
    found = calibration.curve(difference)
    filled = [(b["from"], b["to"], b["pairs"], b["accuracy"]) for b in found["bins"] if b["pairs"]]
    assert filled == [(0.75, 0.8, 4, 0.75), (0.85, 0.9, 2, 0.5), (0.95, 1.0, 1, 1.0)]
    assert [b["probability"] for b in found["bins"] if b["pairs"]] == pytest.approx([0.77, 0.88, 1])
    assert found["error"] == pytest.approx((4 * 0.02 + 2 * 0.38) / 7)
    assert [b["from"] for b in found["bins"]] == [
        0.5,
        0.55,
        0.6,
        0.65,
        0.7,
        0.75,
        0.8,
        0.85,
        0.9,
        0.95,
    ]
    empty = found["bins"][0]
    assert (empty["pairs"], empty["accuracy"], empty["interval"], empty["probability"]) == (
        0,
        None,
        None,
        None,
    )


def test_a_curve_of_ties_alone_is_empty():
    found = calibration.curve(np.zeros(3))
    assert found["error"] == 0 and sum(b["pairs"] for b in found["bins"]) == 0


def test_buckets_of_the_ratio_begin_at_their_lower_bound_and_leave_out_what_is_unknown():
    ratio = np.array([1.0, 1.49, 1.5, 2.0, 2.9, 3.0, 4.0, 5.0, 99.0, 0.0])
    difference = np.array([1.0, -1.0, 1.0, 0.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    found = calibration.by_ratio(difference, ratio)
    assert [(b["from"], b["to"], b["pairs"], b["accuracy"]) for b in found] == [
        (1.0, 1.5, 2, 0.5),
        (1.5, 2.0, 1, 1.0),
        (2.0, 3.0, 2, 0.5),
        (3.0, 5.0, 2, 0.0),
        (5.0, None, 2, 1.0),
    ]
    assert found[4]["interval"] == calibration.interval(2, 2)


def test_figures_of_a_set_add_up():
    """Four pairs that fit of six: two right, one tie; the loss is the mean of log(1 + e^-difference)."""
    difference, ratio = (
        np.array([np.log(3), 0.0, -np.log(3), np.log(3)]),
        np.array([2.0, 9.0, 1.0, 9.0, 6.0, 2.0]),
    )
    found = evaluate.figures(difference, np.array([0, 2, 4, 5]), ratio)
    assert (found["accuracy"], found["ties"], found["comparisons"], found["dropped"]) == (
        0.5,
        0.25,
        4,
        2,
    )
    assert found["loss"] == pytest.approx((2 * np.log(4 / 3) + np.log(2) + np.log(4)) / 4)
    assert found["interval"] == calibration.interval(2, 4)
    assert [b["pairs"] for b in found["by_ratio"]] == [1, 0, 2, 0, 1]  # ratios 2, 1, 6, 2
    assert [b["accuracy"] for b in found["by_ratio"]] == [0, None, 1, None, 0]
    assert "by_ratio" not in evaluate.figures(difference, np.arange(4), np.zeros(4))


def test_the_picture_shows_what_the_curves_hold():
    curves = {
        "PMP": calibration.curve(apart(0.77, -0.77, 0.88, 0.88)),
        "RM": calibration.curve(apart(0.52, 0.52)),
    }
    names = ["first", "second", "third", "fourth", "fifth"]
    figure = calibration.picture({name: curves for name in names})
    assert [panel.get_title() for panel in figure.axes] == names
    for panel in figure.axes:
        dots = [x.get_offsets() for x in panel.collections if isinstance(x, PathCollection)]
        assert len(dots) == 2
        np.testing.assert_allclose(dots[0], [[0.77, 0.5], [0.88, 1]])
        np.testing.assert_allclose(dots[1], [[0.52, 1]])
        assert [text.get_text() for text in panel.texts] == [
            "calibration error 19.5 %",
            "calibration error 48.0 %",
        ]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["PMP", "RM"]


@pytest.mark.parametrize(
    "mesh, budget, pairs",
    [
        ("1 device", 30, 256),
        ("1 device", 4096, 256),
        ("1 device", 300, 7),
        ("8 devices", 300, 256),
        ("2 x 2 x 2", 4096, 7),
    ],
)
def test_scores_are_those_of_each_response_alone_whatever_the_batch_and_the_devices(
    mesh, budget, pairs, runs, rm, monkeypatch
):
    model, tokenizer, score_fn = rm
    monkeypatch.setattr(evaluate, "PAIRS", pairs)
    rows, bar, mesh = mixed(), Bar(), MESHES[mesh]
    with jax.set_mesh(mesh):
        params = restore_role(
            runs / "rm-tiny", "model", roles.abstract_params(model, "scalar", mesh)
        )
        found, kept = evaluate.differences(
            score_fn, params, tokenizer, rows, LENGTH, budget, mesh, bar
        )
    assert kept.tolist() == [*range(5), *range(6, 35)] and bar.total == 42
    fit = [chat.encode_comparisons(tokenizer, [rows[i]])[0] for i in kept]
    with jax.set_mesh(ONE):
        params = restore_role(
            runs / "rm-tiny", "model", roles.abstract_params(model, "scalar", ONE)
        )
        alone = jax.jit(functools.partial(scoring.score_alone, model))
        scores = [
            alone(params, encoding.pad(side, LENGTH), encoding.lengths_of(side))
            for side in zip(*fit, strict=True)
        ]
    expected = np.asarray(scores[0], np.float64) - np.asarray(scores[1])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[9] == 0 and (
        np.sort(np.abs(found))[1] > 2e-5
    )  # so that no rounding could change a verdict
    assert ranking.figures_of(found)["accuracy"] == (np.delete(expected, 9) > 0).sum() / 34
    assert ranking.figures_of(found)["ties"] == 1 / 34


def run(*arguments) -> int:
    return evaluate.main([str(x) for x in arguments])


def test_the_command_prints_and_writes_pmp_and_rm(runs, capsys):
    """On the pairs that training itself evaluated, its summary's figures."""
    out = runs / "rm-tiny" / "evaluation.json"
    assert (
        run("--run", runs / "rm-tiny", "--sets", f"{CLEAN},toy/comparisons-noisy", "--examples", 64)
        == 0
    )
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert found["runs"] == {"PMP": str(runs / "pmp-tiny"), "RM": str(runs / "rm-tiny")}
    lines = {line.split("  ")[0]: line for line in printed.splitlines() if line}
    for label, directory in found["runs"].items():
        summary = json.loads((Path(directory) / "summary.json").read_text())
        for name, figures in found["figures"][label].items():
            assert figures["accuracy"] == summary[f"accuracy/{name}"] and figures["ties"] == 0
            assert figures["loss"] == pytest.approx(summary[f"loss/{name}"], abs=1e-6)
            assert (figures["comparisons"], figures["dropped"]) == (64, 0)
            assert sum(b["pairs"] for b in figures["calibration"]["bins"]) == 64
            right = round(64 * figures["accuracy"])
            assert figures["interval"] == pytest.approx(calibration.interval(right, 64))
            assert f"{100 * right / 64:.2f} [{100 * figures['interval'][0]:.1f}, " in lines[label]
    assert [line.split() for line in printed.splitlines() if "report" in line] == [
        ["the", "report's", "PMP", "-", "-"],
        ["the", "report's", "RM", "-", "-"],
    ]
    assert Image.open(runs / "rm-tiny" / "calibration.png").size[0] > 600


def test_public_sets_come_from_tfds_with_the_reports_figures_and_shp_by_ratio(
    runs, tmp_path, capsys, monkeypatch
):
    asked, rows = [], mixed()

    def load(*where):
        asked.append(where)
        source = where[0]
        return [{**row, "ratio": 2.5 * (source == "tfds/shp")} for row in rows]

    monkeypatch.setattr(sources, "load", load)
    out = tmp_path / "table.json"
    more = ("--data_dir", "somewhere", "--split", "train", "--out", out)
    assert (
        run("--run", runs / "pmp-tiny", runs / "rm-tiny", "--sets", "shp,hh_harmless_base", *more)
        == 0
    )
    assert asked == [
        (f"tfds/{name}", "comparisons", "train", sources.ReadOptions(data_dir="somewhere"))
        for name in ("shp", "hh_harmless_base")
    ]
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert (
        found["report"] == {"shp": {"PMP": 60.05, "RM": 60.10}} and out.with_suffix(".png").exists()
    )
    lines = [line.split() for line in printed.splitlines()]
    assert ["the", "report's", "PMP", "60.05", "-"] in lines and [
        "the",
        "report's",
        "RM",
        "60.10",
        "-",
    ] in lines
    for directory in ("pmp-tiny", "rm-tiny"):
        figures = found["figures"][str(runs / directory)]
        assert [b["pairs"] for b in figures["shp"]["by_ratio"]] == [0, 0, 34, 0, 0]
        assert figures["shp"]["by_ratio"][2]["accuracy"] == figures["shp"]["accuracy"]
        assert "by_ratio" not in figures["hh_harmless_base"] and figures["shp"]["dropped"] == 8
        assert f"shp by score ratio, {runs / directory}" in printed
    assert lines.count(["pairs,", "ties,", "too", "long", "34,", "1,", "8", "34,", "1,", "8"]) == 2


def test_a_run_whose_parent_is_gone_is_measured_alone_and_that_is_said(runs, tmp_path, capsys):
    shutil.copytree(runs / "rm-tiny", tmp_path / "rm-tiny")
    losses, label = [], str(tmp_path / "rm-tiny")
    for dtype in ("float32", "bfloat16"):
        assert run("--run", label, "--sets", CLEAN, "--examples", 8, "--dtype", dtype) == 0
        found, printed = (
            json.loads((tmp_path / "rm-tiny" / "evaluation.json").read_text()),
            capsys.readouterr().out,
        )
        assert list(found["figures"]) == [label] and found["dtype"] == dtype
        assert (
            f"alone, for of what it began with: parent {tmp_path / 'pmp-tiny'}: no config.json there"
            in printed
        )
        losses.append(found["figures"][label][CLEAN]["loss"])
    assert 0 < abs(losses[1] - losses[0]) < 0.01  # the type asked for is the one computed in


@pytest.mark.parametrize(
    "directory, arguments, message",
    [
        ("rm-tinny", {}, "no config.json there, so this is not a run"),
        ("lm-tiny", {}, "a run of stage 'ranking' (PMP, RM) wanted, its stage is 'lm'"),
        ("unfinished", {}, "this run is not complete"),
        (
            "rm-tiny",
            {"--sets": "hh_helpful_bas"},
            "--sets hh_helpful_bas: no such set, and no such file; did you mean 'hh_helpful_base'?",
        ),
        (
            "rm-tiny",
            {"--sets": f"{CLEAN},toy/comparisons-claen"},
            "did you mean 'comparisons-clean'?",
        ),
        ("rm-tiny", {"--sets": "toy/text"}, "this stage takes comparisons"),
        (
            "rm-tiny",
            {"--sets": "empty.jsonl"},
            "empty.jsonl: empty, there are no comparisons in it",
        ),
        ("rm-tiny", {"--max_length": 3}, f"--max_length 3: all 8 pairs of {CLEAN} are longer"),
        ("rm-tiny", {"--examples": -1}, "--examples=-1 must be at least 1"),
        ("rm-tiny", {"--out": "table.txt"}, "--out table.txt: the name of a .json file"),
        (
            "rm-tiny",
            {"--out": "nowhere/table.json"},
            "--out nowhere/table.json: the name of a .json file in a directory that exists",
        ),
    ],
)
def test_a_mistake_is_one_line(directory, arguments, message, runs, tmp_path, capsys, monkeypatch):
    for path in runs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    shutil.copytree(runs / "rm-tiny", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "summary.json").unlink()
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    asked = {"--run": directory, "--sets": CLEAN, "--examples": 8} | arguments
    assert run(*(x for pair in asked.items() for x in pair)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("alignjax: ") and printed.err.count("\n") == 1
    assert message in printed.err and "accuracy" not in printed.out


def test_options_of_a_public_set_stay_with_it(runs, tmp_path, monkeypatch):
    asked, rows = [], mixed()
    monkeypatch.setattr(sources, "load", lambda source, *_: asked.append(source) or rows)
    out = tmp_path / "table.json"
    sets = f"shp:min_score_ratio=1,pairs=5,summarize,{CLEAN},prm800k:a=b"
    assert run("--run", runs / "rm-tiny", "--sets", sets, "--out", out) == 0
    assert asked == [
        "tfds/shp:min_score_ratio=1,pairs=5",
        "tfds/summarize",
        CLEAN,
        "tfds/prm800k:a=b",
    ]
    report = json.loads(out.read_text())["report"]
    assert report == {
        "shp:min_score_ratio=1,pairs=5": {"PMP": 60.05, "RM": 60.10},
        "summarize": {"PMP": 69.60, "RM": 69.99},
        "prm800k:a=b": {"PMP": 70.59, "RM": 70.52},
    }


def test_an_empty_split_is_one_line(runs, capsys, monkeypatch):
    monkeypatch.setattr(sources, "load", lambda *_: [])
    assert run("--run", runs / "rm-tiny", "--sets", "shp") == 2
    assert (
        "alignjax: --sets shp: there are no comparisons in its split 'heldout'"
        in capsys.readouterr().err
    )


def test_a_run_that_cannot_be_written_to_is_told_before_anything_is_scored(
    runs, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: path != runs / "rm-tiny")
    assert run("--run", runs / "rm-tiny", "--sets", CLEAN) == 2
    printed = capsys.readouterr()
    assert (
        "evaluation.json: can't be written there; name another place by --out" in printed.err
        and "%|" not in printed.err
    )
