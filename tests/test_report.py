"""The report page holds what the runs left, needs nothing else, and works in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from runs import rows

from alignjax import config as configs
from alignjax import report
from alignjax.reports import content
from alignjax.runs import environment

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--dump-dom",
]
# Text of a run that would do harm as HTML, as the end of a script, or as a part of the template.
HARMFUL = (
    "</script><script>document.title='harmed'</script>"
    "<img src=x onerror=\"document.title='harmed'\"> & {{data}}"
)
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>')


def write_run(directory: Path, steps: int = 3, name: str = "ppo", **files) -> Path:
    """Write a small PPO run by hand; `files` has rows or an object for further files.

    The run is incomplete unless there is a summary among its files.
    """
    directory.mkdir(parents=True)
    parents = {"policy": "nowhere.py", "value": "hf://a/b"}
    config = configs.Config(stage="ppo", name=name, steps=steps, parents=parents)
    (directory / "config.json").write_text(configs.to_json(config))
    metrics = [
        {"step": step, "objective/scores": step / 3, "objective/kl": 0.1 * step, "new/figure": step}
        for step in range(steps)
    ]
    for file, value in {"metrics.jsonl": metrics, **files}.items():
        lines = value if isinstance(value, list) else [value]
        (directory / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def one_response(text: str, score: float, kl: float) -> dict:
    """Return one side of a row of responses.jsonl."""
    tokens = text.split()
    return {
        "responses": [text],
        "tokens": [tokens],
        "log_ratio": [[kl / len(tokens)] * len(tokens)],
        "score": [score],
        "kl": [kl],
        "length": [len(tokens)],
        "truncated": [False],
        "entropy": [1.0],
    }


def final_responses() -> list[dict]:
    """Return rows of responses.jsonl: by descending KL the third, the first, the second."""
    prompts = (("first", 1.0, 0.5), ("second", 3.0, 0.1), (HARMFUL, 2.0, 0.9))
    return [
        {
            "prompt": prompt,
            "before": one_response("so it was", score, 0),
            "after": one_response(HARMFUL, -score, kl),
        }
        for prompt, score, kl in prompts
    ]


def write_page(*arguments) -> tuple[str, dict]:
    """Run the command on runs and a file, and return the page and the data in it."""
    *runs, out = map(str, arguments)
    assert report.main([*runs, "--out", out]) == 0
    page = Path(out).read_text()
    return page, json.loads(DATA.search(page)[1])


def charts_by_title(data: dict) -> dict[str, dict]:
    return {chart["title"]: chart for chart in data["charts"]}


CHART_OF_STAGE = {
    "lm": "Loss",
    "sft": "Loss",
    "pmp": "Accuracy",
    "rm": "Accuracy",
    "dpo": "Implicit rewards",
    "ppo": "True score",
}


@pytest.mark.parametrize("stage", CHART_OF_STAGE)
def test_the_page_of_every_stage_has_what_its_run_left(stage, chain, tmp_path):
    directory = chain.runs / f"{stage}-tiny"
    page, data = write_page(directory, tmp_path / f"{stage}.html")
    (run,) = data["runs"]
    assert run["complete"]
    assert run["done"] == 4
    assert run["warnings"] is not None
    summary = json.loads((directory / "summary.json").read_text())
    assert [label for label, _ in run["table"]] == [label for label, _ in summary["table"]]
    charts = charts_by_title(data)
    assert CHART_OF_STAGE[stage] in charts
    assert "Time per step" in charts
    assert all(chart["lines"] or chart["heldout"] for chart in charts.values())
    for row in rows(directory / "metrics.jsonl"):
        for name in set(row) - {"step"}:
            series = run["series"][name]
            value = series["values"][series["steps"].index(row["step"])]
            assert value == pytest.approx(row[name], rel=1e-5)
    assert not re.search(r'\b(src|href)="(?!#)|url\(|@import', page)
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert run["environments"] == json.loads((directory / "environment.json").read_text())
    assert len(data["sources"]) == {"ppo": 3, "dpo": 2}.get(stage, 1)


def test_the_page_of_ppo_has_its_evaluations_and_responses(chain, tmp_path):
    directory = chain.runs / "ppo-tiny"
    data = write_page(directory, tmp_path / "ppo.html")[1]
    (run,) = data["runs"]
    summary = json.loads((directory / "summary.json").read_text())
    true_score = charts_by_title(data)["True score"]
    assert true_score["marks"][0]["value"] == summary["true_score/before"]
    assert run["heldout"]["score"]["steps"] == [2, 4]
    assert len(run["parents"][1]["table"]) > 0
    end, midway, training = (source["rows"] for source in data["sources"])
    second = 1  # of the responses to a prompt
    for row, shown in zip(rows(directory / "responses.jsonl"), end, strict=True):
        before, after = shown["sides"].values()
        assert shown["prompt"] == row["prompt"]
        assert before[second]["log_ratio"] == row["before"]["log_ratio"][second]
        assert after[second]["text"] == row["after"]["responses"][second]
        assert after[second]["tokens"] == row["after"]["tokens"][second]
        assert after[second]["figures"]["KL"] == row["after"]["kl"][second]
    assert len(midway) == 4
    assert len(training) == 8
    assert training[4]["step"] == 2


def test_the_page_of_a_reward_model_has_its_pairs_and_its_parents_accuracy(chain, tmp_path):
    directory = chain.runs / "rm-tiny"
    data = write_page(directory, tmp_path / "rm.html")[1]
    (chosen,) = data["sources"][0]["rows"][0]["sides"]["chosen"]
    first = rows(directory / "samples.jsonl")[0]
    assert chosen["text"] == first["chosen"]
    assert chosen["figures"] == {"score": first["chosen_score"]}
    marks = charts_by_title(data)["Accuracy"]["marks"]
    sources = {mark["words"].split(",")[0] for mark in marks}
    assert sources == {"at the end", "pmp.py:tiny"}


def test_an_incomplete_run_can_be_shown_with_another_seed_of_it(tmp_path):
    evaluations = [{"step": 2, "score": 0.5, "kl": None, "samples": []}]
    timing = [{"step": 0, "seconds": 2.5, "phases/update": 1.5, "phases/other": 1.0}]
    files = {"evaluations.jsonl": evaluations, "timing.jsonl": timing}
    one = write_run(tmp_path / "one" / "run", **files)
    two = write_run(tmp_path / "two" / "run", 5)
    data = write_page(one, two, tmp_path / "out.html")[1]
    first, second = data["runs"]
    assert (first["title"], second["title"]) == (str(one), str(two))
    assert (first["complete"], first["done"], first["steps"]) == (False, 3, 3)
    assert (second["complete"], second["done"], second["steps"]) == (False, 5, 5)
    assert (first["config"]["steps"], second["config"]["steps"]) == ("3", "5")
    assert data["defaults"]["steps"] == "100"
    titles = ["Score", "KL to the reference", "Time per step", "Time by phase", "new/figure"]
    assert [chart["title"] for chart in data["charts"]] == titles
    phases = {"timing/phases/other": "other", "timing/phases/update": "update"}
    assert data["charts"][3]["lines"] == phases
    assert first["seconds"] == 2.5
    assert data["charts"][0]["heldout"] == "score"
    assert first["heldout"]["kl"]["steps"] == []
    assert data["sources"] == []
    assert first["environments"] == []


def test_text_of_a_run_cannot_end_the_script_or_become_html(tmp_path):
    run = write_run(tmp_path / "run", name=HARMFUL, **{"responses.jsonl": final_responses()})
    page, data = write_page(run, tmp_path / "out.html")
    assert data["sources"][0]["rows"][2]["prompt"] == HARMFUL
    assert data["runs"][0]["title"] == HARMFUL
    assert page.count("<script") == page.count("</script") == 2
    assert "<img" not in page


def test_a_long_curve_is_thinned_and_keeps_its_spikes():
    points = [(step, float(step % 7)) for step in range(50_000)]
    points[31_337] = (31_337, 1e6)
    points[777] = (777, -1e6)
    thinned = content.thin(points)
    assert len(thinned) <= content.POINTS
    assert {points[31_337], points[777], points[0], points[-1]} <= set(thinned)
    assert thinned == sorted(thinned)
    assert content.thin(points[:2000]) == points[:2000]


def test_warnings_are_those_of_the_rules(tmp_path):
    metrics = [
        {"step": step, "objective/kl": 9.0, "objective/kl_per_token": 0.9} for step in range(10)
    ]
    run = write_run(tmp_path / "run", 10, **{"metrics.jsonl": metrics})
    data = write_page(run, tmp_path / "out.html")[1]
    (warning,) = data["runs"][0]["warnings"]
    assert set(warning) == {"kind", "step", "observation", "meaning", "remedy"}
    assert (warning["kind"], warning["step"]) == ("kl", 4)


def test_user_errors_are_reported_in_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    no_run = f"{tmp_path}/nowhere: no config.json there, so this is not a run"
    assert capsys.readouterr().err == f"alignjax: {no_run}\n"
    run = str(write_run(tmp_path / "run"))
    assert report.main([run, "--out", str(tmp_path / "no" / "where.html")]) == 2
    no_directory = f"--out {tmp_path}/no/where.html: there is no directory {tmp_path}/no"
    assert capsys.readouterr().err == f"alignjax: {no_directory}\n"
    assert report.main([run]) == 0
    assert (tmp_path / "run" / "report.html").exists()


def recorded_devices(run: Path) -> list[int]:
    recorded = json.loads((run / "environment.json").read_text())
    return [here["devices"] for here in recorded]


def test_an_environment_is_added_if_it_differs(tmp_path, monkeypatch):
    environment.record(tmp_path)
    environment.record(tmp_path)
    (here,) = json.loads((tmp_path / "environment.json").read_text())
    assert {"python", "backend", "devices", "commit", "packages"} <= set(here)
    assert "jax" in here["packages"]
    monkeypatch.setattr(environment, "describe", lambda: here | {"devices": 64})
    environment.record(tmp_path)
    assert recorded_devices(tmp_path) == [here["devices"], 64]
    (tmp_path / "environment.json").write_text('[{"py')
    environment.record(tmp_path)
    assert recorded_devices(tmp_path) == [64]


# A page that holds the report in a frame 390 px wide, drives it, and writes down what it sees.
DRIVER = """<!doctype html>
<iframe src="out.html#sort=KL&theme=dark" style="width: 390px; height: 800px"></iframe>
<pre></pre>
<script>
addEventListener("load", () => {
  const page = frames[0].document;
  const all = (query) => [...page.querySelectorAll(query)];
  const texts = (query) => all(query).map((node) => node.textContent);
  const places = () => all(".sample").map((node) => Number(node.dataset.place));
  const set = (node, value, kind) => {
    node.value = value;
    node.dispatchEvent(new Event(kind));
  };
  const seen = {};
  seen.title = page.title;
  seen.frameWidth = frames[0].innerWidth;
  seen.clientWidth = page.documentElement.clientWidth;
  seen.scrollWidth = page.documentElement.scrollWidth;
  seen.background = frames[0].getComputedStyle(page.body).backgroundColor;
  seen.sections = all("main > details").map((node) => node.id);
  seen.byKL = places();
  all("#samples button")[0].click();
  seen.reversed = places();
  set(all("#samples select")[1], "difference of scores", "change");
  seen.byDifference = places();
  set(all("#samples input")[0], "SECOND", "input");
  seen.filtered = places();
  seen.state = frames[0].location.hash;
  set(all("#samples input")[0], "", "input");
  all("#samples input[type=checkbox]")[0].click();
  seen.numbers = texts(".sample[data-place='1'] rt");
  all(".token")[0].click();
  seen.token = texts(".response dd.soft").filter(Boolean);
  const colours = all(".sample[data-place='1'] .token").map((node) => node.style.background);
  seen.colours = new Set(colours).size;
  seen.foreign = all("img, iframe, main script").length;
  const plot = all(".plot")[0];
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
  const figures = all("figure").slice(0, 2);
  seen.captions = figures.map((node) => node.querySelector("figcaption").textContent);
  const pointsOf = (trace) => (trace.getAttribute("d") || "").split("L").length;
  seen.curves = all(".trace").filter((trace) => pointsOf(trace) === 3).length;
  set(all("#config input")[0], "kl_coef", "input");
  seen.config = texts("#config tbody tr:not([hidden])");
  document.querySelector("pre").textContent = JSON.stringify(seen);
});
</script>"""


def drive_page(directory: Path) -> dict:
    """Open DRIVER next to `out.html` in a browser, and return what it has seen.

    Nothing may be written to the console.
    """
    (directory / "driver.html").write_text(DRIVER)
    run = subprocess.run(
        [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={directory / 'profile'}",
            f"file://{directory}/driver.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in run.stderr, run.stderr
    text = re.search(r"<pre>(.+?)</pre>", run.stdout)[1]
    return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_sorts_filters_and_fits_a_phone_in_a_browser(tmp_path):
    """And the text of a run stays text."""
    run = write_run(tmp_path / "run", name=HARMFUL, **{"responses.jsonl": final_responses()})
    write_page(run, tmp_path / "out.html")
    seen = drive_page(tmp_path)
    assert seen["title"].startswith(HARMFUL)
    assert seen["foreign"] == 0
    assert seen["frameWidth"] == 390
    assert seen["scrollWidth"] == seen["clientWidth"]
    assert seen["background"] == "rgb(22, 24, 27)"
    sections = ["results", "warnings", "curves", "samples", "config", "environment"]
    assert seen["sections"] == sections
    assert (seen["byKL"], seen["reversed"]) == ([2, 0, 1], [1, 0, 2])
    assert (seen["byDifference"], seen["filtered"]) == ([1, 2, 0], [1])
    assert "sort=difference+of+scores" in seen["state"]
    assert "filter=SECOND" in seen["state"]
    assert seen["numbers"][:3] == ["0.00"] * 3
    assert len(seen["numbers"]) == 3 + len(HARMFUL.split())
    assert seen["colours"] == 2
    assert len(seen["token"]) == 1
    assert seen["token"][0].endswith(" nats")
    assert all("step 1" in caption for caption in seen["captions"])
    assert seen["curves"] == 3
    assert seen["config"] == ["ppo.kl_coef0.040.04"]
