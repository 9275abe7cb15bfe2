"""A run, or several, as one HTML file that opens offline: results, warnings, curves, responses, config, environment.

    python -m alignjax.report runs/ppo [runs/other ...] [--out FILE]        default: report.html in the first run's directory

Runs may still be going on. Curves of several runs lie over each other; what their configs differ in comes first. Moving
over a chart shows the values of that step in all charts; points are figures of what is held out, dashed lines what a run
begins with (SFT, before PPO) or ends with. A long curve is thinned to the lowest and the highest value of each of a
thousand stretches, and figures have six digits; of samples at most 400 rows of a kind are taken, evenly.

Responses are coloured by token: log p of the policy less log p of the reference. In what a run answers at its end
(responses.jsonl) it is the final policy's in both columns: the reference's responses show what the policy has turned to or
away from; the policy's own add up to its KL. The page's state (sort, filter, theme) is in its address, behind the #.
"""

import argparse
import base64
import dataclasses
import hashlib
import html
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignjax import config as configs
from alignjax.config import Config, UserError
from alignjax.machine import workdir as workdirs
from alignjax.runs import advice, records
from alignjax.runs.records import Records

PAGE = Path(__file__).resolve().parent / "reports" / "page"
POINTS, ROWS = 2000, 400  # of a curve, of a kind of samples
FIGURES = {
    "score": "score",
    "true_score": "true score",
    "kl": "KL",
    "length": "length",
    "truncated": "cut off",
}


class Chart(NamedTuple):
    title: str
    unit: str
    # {name of a metric: words}; where it ends with *, all that begin so, by the rest of their names
    lines: dict[str, str]
    heldout: str = ""  # the figure of evaluations.jsonl that belongs here; its /before in the summary is a dashed line
    ends: str = ""  # figures of the summary that begin so are dashed lines, of a parent too
    log: bool = False
    rare: bool = False  # left out where it is all 0


CHARTS = (
    Chart("Score", "of the reward", {"objective/scores": "score"}, "score"),
    Chart("True score", "best 1", {"objective/true_score": "true score"}, "true_score"),
    Chart("KL to the reference", "nats a response", {"objective/kl": "KL"}, "kl"),
    Chart("KL to the reference", "nats a token", {"objective/kl_per_token": "KL"}),
    Chart(
        "Entropy",
        "nats a token",
        {"policy/entropy_avg": "entropy", "entropy": "entropy"},
        "entropy",
    ),
    Chart("Entropy", "nats a response, by what was sampled", {"objective/entropy": "entropy"}),
    Chart(
        "Reward with KL penalty",
        "score normalised",
        {"objective/rlhf_reward": "reward", "objective/non_score_reward": "penalty alone"},
    ),
    Chart(
        "Running scores",
        "mean and deviation",
        {
            "reward/running_mean": "mean",
            "reward/running_std": "deviation",
            "objective/scores_std": "deviation of the step",
        },
    ),
    Chart(
        "Clip fractions",
        "share of tokens",
        {"policy/clipfrac_avg": "policy", "val/clipfrac_avg": "value"},
    ),
    Chart(
        "Explained variance",
        "of the returns, by the values",
        {"value/explained_variance": "explained"},
    ),
    Chart("Ratio", "new to old policy, mean", {"val/ratio": "ratio"}),
    Chart("Ratio", "variance", {"val/ratio_var": "variance"}),
    Chart("Change of the policy", "approximate KL of an update", {"policy/approxkl_avg": "KL"}),
    Chart(
        "Response length",
        "tokens",
        {"response/length_mean": "mean", "response/length_max": "longest"},
        "length",
    ),
    Chart("Truncated", "share of responses", {"response/truncated": "truncated"}, "truncated"),
    Chart("Loss", "nats a target", {"loss": "loss"}, "", "heldout_loss|loss/"),
    Chart("Accuracy", "share of pairs", {"accuracy": "in training"}, "", "accuracy/"),
    Chart(
        "Margin", "chosen less rejected score", {"margin": "margin", "mean_reward": "mean score"}
    ),
    Chart("Policy loss", "clipped objective", {"loss/policy_avg": "policy"}),
    Chart("Value loss", "squared error", {"loss/value_avg": "value"}),
    Chart(
        "Loss on pretraining text",
        "nats a token",
        {"loss/pretrain_avg": "pretraining"},
        "pretrain_loss",
    ),
    Chart(
        "Gradient norm",
        "before clipping",
        {
            "grad_norm": "all",
            "policy/grad_norm": "policy",
            "pretrain/grad_norm": "pretraining text",
        },
    ),
    Chart("Gradient norm of the value model", "before clipping", {"value/grad_norm": "value"}),
    Chart("Pretraining gradient", "norm over the policy's", {"pretrain/grad_norm_ratio": "ratio"}),
    Chart("Learning rate", "", {"lr": "policy"}),
    Chart(
        "Skipped updates",
        "not finite",
        {"skipped": "all", "policy/skipped": "policy", "value/skipped": "value"},
        rare=True,
    ),
    Chart("Ties", "share of pairs", {"ties": "ties"}, rare=True),
    Chart(
        "Sampler against scorer",
        "difference of log p",
        {"sampler/drift_mean": "mean", "sampler/drift_max": "largest"},
    ),
    Chart(
        "Time of a step",
        "seconds",
        {"timing/seconds": "step", "timing/evaluation_seconds": "evaluation"},
        log=True,
    ),
    Chart("Time by phase", "seconds", {"timing/phases/*": ""}, log=True),
    Chart("Episodes", "a second", {"timing/eps": "episodes"}),
    Chart("Compiled programs", "so far", {"timing/compilations": "programs"}),
)
UNDRAWN = {"step", "episode", "val/num_eos_tokens"}


def main(argv=None) -> int:
    """The exit code: 0, or 2 after a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m alignjax.report",
        allow_abbrev=False,
        description="Write what runs have left as one HTML file.",
    )
    parser.add_argument(
        "runs", nargs="+", help="work directories, of complete or unfinished runs of any stage"
    )
    parser.add_argument("--out", help="default: report.html in the first run's directory")
    arguments = parser.parse_args(argv)
    try:
        runs = [records.read(workdirs.resolve(run)) for run in arguments.runs]
        out = workdirs.resolve(arguments.out) if arguments.out else runs[0].workdir / "report.html"
        try:
            workdirs.write_atomically(out, page(content(runs)))
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror or error}") from None
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {', '.join(title(run) for run in runs)}")
    return 0


def page(data: dict) -> str:
    """The HTML file that shows `data`. What a run says is in it as JSON only, without a "<", and the script by its hash."""
    parts = {
        name: (PAGE / f"page.{name}").read_text(encoding="utf-8").strip()
        for name in ("html", "css", "js")
    }
    parts["data"] = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts["title"] = html.escape(", ".join(run["title"] for run in data["runs"]))
    digest = hashlib.sha256(f"\n{parts['js']}\n".encode()).digest()
    parts["hash"] = f"sha256-{base64.b64encode(digest).decode()}"
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], parts["html"])


def content(runs: list[Records]) -> dict:
    """All that the page shows, as JSON takes it."""
    described = [describe(run) for run in runs]
    for names in (
        [title(run) for run in runs],
        [run.workdir.name for run in runs],
        [str(run.workdir) for run in runs],
    ):
        if len(set(names)) == len(names):  # seeds of one config have the same name
            break
    for run, name in zip(described, names, strict=True):
        run["title"] = name
    sources = [{"run": i, **source} for i, run in enumerate(runs) for source in samples(run)]
    return {
        "runs": described,
        "charts": charts(described),
        "sources": sources,
        "defaults": plain(dict(configs.flatten(Config()))),
    }


def title(run: Records) -> str:
    return str(run.config.get("name", run.workdir.name))


def describe(run: Records) -> dict:
    """A run but for its samples."""
    steps = (
        run.summary.get("steps") or run.config.get("steps") or None
    )  # None: one pass, of a length not known here
    done = run.metrics[-1]["step"] + 1 if run.metrics else 0
    names = {f"timing/{name}" for row in run.timing for name in row} | {
        name for row in run.metrics for name in row
    }
    timing = [
        {"step": row["step"]} | {f"timing/{k}": v for k, v in row.items()} for row in run.timing
    ]
    series = {
        name: curve(timing if name.startswith("timing/") else run.metrics, name)
        for name in sorted(names)
    }
    ends = [
        {"step": steps}
        | {k.removesuffix("/after"): v for k, v in run.summary.items() if k.endswith("/after")}
    ]
    heldout = run.evaluations + (ends if len(ends[0]) > 1 else [])
    figures = {name for row in heldout for name in row} - {"step", "prompts", "samples"}
    return {
        "title": title(run),
        "directory": str(run.workdir),
        "stage": run.config.get("stage"),
        "steps": steps,
        "done": done,
        "seed": run.config.get("seed"),
        "complete": bool(run.summary),
        "seconds": run.summary.get("training_seconds")
        or round(sum(row.get("seconds") or 0 for row in run.timing), 1),
        "table": [
            [words, " ".join(value.split())] for words, value in run.summary.get("table", [])
        ],
        "parents": parents(run),
        "config": plain(run.config),
        "environments": environments(run),
        "summary": {k: v for k, v in run.summary.items() if isinstance(v, int | float)},
        "warnings": [
            dataclasses.asdict(warning)
            for warning in advice.advise(run.config, run.metrics, run.evaluations)
        ],
        "series": series,
        "heldout": {name: curve(heldout, name) for name in sorted(figures)},
    }


def environments(run: Records) -> list[dict]:
    found = records.read_object(run.workdir / "environment.json")
    return found if isinstance(found, list) else []


def plain(config: dict) -> dict[str, str]:
    """Values as text, those of dictionaries each by itself."""
    out = {}
    for name, value in config.items():
        if isinstance(value, dict):
            out |= {f"{name}.{key}": json.dumps(x, ensure_ascii=False) for key, x in value.items()}
        else:
            out[name] = json.dumps(value, ensure_ascii=False)
    return out


def parents(run: Records) -> list[dict]:
    """Of each parent the roles that begin with it, and the results of its run, if it is a run and there."""
    roles = {}
    for role, spec in run.config.get("parents", {}).items():
        roles.setdefault(spec, []).append(role)
    out = []
    for spec, mine in roles.items():
        directory = Path(spec)
        if spec.partition(":")[0].endswith(".py"):
            try:
                directory = run.workdir.parent / configs.load(spec).name
            except (
                Exception
            ):  # a config that is gone, or of another version: whatever its code raises
                directory = None
        summary = records.read_object(directory / "summary.json") if directory else {}
        out.append(
            {
                "roles": mine,
                "spec": spec,
                "table": summary.get("table", []),
                "summary": {k: v for k, v in summary.items() if isinstance(v, int | float)},
            }
        )
    return out


def curve(rows: list[dict], name: str) -> dict:
    """{"steps": [...], "values": [...]} of a figure, where there is one: thinned if long, each value to six digits."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    points = thin([point for point in points if math.isfinite(point[1])])
    return {
        "steps": [step for step, _ in points],
        "values": [float(f"{value:.6g}") for _, value in points],
    }


def thin(points: list[tuple]) -> list[tuple]:
    """All (step, value), or the first, the last, and of each of POINTS / 2 stretches the lowest and the highest."""
    if len(points) <= POINTS:
        return points
    kept = {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), POINTS // 2 - 1):
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def charts(runs: list[dict]) -> list[dict]:
    """What is to be drawn: the catalogue's charts that some run has, then one for each metric that no chart names."""
    names = (
        {name for run in runs for name, found in run["series"].items() if found["steps"]}
        - UNDRAWN
        - {"timing/step"}
    )
    catalogue, known = [], set()
    for chart in CHARTS:
        found = {}
        for name, words in chart.lines.items():
            more = (
                sorted(n for n in names if n.startswith(name[:-1]))
                if name.endswith("*")
                else [name]
            )
            found |= {n: words or n.removeprefix(name[:-1]) for n in more if n in names}
        known |= set(found)
        if chart.rare and not any(
            sum(run["series"].get(n, {"values": []})["values"]) for run in runs for n in found
        ):
            continue
        heldout = chart.heldout if any(chart.heldout in run["heldout"] for run in runs) else ""
        if found or heldout:
            catalogue.append(
                {
                    "title": chart.title,
                    "unit": chart.unit,
                    "lines": found,
                    "heldout": heldout,
                    "log": chart.log,
                    "marks": marks(chart, runs),
                }
            )
    rest = [
        {"title": name, "unit": "", "lines": {name: name}, "heldout": "", "log": False, "marks": []}
        for name in sorted(names - known)
    ]
    return catalogue + rest


def marks(chart: Chart, runs: list[dict]) -> list[dict]:
    """Dashed lines, {"run", "words", "value"}: held out, before PPO; at a run's end and, the same figure, at its parent's."""
    out = []
    for i, run in enumerate(runs):
        before = run["summary"].get(f"{chart.heldout}/before")
        if before is not None and chart.heldout != "kl":  # which is 0
            out.append({"run": i, "words": "before PPO, held out", "value": before})
        ends = [name for name in run["summary"] if chart.ends and re.match(chart.ends, name)]
        whose = [("at the end", run["summary"])]
        if run["stage"] == "ranking":  # the losses of text are of texts that differ
            whose += [(parent["spec"], parent["summary"]) for parent in run["parents"]]
        out += [
            {
                "run": i,
                "words": f"{words}, {name.partition('/')[2] or 'held out'}",
                "value": summary[name],
            }
            for words, summary in whose
            for name in ends
            if name in summary
        ]
    return out


def samples(run: Records) -> list[dict]:
    """Kinds of samples: {"kind", "total", "rows": as `sample`}."""
    ends = ("reference, before PPO", "before"), ("policy, after PPO", "after")
    kinds = {
        "held out, at the end": [
            (row, {words: row[side] for words, side in ends}) for row in run.responses
        ],
        "held out, on the way": [
            (entry | {"step": row["step"]}, {"policy": entry})
            for row in run.evaluations
            for entry in row.get("samples", [])
        ],
        "in training": [(row, columns(row)) for row in run.samples],
    }
    out = []
    for kind, rows in kinds.items():
        kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), ROWS)).astype(int))
        if rows:
            out.append({"kind": kind, "total": len(rows), "rows": [sample(*rows[i]) for i in kept]})
    return out


def columns(row: dict) -> dict[str, dict]:
    """{title: responses with lists of their figures} of a row of samples.jsonl, of any stage."""
    if "responses" in row:
        return {"policy": row}
    if "chosen" in row:
        return {
            x: {"responses": [row[x]], "score": [row.get(f"{x}_score")]}
            for x in ("chosen", "rejected")
        }
    return {x: {"responses": [row[x]]} for x in ("text", "targets") if x in row}


def sample(row: dict, sides: dict[str, dict]) -> dict:
    """A row of the page: {"prompt", "step" (if it has them), "sides": {title: `responses`}, "sort": `sorting`}."""
    out = {name: row[name] for name in ("prompt", "step") if name in row}
    out["sides"] = {words: responses(side) for words, side in sides.items()}
    return out | {"sort": sorting(out)}


def responses(side: dict) -> list[dict]:
    """Each response with its tokens and figures."""
    out = []
    for k, text in enumerate(side["responses"]):
        out.append(
            {
                "text": text,
                "figures": {FIGURES[name]: side[name][k] for name in FIGURES if name in side},
            }
        )
        if "tokens" in side:
            out[-1] |= {"tokens": side["tokens"][k], "log_ratio": side["log_ratio"][k]}
    return out


def sorting(row: dict) -> dict[str, float]:
    """What a row can be sorted by: its step, the mean figures of its last column (of a comparison the chosen one's), and
    of two columns how far the scores are apart."""

    def mean(side: list[dict], name: str):
        found = [x["figures"].get(name) for x in side]
        return float(np.mean(found)) if found and None not in found else None

    *others, own = row["sides"].values()
    if "chosen" in row["sides"]:
        others, own = [own], others[0]
    out = {name: mean(own, name) for name in ("score", "true score", "KL", "length")} | {
        "step": row.get("step")
    }
    for name in ("score", "true score"):
        if others and None not in (out[name], mean(others[0], name)):
            out[f"difference of {name}s"] = out[name] - mean(others[0], name)
    return {name: value for name, value in out.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
