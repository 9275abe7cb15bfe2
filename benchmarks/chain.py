"""Run the whole chain on the embedded world for several seeds: the README's tables and picture.

python benchmarks/chain.py

The runs go to runs/seeds/N/, the figures to runs/seeds/summary.json, the picture to docs/chain.png.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from alignjax.machine import jsonl  # noqa: E402
from alignjax.reports import study_results  # noqa: E402
from alignjax.reports.study_picture import moving_mean  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
Table = dict[str, dict[str, list[float]]]  # row -> column -> values of the seeds
SMOOTHING = 20  # a curve is a moving mean over this part of its steps


@dataclass(frozen=True)
class Figure:
    """A figure of PPO's summary.json that has a value before and one after."""

    name: str
    factor: float = 1


RANKERS = {"PMP": "pmp", "PMP, then RM": "rm", "RM alone": "rm-no-pmp"}
SETS = {"clean pairs": "toy/comparisons-clean", "noisy pairs": "toy/comparisons-noisy"}
# Figures of PPO before and after, with what they are multiplied by.
FIGURES = {
    "true score, sampled, %": Figure("true_score", 100),
    "true score, greedy, %": Figure("true_score_greedy", 100),
    "right words, sampled, %": Figure("right_words", 100),
    "right words, greedy, %": Figure("right_words_greedy", 100),
    "reward model's score": Figure("score"),
    "KL to the reference, nats a response": Figure("kl"),
    "response length, tokens": Figure("length"),
    "entropy, nats a token": Figure("entropy"),
    "loss on held-out text, nats a token": Figure("pretrain_loss"),
}
CURVES = (
    "objective/true_score",
    "objective/scores",
    "objective/kl",
    "policy/entropy_avg",
    "response/length_mean",
    "loss/pretrain_avg",
)


def train(config: str, seed: int, workdir: Path) -> None:
    """Train a config, unless its run is complete."""
    if (workdir / "summary.json").exists():
        return
    command = [
        sys.executable,
        "-m",
        "alignjax.train",
        "--config",
        config,
        f"--config.seed={seed}",
        "--workdir",
        workdir,
    ]
    subprocess.run(command, cwd=ROOT, check=True)


def run_chain(runs: Path, seed: int) -> dict[str, dict]:
    """Train all runs of a seed, and return their summaries by name."""
    train("ppo.py", seed, runs / "ppo")
    train("rm.py:no_pmp", seed, runs / "rm-no-pmp")
    names = [*RANKERS.values(), "ppo"]
    return {name: json.loads((runs / name / "summary.json").read_text()) for name in names}


def draw_curves(axes: np.ndarray, runs: Path, seed: int) -> None:
    rows = jsonl.read(runs / "ppo" / "metrics.jsonl")
    for axis, name in zip(axes.flat, CURVES, strict=True):
        steps = [row["step"] for row in rows if name in row]
        values = [row[name] for row in rows if name in row]
        width = max(1, len(values) // SMOOTHING)
        smooth = moving_mean(values, width)
        axis.plot(steps[width - 1 :], smooth, label=f"seed {seed}", linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)


def accuracy_table(seeds: list[dict]) -> Table:
    """Return the held-out accuracy of each ranking model on each set, in %."""
    table = {}
    for label, run in RANKERS.items():
        table[label] = {
            title: [100 * of_seed[run][f"accuracy/{source}"] for of_seed in seeds]
            for title, source in SETS.items()
        }
    return table


def policy_table(seeds: list[dict]) -> Table:
    """Return the figures of the policy before PPO and after."""
    table = {}
    for label, figure in FIGURES.items():
        table[label] = {
            title: [figure.factor * of_seed["ppo"][f"{figure.name}/{side}"] for of_seed in seeds]
            for title, side in (("SFT", "before"), ("PPO", "after"))
        }
    return table


def print_table(title: str, table: Table) -> None:
    """Print a table as Markdown."""
    columns = list(next(iter(table.values())))
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for label, row in table.items():
        cells = map(study_results.mean_cell, row.values())
        print(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "chain.png")
    arguments = parser.parse_args()
    picture, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    seeds = []
    for seed in range(arguments.seeds):
        runs = arguments.runs.absolute() / str(seed)
        runs.mkdir(parents=True, exist_ok=True)
        seeds.append(run_chain(runs, seed))
        draw_curves(axes, runs, seed)
    axes.flat[0].legend(fontsize=7)
    for axis in axes[1]:
        axis.set_xlabel("PPO step", fontsize=8)
    picture.savefig(arguments.picture, dpi=110)
    tables = {
        "held-out accuracy, %": accuracy_table(seeds),
        "policy": policy_table(seeds),
    }
    (arguments.runs / "summary.json").write_text(json.dumps(tables, indent=1) + "\n")
    for title, table in tables.items():
        print_table(title, table)
    print(f"\nmean of {len(seeds)} seeds ± half of its 95 % interval")


if __name__ == "__main__":
    main()
