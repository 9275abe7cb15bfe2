"""Measure the runs of docs/real_model.md: write the page's tables and replies, draw its pictures.

python benchmarks/real_model.py arithmetic --run runs/smollm2-arithmetic
python benchmarks/real_model.py preferences --rm runs/smollm2-rm --run runs/smollm2-ppo

`arithmetic` lets the model before and after PPO answer the held-out problems, greedily and with
top-p 0.9. `preferences` lets the reward model score the held-out comparisons, beside a rule that
knows only which response is longer, and shows what PPO made of the replies. A second --run is
shown beside the first.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignjax import inference
from alignjax.algorithms import intervals
from alignjax.data import problems, sources
from alignjax.machine import pictures
from alignjax.reports.study_picture import moving_mean
from alignjax.runs import records

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configs.smollm2.arithmetic import is_right  # noqa: E402

SAMPLES = 4  # responses to each problem with top-p 0.9
SMOOTHING = 5  # a curve is a moving mean over so many steps
SHOWN_REPLIES = 4  # of the largest gains in score, and of the smallest
SHOWN_ANSWERS = 9
RESOLUTION = 80  # dots an inch
COLOURS = ("#0072b2", "#d55e00", "#009e73")  # of the runs in a picture
FIGURES = {
    "score": "score",
    "KL to the reference, nats a response": "kl",
    "response length, tokens": "length",
    "share cut off": "truncated",
    "entropy, nats a token": "entropy",
    "loss on held-out text, nats a token": "pretrain_loss",
}
CURVES = {
    "score": "objective/scores",
    "KL to the reference, nats": "objective/kl",
    "response length, tokens": "response/length_mean",
    "entropy, nats a token": "policy/entropy_avg",
}


class Share(NamedTuple):
    """A share with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the share and its bounds in %."""
        return f"{100 * self.mean:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the runs of one command, print what was measured, and write it into the page."""
    arguments = argument_parser().parse_args(argv)
    runs = [read_complete(path) for path in arguments.run]
    picture = arguments.page.with_name(f"real_model_{arguments.command}.png")
    if arguments.command == "arithmetic":
        lines = arithmetic_lines(runs[0])
        draw(runs, picture, "share of right answers")
    else:
        lines = preference_lines(runs, arguments.rm)
        draw(runs, picture, "reward model's score")
    text = "\n".join([*lines, "", f"![PPO, step by step]({picture.name})"])
    print(text)
    write_between_markers(arguments.page, arguments.command, text)


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    arithmetic = commands.add_parser("arithmetic", help="PPO on problems with known answers")
    preferences = commands.add_parser("preferences", help="a reward model, and PPO against it")
    page = ROOT / "docs" / "real_model.md"
    for command in (arithmetic, preferences):
        command.add_argument(
            "--run",
            type=Path,
            action="append",
            required=True,
            help="a run of PPO; with preferences, several may be given",
        )
        command.add_argument("--page", type=Path, default=page, help="default: docs/real_model.md")
    preferences.add_argument("--rm", required=True, help="the run of the reward model")
    return parser


def read_complete(path: Path) -> records.Records:
    """Return the records of a run, which must be complete."""
    run = records.read(path)
    if not run.summary:
        sys.exit(f"{path}: this run is not complete; repeat the command that started it")
    return run


def write_between_markers(page: Path, command: str, text: str) -> None:
    """Replace what a page has between the markers of a command."""
    begin = f"<!-- written by benchmarks/real_model.py {command} -->"
    end = f"<!-- end of {command} -->"
    content = page.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        sys.exit(f"{page}: there are no markers {begin} and {end}")
    before, _, rest = content.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def arithmetic_lines(run: records.Records) -> Iterator[str]:
    """Yield the lines of the page: accuracy by task, the run's other figures, some answers."""
    rows = sources.load(run.config["data.heldout"], "prompts", "heldout")
    length = run.config["ppo.response_length"]
    models = {"before": run.config["parents"]["policy"], "after": str(run.workdir)}
    right = {side: answer(name, rows, length) for side, name in models.items()}
    yield "| held-out problems | greedy before | greedy after | sampled before | sampled after |"
    yield "|---|---|---|---|---|"
    for task in (*problems.TASKS, "all"):
        chosen = np.array([task in ("all", row["columns"]["task"]) for row in rows])
        cells = [
            str(share(right[side][way][chosen])) for way in ("greedy", "sampled") for side in models
        ]
        yield f"| {chosen.sum()} of {task.replace('_', ' ')} | {' | '.join(cells)} |"
    yield from figure_lines([run])
    yield from ("", "| problem | before | after |", "|---|---|---|")
    for row in run.responses[:SHOWN_ANSWERS]:
        before = cell(row["before"]["responses"][0])
        yield f"| {cell(row['prompt'])} | {before} | {cell(row['after']['responses'][0])} |"


def answer(name: str, rows: list[dict], length: int) -> dict[str, np.ndarray]:
    """Let a model answer; return which responses are right, [prompts samples], by way."""
    model = inference.load(name, max_length=256)
    prompts = [row["prompt"] for row in rows]
    greedy = model.generate(prompts, temperature=0.0, max_tokens=length)
    sampled = model.generate(prompts, top_p=0.9, samples=SAMPLES, max_tokens=length)
    return {"greedy": are_right(greedy, rows), "sampled": are_right(sampled, rows)}


def are_right(responses: list[inference.Response], rows: list[dict]) -> np.ndarray:
    """Return which responses are right, [prompts samples]; those of a prompt are adjacent."""
    samples = len(responses) // len(rows)
    verdicts = [
        is_right(response.text, rows[number // samples]["columns"]["answer"])
        for number, response in enumerate(responses)
    ]
    return np.array(verdicts).reshape(len(rows), samples)


def share(right: np.ndarray) -> Share:
    """Return the share of right responses, [prompts samples].

    The interval of one sample is Wilson's. With several, prompts are what is independent.
    """
    mean = float(right.mean())
    if right.shape[1] == 1:
        low, high = intervals.wilson_interval(int(right.sum()), len(right))
        return Share(mean, low, high)
    half = intervals.half_width(right)
    return Share(mean, max(0.0, mean - half), min(1.0, mean + half))


def preference_lines(runs: list[records.Records], rm: str) -> Iterator[str]:
    """Yield the lines of the page: the reward model's accuracy, PPO's figures, some replies.

    The prompts shown are those whose scores the first run raised most, and least.
    """
    yield from accuracy_lines(rm)
    yield from figure_lines(runs)
    order = np.argsort([gain(row) for row in runs[0].responses])[::-1]
    after = " | ".join(map(after_label, runs))
    yield from ("", f"| prompt | before | {after} |", "|---|---|" + "---|" * len(runs))
    for number in (*order[:SHOWN_REPLIES], *order[-SHOWN_REPLIES:]):
        rows = [run.responses[number] for run in runs]
        sides = [rows[0]["before"], *(row["after"] for row in rows)]
        yield f"| {cell(rows[0]['prompt'])} | {' | '.join(map(scored_cell, sides))} |"


def after_label(run: records.Records) -> str:
    """Return the head of the column of a run."""
    return f"after, `ppo.kl_coef={run.config['ppo.kl_coef']}`"


def scored_cell(side: dict) -> str:
    """Return the first response of a side, with its score, as a cell."""
    return f"{cell(side['responses'][0])} {side['score'][0]:.2f}"


def accuracy_lines(name: str) -> Iterator[str]:
    """Yield the accuracy on held-out comparisons, of the model and of response lengths."""
    config = records.read(Path(name)).config
    model = inference.load(name)
    train = fitting_comparisons(model, config, "train")
    heldout = fitting_comparisons(model, config, "heldout")
    prompts = [row["prompt"] for row in heldout]
    chosen = np.array(model.score(prompts, [row["chosen"] for row in heldout]))
    rejected = np.array(model.score(prompts, [row["rejected"] for row in heldout]))
    extra = extra_characters(train)
    longer_is_better = (extra > 0).mean() > (extra < 0).mean()
    better_length = "longer" if longer_is_better else "shorter"
    sign = 1 if longer_is_better else -1
    yield f"| {len(heldout)} held-out comparisons | accuracy |"
    yield "|---|---|"
    yield f"| the reward model | {share((chosen > rejected)[:, None])} |"
    right = sign * extra_characters(heldout) > 0
    yield f"| the {better_length} response, as in training | {share(right[:, None])} |"
    yield "| chance | 50 % |"
    lengths = np.array([len(row["chosen"]) for row in heldout])
    correlation = np.corrcoef(chosen, lengths)[0, 1]
    yield ""
    yield f"Its score of a chosen reply correlates with the reply's length by {correlation:.2f}."


def fitting_comparisons(model: inference.LoadedModel, config: dict, split: str) -> list[dict]:
    """Return the comparisons of a run that are short enough for it."""
    options = sources.ReadOptions(
        seed=config["seed"], limit=config["data.examples"], data_dir=config["data.data_dir"]
    )
    return [
        row
        for source in sources.parse(config[f"data.{split}"])
        for row in sources.load(source.name, "comparisons", split, options)
        if fits(model, row, config["data.max_length"])
    ]


def fits(model: inference.LoadedModel, row: dict, max_length: int) -> bool:
    """Return whether both responses of a comparison, with their prompt, are short enough."""
    (prompt,) = model.encode([row["prompt"]])
    responses = model.encode_responses([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
    return len(prompt) + max(map(len, responses)) <= max_length


def extra_characters(rows: list[dict]) -> np.ndarray:
    """Return by how many characters each chosen response is longer than the rejected one."""
    return np.array([len(row["chosen"]) - len(row["rejected"]) for row in rows])


def figure_lines(runs: list[records.Records]) -> Iterator[str]:
    """Yield the figures on held-out data before PPO and after each run, and what a step took."""
    before = runs[0].summary
    heads = ["after"] if len(runs) == 1 else list(map(after_label, runs))
    yield from ("", f"| on held-out data, sampled | before | {' | '.join(heads)} |")
    yield "|---|---|" + "---|" * len(runs)
    for label, name in FIGURES.items():
        if f"{name}/before" in before:
            values = [before[f"{name}/before"], *(run.summary[f"{name}/after"] for run in runs)]
            yield f"| {label} | {' | '.join(f'{value:.2f}' for value in values)} |"
    sides = [responses_of(runs[0], "before"), *(responses_of(run, "after") for run in runs)]
    distinct = " | ".join(str(len(set(side))) for side in sides)
    yield f"| different responses of {len(sides[0])} | {distinct} |"
    environment = json.loads((runs[0].workdir / "environment.json").read_text())[-1]
    seconds = statistics.median(row["seconds"] for row in runs[0].timing)
    machine = f"{environment['devices']} device of kind {environment['device_kind']}"
    yield ""
    yield f"{before['steps']} steps on {machine}, the median step in {seconds:.0f} s."


def responses_of(run: records.Records, side: str) -> list[str]:
    """Return the responses of a side to the prompts of which a run keeps the responses."""
    return [response for row in run.responses for response in row[side]["responses"]]


def gain(row: dict) -> float:
    """Return how much higher the first response after PPO scores than the first one before."""
    return row["after"]["score"][0] - row["before"]["score"][0]


def cell(text: str) -> str:
    """Return a text as a cell of a table, in which nothing of it is markup."""
    plain = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{plain}`" if plain else "(empty)"


def draw(runs: list[records.Records], path: Path, score: str) -> None:
    """Draw how score, KL, length and entropy went over the steps of each run."""
    picture = Figure(figsize=(11, 2.4), layout="constrained")
    for axis, (label, name) in zip(picture.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for run, colour in zip(runs, COLOURS, strict=False):
            draw_curve(axis, run, name, colour)
        axis.set_title(score if label == "score" else label, fontsize=9)
        axis.set_xlabel("step")
    if len(runs) > 1:
        picture.axes[0].legend(fontsize=8)
    pictures.write_picture(path, picture, RESOLUTION)


def draw_curve(axis: Axes, run: records.Records, name: str, colour: str) -> None:
    """Draw a figure of each step as a dot, and the moving mean of them as a line."""
    steps = [row["step"] for row in run.metrics if name in row]
    values = [row[name] for row in run.metrics if name in row]
    width = min(SMOOTHING, len(values))
    label = f"kl_coef {run.config['ppo.kl_coef']}"
    axis.plot(steps, values, ".", color=colour, alpha=0.3)
    axis.plot(steps[width - 1 :], moving_mean(values, width), color=colour, label=label)


if __name__ == "__main__":
    main()
