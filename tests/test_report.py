"""The report: what a page holds is what the runs have left, it needs nothing else, and in a browser it works."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from runs import rows

from alignjax import config as configs
from alignjax import report
from alignjax.runs import environment

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
HARM = "</script><script>document.title='harmed'</script><img src=x onerror=\"document.title='harmed'\"> & {{data}}"


def write(run: Path, steps: int = 3, name: str = "ppo", **more) -> Path:
    """A small PPO run, as if made by hand: unfinished, unless there is a summary among `more` {file: rows or object}."""
    run.mkdir(parents=True)
    config = configs.Config(
        stage="ppo", name=name, steps=steps, parents={"policy": "nowhere.py", "value": "hf://a/b"}
    )
    (run / "config.json").write_text(configs.to_json(config))
    figures = [
        {"step": i, "objective/scores": i / 3, "objective/kl": 0.1 * i, "new/figure": i}
        for i in range(steps)
    ]
    for file, content in {"metrics.jsonl": figures, **more}.items():
        lines = content if isinstance(content, list) else [content]
        (run / file).write_text("".join(json.dumps(row) + "\n" for row in lines))
    return run


def side(text: str, score: float, kl: float) -> dict:
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


def answered() -> list[dict]:
    """Rows of responses.jsonl: by KL the third, first, second."""
    return [
        {
            "prompt": f"{prompt}",
            "before": side("so it was", score, 0),
            "after": side(HARM, -score, kl),
        }
        for prompt, score, kl in (("first", 1.0, 0.5), ("second", 3.0, 0.1), (HARM, 2.0, 0.9))
    ]


def made(*arguments) -> tuple[str, dict]:
    """The page of a command, and the data in it."""
    *runs, out = map(str, arguments)
    assert report.main([*runs, "--out", out]) == 0
    page = Path(out).read_text()
    return page, json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


def test_every_stage_of_the_chain_has_its_page_with_what_its_run_has_left(chain, tmp_path):
    runs = chain[0]
    wanted = {"lm": "Loss", "sft": "Loss", "pmp": "Accuracy", "rm": "Accuracy", "ppo": "True score"}
    for stage, title in wanted.items():
        run = runs / f"{stage}-tiny"
        page, data = made(run, tmp_path / f"{stage}.html")
        (found,) = data["runs"]
        assert found["complete"] and found["done"] == 4 and found["warnings"] is not None
        summary = json.loads((run / "summary.json").read_text())
        assert [words for words, _ in found["table"]] == [words for words, _ in summary["table"]]
        charts = {chart["title"]: chart for chart in data["charts"]}
        assert (
            title in charts
            and "Time of a step" in charts
            and all(chart["lines"] for chart in charts.values())
        )
        for row in rows(run / "metrics.jsonl"):
            for name in set(row) - {"step"}:
                series = found["series"][name]
                assert series["values"][series["steps"].index(row["step"])] == pytest.approx(
                    row[name], rel=1e-5
                )
        assert not re.search(r'\b(src|href)="(?!#)|url\(|@import', page)
        assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
        assert found["environments"] == json.loads((run / "environment.json").read_text())
        assert len(data["sources"]) == (3 if stage == "ppo" else 1)
    assert charts["True score"]["marks"][0]["value"] == summary["true_score/before"]
    assert found["heldout"]["score"]["steps"] == [2, 4] and len(found["parents"][1]["table"]) > 0
    end, way, training = data["sources"]
    for row, shown in zip(rows(runs / "ppo-tiny" / "responses.jsonl"), end["rows"], strict=True):
        (before, after), k = shown["sides"].values(), 1
        assert (
            shown["prompt"] == row["prompt"]
            and before[k]["log_ratio"] == row["before"]["log_ratio"][k]
        )
        assert (
            after[k]["text"] == row["after"]["responses"][k]
            and after[k]["tokens"] == row["after"]["tokens"][k]
        )
        assert after[k]["figures"]["KL"] == row["after"]["kl"][k]
    assert len(way["rows"]) == 4 and len(training["rows"]) == 8 and training["rows"][4]["step"] == 2
    rm = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "rm.html").read_text())[1])
    (chosen,) = rm["sources"][0]["rows"][0]["sides"]["chosen"]
    first = rows(runs / "rm-tiny" / "samples.jsonl")[0]
    assert (chosen["text"], chosen["figures"]) == (
        first["chosen"],
        {"score": first["chosen_score"]},
    )
    accuracy = next(chart for chart in rm["charts"] if chart["title"] == "Accuracy")
    assert {mark["words"].split(",")[0] for mark in accuracy["marks"]} == {
        "at the end",
        "pmp.py:tiny",
    }


def test_an_unfinished_run_beside_another_seed_of_it(tmp_path):
    evaluations = [{"step": 2, "score": 0.5, "kl": None, "samples": []}]
    timing = [{"step": 0, "seconds": 2.5, "phases/update": 1.5, "phases/other": 1.0}]
    one = write(
        tmp_path / "one" / "run", **{"evaluations.jsonl": evaluations, "timing.jsonl": timing}
    )
    two = write(tmp_path / "two" / "run", 5)
    _, data = made(one, two, tmp_path / "out.html")
    assert [run["title"] for run in data["runs"]] == [str(one), str(two)]
    assert [(run["complete"], run["done"], run["steps"]) for run in data["runs"]] == [
        (False, 3, 3),
        (False, 5, 5),
    ]
    assert [run["config"]["steps"] for run in data["runs"]] == ["3", "5"] and data["defaults"][
        "steps"
    ] == "100"
    titles = ["Score", "KL to the reference", "Time of a step", "Time by phase", "new/figure"]
    assert [chart["title"] for chart in data["charts"]] == titles
    assert data["charts"][3]["lines"] == {
        "timing/phases/other": "other",
        "timing/phases/update": "update",
    }
    assert data["runs"][0]["seconds"] == 2.5
    assert (
        data["charts"][0]["heldout"] == "score" and data["runs"][0]["heldout"]["kl"]["steps"] == []
    )
    assert data["sources"] == [] and data["runs"][0]["environments"] == []


def test_what_a_run_says_cannot_end_the_script_or_become_html(tmp_path):
    page, data = made(
        write(tmp_path / "run", name=HARM, **{"responses.jsonl": answered()}), tmp_path / "out.html"
    )
    assert data["sources"][0]["rows"][2]["prompt"] == HARM and data["runs"][0]["title"] == HARM
    assert page.count("<script") == page.count("</script") == 2 and "<img" not in page


def test_a_long_curve_is_thinned_and_keeps_its_spikes():
    points = [(i, float(i % 7)) for i in range(50_000)]
    points[31_337], points[777] = (31_337, 1e6), (777, -1e6)
    thinned = report.thin(points)
    assert len(thinned) <= report.POINTS and {
        points[31_337],
        points[777],
        points[0],
        points[-1],
    } <= set(thinned)
    assert thinned == sorted(thinned) and report.thin(points[:2000]) == points[:2000]


def test_warnings_are_those_of_the_rules(tmp_path):
    steps = [{"step": i, "objective/kl": 9.0, "objective/kl_per_token": 0.9} for i in range(10)]
    _, data = made(write(tmp_path / "run", 10, **{"metrics.jsonl": steps}), tmp_path / "out.html")
    (warning,) = data["runs"][0]["warnings"]
    assert set(warning) == {"kind", "step", "observation", "meaning", "remedy"} and (
        warning["kind"],
        warning["step"],
    ) == (
        "kl",
        4,
    )


def test_mistakes_are_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert (
        capsys.readouterr().err
        == f"alignjax: {tmp_path}/nowhere: no config.json there, so this is not a run\n"
    )
    assert (
        report.main([str(write(tmp_path / "run")), "--out", str(tmp_path / "no" / "where.html")])
        == 2
    )
    assert (
        capsys.readouterr().err
        == f"alignjax: --out {tmp_path}/no/where.html: No such file or directory\n"
    )
    assert report.main([str(tmp_path / "run")]) == 0 and (tmp_path / "run" / "report.html").exists()


def test_an_environment_is_added_where_it_is_another(tmp_path, monkeypatch):
    environment.record(tmp_path)
    environment.record(tmp_path)
    (here,) = json.loads((tmp_path / "environment.json").read_text())
    assert {"python", "backend", "devices", "commit", "packages"} <= set(here) and "jax" in here[
        "packages"
    ]
    monkeypatch.setattr(environment, "describe", lambda: here | {"devices": 64})
    environment.record(tmp_path)
    assert [x["devices"] for x in json.loads((tmp_path / "environment.json").read_text())] == [
        here["devices"],
        64,
    ]
    (tmp_path / "environment.json").write_text('[{"py')
    environment.record(tmp_path)
    assert [x["devices"] for x in json.loads((tmp_path / "environment.json").read_text())] == [64]


DRIVER = """<!doctype html><iframe src="out.html#sort=KL&theme=dark" style="width: 390px; height: 800px"></iframe><pre></pre><script>
addEventListener("load", () => {
  const page = frames[0].document, all = (query) => [...page.querySelectorAll(query)], said = {};
  const places = () => all(".sample").map((x) => +x.dataset.place);
  const set = (node, value, kind) => { node.value = value; node.dispatchEvent(new Event(kind)); };
  said.title = page.title;
  said.widths = [frames[0].innerWidth, page.documentElement.clientWidth, page.documentElement.scrollWidth];
  said.background = frames[0].getComputedStyle(page.body).backgroundColor;
  said.sections = all("main > details").map((x) => x.id);
  said.byKL = places();
  all("#samples button")[0].click();
  said.turned = places();
  set(all("#samples select")[1], "difference of scores", "change");
  said.byDifference = places();
  set(all("#samples input")[0], "SECOND", "input");
  said.filtered = places();
  said.state = frames[0].location.hash;
  set(all("#samples input")[0], "", "input");
  all("#samples input[type=checkbox]")[0].click();
  said.numbers = all(".sample[data-place='1'] rt").map((x) => x.textContent);
  all(".token")[0].click();
  said.token = all(".response dd.soft").map((x) => x.textContent).filter(Boolean);
  said.colours = [...new Set(all(".sample[data-place='1'] .token").map((x) => x.style.background))].length;
  said.strange = all("img, iframe, main script").length;
  const plot = all(".plot")[0];
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
  said.cursor = all("figure").slice(0, 2).map((x) => x.querySelector("figcaption").textContent);
  said.curves = all(".trace").filter((x) => (x.getAttribute("d") || "").split("L").length === 3).length;
  set(all("#config input")[0], "kl_coef", "input");
  said.config = all("#config tbody tr:not([hidden])").map((x) => x.textContent);
  document.querySelector("pre").textContent = JSON.stringify(said);
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser_the_page_sorts_filters_and_fits_a_phone(tmp_path):
    """Without a word on the console; what a run says stays text. The page is driven by one that holds it, 390 px wide."""
    made(
        write(tmp_path / "run", name=HARM, **{"responses.jsonl": answered()}), tmp_path / "out.html"
    )
    (tmp_path / "driver.html").write_text(DRIVER)
    flags = [
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
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    run = subprocess.run(
        [BROWSER, *flags, f"file://{tmp_path}/driver.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in run.stderr, run.stderr
    said = json.loads(
        re.search(r"<pre>(.+?)</pre>", run.stdout)[1]
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
    )
    assert said["title"].startswith(HARM) and said["strange"] == 0
    inner, room, width = said["widths"]
    assert inner == 390 and width == room and said["background"] == "rgb(22, 24, 27)"
    assert said["sections"] == ["results", "warnings", "curves", "samples", "config", "environment"]
    assert (said["byKL"], said["turned"]) == ([2, 0, 1], [1, 0, 2])
    assert said["byDifference"] == [1, 2, 0] and said["filtered"] == [1]
    assert "sort=difference+of+scores" in said["state"] and "filter=SECOND" in said["state"]
    assert (
        said["numbers"][:3] == ["0.00"] * 3
        and len(said["numbers"]) == 3 + len(HARM.split())
        and said["colours"] == 2
    )
    assert len(said["token"]) == 1 and said["token"][0].endswith(" nats")
    assert all("step 1" in caption for caption in said["cursor"]) and said["curves"] == 3
    assert said["config"] == ["ppo.kl_coef0.040.04"]
