"""Measure the runs of docs/real_model.md: write the page's tables and replies, draw its pictures.

python benchmarks/real_model.py arithmetic --run runs/smollm2-arithmetic
python benchmarks/real_model.py preferences --rm runs/smollm2-rm --run runs/smollm2-ppo

`arithmetic` lets the model before and after PPO answer the held-out problems, greedily and with
top-p 0.9. `preferences` lets the reward model score the held-out comparisons, beside a rule that
knows only which response is longer, and shows what PPO made of the replies.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
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
SHOWN_REPLIES = 3  # of the largest gains in score, and of the largest losses
SHOWN_ANSWERS = 9
RESOLUTION = 80  # dots an inch
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
    run = records.read(arguments.run)
    if not run.summary:
        sys.exit(f"{arguments.run}: this run is not complete; repeat the command that started it")
    picture = arguments.page.with_name(f"real_model_{arguments.command}.png")
    if arguments.command == "arithmetic":
        lines = arithmetic_lines(run)
        draw(run, picture, "share of right answers")
    else:
        lines = preference_lines(run, arguments.rm)
        draw(run, picture, "reward model's score")
    text = "\n".join([*lines, "", f"![The run of PPO, step by step]({picture.name})"])
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
        command.add_argument("--run", type=Path, required=True, help="the run of PPO")
        command.add_argument("--page", type=Path, default=page, help="default: docs/real_model.md")
    preferences.add_argument("--rm", required=True, help="the run of the reward model")
    return parser


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
    yield from figure_lines(run)
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


def preference_lines(run: records.Records, rm: str) -> Iterator[str]:
    """Yield the lines of the page: the reward model's accuracy, PPO's figures, some replies."""
    yield from accuracy_lines(rm)
    yield from figure_lines(run)
    gains = [gain(row) for row in run.responses]
    order = np.argsort(gains)[::-1]
    yield from ("", "| prompt | before | after | score |", "|---|---|---|---|")
    for number in (*order[:SHOWN_REPLIES], *order[-SHOWN_REPLIES:]):
        row = run.responses[number]
        before = row["before"]
        after = row["after"]
        scores = f"{before['score'][0]:.2f} -> {after['score'][0]:.2f}"
        replies = f"{cell(before['responses'][0])} | {cell(after['responses'][0])}"
        yield f"| {cell(row['prompt'])} | {replies} | {scores} |"


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


def figure_lines(run: records.Records) -> Iterator[str]:
    """Yield the figures on held-out data before and after PPO, and what a step took."""
    summary = run.summary
    yield from ("", "| on held-out data, sampled | before | after |", "|---|---|---|")
    for label, name in FIGURES.items():
        if f"{name}/before" in summary:
            before = summary[f"{name}/before"]
            after = summary[f"{name}/after"]
            yield f"| {label} | {before:.2f} | {after:.2f} |"
    environment = json.loads((run.workdir / "environment.json").read_text())[-1]
    seconds = statistics.median(row["seconds"] for row in run.timing)
    machine = f"{environment['devices']} device of kind {environment['device_kind']}"
    yield ""
    yield f"{summary['steps']} steps on {machine}, the median step in {seconds:.0f} s."


def gain(row: dict) -> float:
    """Return how much higher the first response after PPO scores than the first one before."""
    return row["after"]["score"][0] - row["before"]["score"][0]


def cell(text: str) -> str:
    """Return a text as a cell of a table, in which nothing of it is markup."""
    plain = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{plain}`" if plain else "(empty)"


def draw(run: records.Records, path: Path, score: str) -> None:
    """Draw how score, KL, length and entropy went over the steps, as moving means."""
    picture = Figure(figsize=(11, 2.4), layout="constrained")
    for axis, (label, name) in zip(picture.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        steps = [row["step"] for row in run.metrics if name in row]
        values = [row[name] for row in run.metrics if name in row]
        width = min(SMOOTHING, len(values))
        axis.plot(steps, values, ".", color="0.7")
        axis.plot(steps[width - 1 :], moving_mean(values, width), color="#0072b2")
        axis.set_title(score if label == "score" else label, fontsize=9)
        axis.set_xlabel("step")
    pictures.write_picture(path, picture, RESOLUTION)


if __name__ == "__main__":
    main()
