"""Table 4: statistics against figures worked out by hand, scores against each response alone,
and what the command prints, writes and rejects."""

import functools
import json
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from matplotlib.collections import PathCollection
from PIL import Image
from transformers import PreTrainedTokenizerBase

from alignjax import config as configs
from alignjax import evaluate, train
from alignjax.algorithms import intervals, ranking
from alignjax.data import chat, encoding, sources
from alignjax.evals import calibration, table4
from alignjax.machine import outputs, sharding
from alignjax.models import scoring
from alignjax.weights import locations, roles
from alignjax.weights.checkpoint import restore_role

CLEAN = "toy/comparisons-clean"
MAX_LENGTH = 30
ONE_DEVICE = jax.make_mesh(
    (1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
)
MESHES = {
    "1 device": ONE_DEVICE,
    "8 devices": sharding.make_mesh(configs.Mesh()),
    "2 x 2 x 2": sharding.make_mesh(configs.Mesh(2, 2, 2)),
}


class RewardModel(NamedTuple):
    architecture: configs.Model
    tokenizer: PreTrainedTokenizerBase
    score_pairs: object  # compiled


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train the tiny language model, PMP and RM with one command; return their directory."""
    directory = tmp_path_factory.mktemp("runs")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    assert train.main(["--config", "rm.py:tiny", "--workdir", str(directory / "rm-tiny")]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return directory


@pytest.fixture(scope="module")
def reward_model(runs):
    architecture = locations.architecture(runs / "rm-tiny")
    return RewardModel(
        architecture,
        chat.load_tokenizer(runs / "rm-tiny" / "tokenizer"),
        jax.jit(functools.partial(ranking.score_pairs, architecture)),
    )


class Progress:
    """Stands in for a progress bar."""

    def __init__(self):
        self.total = 0

    def update(self, count):
        self.total += count


def mixed_rows() -> list[dict]:
    """Return 42 pairs of the world: row 10 has equal responses; 5 and 35 to 41 are too long."""
    rows = sources.load(CLEAN, "comparisons", "heldout", sources.ReadOptions(limit=42))
    rows[10] = {**rows[10], "rejected": rows[10]["chosen"]}
    for number in (5, *range(35, 42)):
        rows[number] = {**rows[number], "rejected": "dog " * MAX_LENGTH}
    return rows


@pytest.mark.parametrize(
    "right, total, low, high",
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0, 0.2775328),
        (10, 10, 0.7224672, 1),
        (1, 2, 0.0945312, 0.9054688),
    ],
)
def test_the_interval_is_wilsons(right, total, low, high):
    """Its ends p are where (right / n - p)^2 = z^2 p (1 - p) / n."""
    interval = intervals.wilson_interval(right, total)
    assert interval == pytest.approx((low, high), abs=1e-7)
    for end in interval:
        assert (right / total - end) ** 2 == pytest.approx(
            1.959963984540054**2 * end * (1 - end) / total, abs=1e-12
        )


def test_the_interval_of_a_mean_takes_the_responses_to_one_prompt_together():
    prompts = [(1.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.0, 0.0)]
    means = np.array([0.5, 0.5, 1.0, 0.0])
    expected = 1.96 * means.std(ddof=1) / 2
    assert intervals.half_width(prompts) == pytest.approx(expected)


def differences_of(*probabilities) -> np.ndarray:
    """Return score differences that give these probabilities; a negative one is a wrong pair."""
    magnitudes = np.abs(probabilities)
    return np.log(magnitudes / (1 - magnitudes)) * np.sign(probabilities)


def test_the_curve_matches_pairs_worked_out_by_hand():
    """3 of 4 right at 0.77, 1 of 2 at 0.88, 1 of 1 at 1 - e^-800, which is 1; two ties left out."""
    differences = np.concatenate(
        [differences_of(0.77, -0.77, 0.77, 0.77, 0.88, -0.88), [0, 800, 0]]
    )
    curve = calibration.calibration_curve(differences)
    filled = calibration.filled_bins(curve["bins"])
    assert [(b["from"], b["to"], b["pairs"], b["accuracy"]) for b in filled] == [
        (0.75, 0.8, 4, 0.75),
        (0.85, 0.9, 2, 0.5),
        (0.95, 1.0, 1, 1.0),
    ]
    assert [b["probability"] for b in filled] == pytest.approx([0.77, 0.88, 1])
    assert curve["error"] == pytest.approx((4 * 0.02 + 2 * 0.38) / 7)
    starts = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert [b["from"] for b in curve["bins"]] == starts
    empty = curve["bins"][0]
    assert empty["pairs"] == 0
    assert empty["accuracy"] is None
    assert empty["interval"] is None
    assert empty["probability"] is None


def test_a_curve_of_ties_alone_is_empty():
    curve = calibration.calibration_curve(np.zeros(3))
    assert curve["error"] == 0
    assert sum(b["pairs"] for b in curve["bins"]) == 0


def test_ratio_buckets_include_their_lower_bound_and_leave_out_unknown_ratios():
    ratios = np.array([1.0, 1.49, 1.5, 2.0, 2.9, 3.0, 4.0, 5.0, 99.0, 0.0])
    differences = np.array([1.0, -1.0, 1.0, 0.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    buckets = calibration.accuracy_by_ratio(differences, ratios)
    assert [(b["from"], b["to"], b["pairs"], b["accuracy"]) for b in buckets] == [
        (1.0, 1.5, 2, 0.5),
        (1.5, 2.0, 1, 1.0),
        (2.0, 3.0, 2, 0.5),
        (3.0, 5.0, 2, 0.0),
        (5.0, None, 2, 1.0),
    ]
    assert buckets[4]["interval"] == intervals.wilson_interval(2, 2)


def test_figures_of_a_set_add_up():
    """Four pairs that fit of six: two right, one tie; the loss is the mean of log(1 + e^-d)."""
    differences = np.array([np.log(3), 0.0, -np.log(3), np.log(3)])
    ratios = np.array([2.0, 9.0, 1.0, 9.0, 6.0, 2.0])
    scored = table4.ScoreDifferences(differences, np.array([0, 2, 4, 5]))
    figures = table4.figures_of_set(scored, ratios)
    assert figures["accuracy"] == 0.5
    assert figures["ties"] == 0.25
    assert figures["comparisons"] == 4
    assert figures["dropped"] == 2
    assert figures["loss"] == pytest.approx((2 * np.log(4 / 3) + np.log(2) + np.log(4)) / 4)
    assert figures["interval"] == intervals.wilson_interval(2, 4)
    # The ratios of the pairs that fit are 2, 1, 6, 2.
    assert [b["pairs"] for b in figures["by_ratio"]] == [1, 0, 2, 0, 1]
    assert [b["accuracy"] for b in figures["by_ratio"]] == [0, None, 1, None, 0]
    without_ratios = table4.ScoreDifferences(differences, np.arange(4))
    assert "by_ratio" not in table4.figures_of_set(without_ratios, np.zeros(4))


def test_the_picture_shows_what_the_curves_hold():
    curves = {
        "PMP": calibration.calibration_curve(differences_of(0.77, -0.77, 0.88, 0.88)),
        "RM": calibration.calibration_curve(differences_of(0.52, 0.52)),
    }
    names = ["first", "second", "third", "fourth", "fifth"]
    figure = calibration.calibration_figure({name: curves for name in names})
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
    "mesh, microbatch_tokens, chunk",
    [
        ("1 device", 30, 256),
        ("1 device", 4096, 256),
        ("1 device", 300, 7),
        ("8 devices", 300, 256),
        ("2 x 2 x 2", 4096, 7),
    ],
)
def test_scores_are_those_of_each_response_alone_whatever_the_batch_and_the_devices(
    mesh, microbatch_tokens, chunk, runs, reward_model, monkeypatch
):
    monkeypatch.setattr(table4, "CHUNK", chunk)
    rows = mixed_rows()
    progress = Progress()
    mesh = MESHES[mesh]
    with jax.set_mesh(mesh):
        scorer = table4.PairScorer(
            score_pairs=reward_model.score_pairs,
            params=restored_params(runs, reward_model, mesh),
            reader=table4.PairReader(
                tokenizer=reward_model.tokenizer,
                ending=(chat.end_token(reward_model.tokenizer),),
                max_length=MAX_LENGTH,
            ),
            microbatch_tokens=microbatch_tokens,
            mesh=mesh,
        )
        differences, numbers = scorer.differences(rows, progress)
    assert numbers.tolist() == [*range(5), *range(6, 35)]
    assert progress.total == 42
    expected = differences_alone(runs, reward_model, [rows[number] for number in numbers])
    np.testing.assert_allclose(differences, expected, atol=1e-5)
    assert differences[9] == 0
    assert np.sort(np.abs(differences))[1] > 2e-5  # so no rounding could change a verdict
    figures = ranking.figures_of(differences)
    assert figures["accuracy"] == (np.delete(expected, 9) > 0).sum() / 34
    assert figures["ties"] == 1 / 34


def restored_params(runs, reward_model, mesh):
    shapes = roles.abstract_params(reward_model.architecture, "scalar", mesh)
    return restore_role(runs / "rm-tiny", "model", shapes)


def differences_alone(runs, reward_model, rows):
    """Score each response in a row of its own, and return the pairs' differences."""
    pairs = [chat.encode_comparisons(reward_model.tokenizer, [row])[0] for row in rows]
    score_alone = jax.jit(functools.partial(scoring.score_alone, reward_model.architecture))
    with jax.set_mesh(ONE_DEVICE):
        params = restored_params(runs, reward_model, ONE_DEVICE)
        chosen, rejected = (
            score_alone(params, encoding.pad(side, MAX_LENGTH), encoding.lengths_of(side))
            for side in zip(*pairs, strict=True)
        )
    return np.asarray(chosen, np.float64) - np.asarray(rejected)


def run(*arguments) -> int:
    return evaluate.main([str(argument) for argument in arguments])


def test_the_command_prints_and_writes_pmp_and_rm(runs, capsys):
    """On the pairs that training itself evaluated, the figures are those of its summary."""
    out = runs / "rm-tiny" / "evaluation.json"
    sets = f"{CLEAN},toy/comparisons-noisy"
    assert run("--run", runs / "rm-tiny", "--sets", sets, "--examples", 64) == 0
    results = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert results["runs"] == {"PMP": str(runs / "pmp-tiny"), "RM": str(runs / "rm-tiny")}
    lines = {line.split("  ")[0]: line for line in printed.splitlines() if line}
    for label, directory in results["runs"].items():
        summary = json.loads((Path(directory) / "summary.json").read_text())
        for name, figures in results["figures"][label].items():
            assert figures["accuracy"] == summary[f"accuracy/{name}"]
            assert figures["ties"] == 0
            assert figures["loss"] == pytest.approx(summary[f"loss/{name}"], abs=1e-6)
            assert figures["comparisons"] == 64
            assert figures["dropped"] == 0
            assert sum(b["pairs"] for b in figures["calibration"]["bins"]) == 64
            right = round(64 * figures["accuracy"])
            assert figures["interval"] == pytest.approx(intervals.wilson_interval(right, 64))
            assert f"{100 * right / 64:.2f} [{100 * figures['interval'][0]:.1f}, " in lines[label]
    assert "report" not in printed  # it has none of these sets
    assert Image.open(runs / "rm-tiny" / "calibration.png").size[0] > 600


def test_public_sets_come_from_tfds_with_the_reports_figures_and_shp_by_ratio(
    runs, tmp_path, capsys, monkeypatch
):
    loaded = []
    rows = mixed_rows()

    def load(*arguments):
        loaded.append(arguments)
        is_shp = arguments[0] == "tfds/shp"
        return [{**row, "ratio": 2.5 * is_shp} for row in rows]

    monkeypatch.setattr(sources, "load", load)
    out = tmp_path / "table.json"
    two_runs = ("--run", runs / "pmp-tiny", runs / "rm-tiny")
    options = ("--data_dir", "somewhere", "--split", "train", "--out", out)
    assert run(*two_runs, "--sets", "shp,hh_harmless_base", *options) == 0
    expected = sources.ReadOptions(data_dir="somewhere", say=table4.say)
    assert loaded == [
        (f"tfds/{name}", "comparisons", "train", expected) for name in ("shp", "hh_harmless_base")
    ]
    results = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert results["report"] == {"shp": {"PMP": 60.05, "RM": 60.10}}
    assert out.with_suffix(".png").exists()
    lines = [line.split() for line in printed.splitlines()]
    assert ["the", "report's", "PMP", "60.05", "-"] in lines
    assert ["the", "report's", "RM", "60.10", "-"] in lines
    for directory in ("pmp-tiny", "rm-tiny"):
        figures = results["figures"][str(runs / directory)]
        assert [b["pairs"] for b in figures["shp"]["by_ratio"]] == [0, 0, 34, 0, 0]
        assert figures["shp"]["by_ratio"][2]["accuracy"] == figures["shp"]["accuracy"]
        assert "by_ratio" not in figures["hh_harmless_base"]
        assert figures["shp"]["dropped"] == 8
        assert f"shp by score ratio, {runs / directory}" in printed
    assert lines.count(["pairs,", "ties,", "too", "long", "34,", "1,", "8", "34,", "1,", "8"]) == 2


def test_a_run_whose_parent_is_gone_is_evaluated_alone_with_a_notice(runs, tmp_path, capsys):
    shutil.copytree(runs / "rm-tiny", tmp_path / "rm-tiny")
    label = str(tmp_path / "rm-tiny")
    losses = {}
    for dtype in ("float32", "bfloat16"):
        assert run("--run", label, "--sets", CLEAN, "--examples", 8, "--dtype", dtype) == 0
        results = json.loads((tmp_path / "rm-tiny" / "evaluation.json").read_text())
        printed = capsys.readouterr().out
        assert list(results["figures"]) == [label]
        assert results["dtype"] == dtype
        notice = "alone, because its parent cannot be used:"
        assert f"{notice} {tmp_path / 'pmp-tiny'}: no config.json there" in printed
        losses[dtype] = results["figures"][label][CLEAN]["loss"]
    # The computation uses the type that the command names.
    assert 0 < abs(losses["bfloat16"] - losses["float32"]) < 0.01


@pytest.mark.parametrize(
    "directory, arguments, message",
    [
        ("rm-tinny", {}, "no config.json there, so neither a run nor a checkpoint"),
        (
            "lm-tiny",
            {},
            "--sets needs a reward model: a run of stage 'ranking' (PMP, RM), or a sequence "
            "classifier of Hugging Face's format; this run's stage is 'lm'",
        ),
        ("unfinished", {}, "this run is not complete"),
        (
            "rm-tiny",
            {"--sets": "hh_helpful_bas"},
            "--sets hh_helpful_bas: there is no such set and no such file; "
            "did you mean 'hh_helpful_base'?",
        ),
        (
            "rm-tiny",
            {"--sets": f"{CLEAN},toy/comparisons-claen"},
            "did you mean 'comparisons-clean'?",
        ),
        ("rm-tiny", {"--sets": "toy/text"}, "this stage takes comparisons"),
        ("rm-tiny", {"--sets": ""}, "--sets is empty: expected the names of sets"),
        ("rm-tiny", {"--sets": ",,"}, "--sets=',,': expected sources separated by commas"),
        ("rm-tiny", {"--sets": f"0.5*{CLEAN}"}, "weights are for training"),
        ("rm-tiny", {"--columns": "question"}, "--columns=question: expected a JSON object"),
        (
            "rm-tiny",
            {"--sets": "empty.jsonl"},
            "empty.jsonl: empty, there are no comparisons in it",
        ),
        ("rm-tiny", {"--max_length": 3}, f"--max_length 3: all 8 pairs of {CLEAN} are longer"),
        ("rm-tiny", {"--examples": -1}, "--examples=-1 must be at least 1"),
        ("rm-tiny", {"--out": "table.txt"}, "--out table.txt: expected the name of a .json file"),
        (
            "rm-tiny",
            {"--out": "nowhere/table.json"},
            "--out nowhere/table.json: expected the name of a .json file in an existing directory",
        ),
    ],
)
def test_a_user_error_is_one_line(
    directory, arguments, message, runs, tmp_path, capsys, monkeypatch
):
    for path in runs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    shutil.copytree(runs / "rm-tiny", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "summary.json").unlink()
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    flags = {"--run": directory, "--sets": CLEAN, "--examples": 8} | arguments
    assert run(*(word for flag in flags.items() for word in flag)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("alignjax: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert "accuracy" not in printed.out


def test_options_of_a_public_set_stay_with_it(runs, tmp_path, monkeypatch):
    loaded = []
    rows = mixed_rows()

    def load(source, *_):
        loaded.append(source)
        return rows

    monkeypatch.setattr(sources, "load", load)
    out = tmp_path / "table.json"
    sets = f"shp:min_score_ratio=1,pairs=5,summarize,{CLEAN},prm800k:a=b"
    assert run("--run", runs / "rm-tiny", "--sets", sets, "--out", out) == 0
    assert loaded == [
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
    message = "alignjax: --sets shp: its split 'heldout' has no comparisons"
    assert message in capsys.readouterr().err


def test_a_run_that_cannot_be_written_to_is_rejected_before_anything_is_scored(
    runs, capsys, monkeypatch
):
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: path != runs / "rm-tiny")
    assert run("--run", runs / "rm-tiny", "--sets", CLEAN) == 2
    printed = capsys.readouterr()
    assert "evaluation.json: Permission denied" in printed.err
    assert "%|" not in printed.err
