"""Run the whole chain on the embedded world for several seeds: the README's table and picture.

python benchmarks/chain.py

The runs go to runs/seeds/N/, the figures to runs/seeds/summary.json, the picture to docs/chain.png.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from alignjax.machine import jsonl  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CLEAN = "accuracy/toy/comparisons-clean"
SMOOTHING = 20  # a curve is a moving mean over this part of its steps


@dataclass(frozen=True)
class Figure:
    """A figure of a run's summary.json."""

    run: str
    name: str
    factor: float = 1


FIGURES = {
    "RM accuracy, held-out clean comparisons, %": Figure("rm", CLEAN, 100),
    "the same without PMP, %": Figure("rm-no-pmp", CLEAN, 100),
    "true score of the SFT policy (best 1)": Figure("ppo", "true_score/before"),
    "true score after PPO": Figure("ppo", "true_score/after"),
    "share of the distance to the best closed, %": Figure("ppo", "gap_closed", 100),
    "reward model's score before": Figure("ppo", "score/before"),
    "reward model's score after": Figure("ppo", "score/after"),
    "KL to the reference after, nats a response": Figure("ppo", "kl/after"),
    "response length before, tokens": Figure("ppo", "length/before"),
    "response length after, tokens": Figure("ppo", "length/after"),
    "entropy before, nats a token": Figure("ppo", "entropy/before"),
    "entropy after, nats a token": Figure("ppo", "entropy/after"),
    "loss on held-out pretraining text before, nats": Figure("ppo", "pretrain_loss/before"),
    "loss on held-out pretraining text after, nats": Figure("ppo", "pretrain_loss/after"),
}
CURVES = (
    "objective/true_score",
    "objective/scores",
    "objective/kl",
    "policy/entropy_avg",
    "response/length_mean",
    "loss/pretrain_avg",
)


def train(config: str, seed: int, workdir: Path) -> float:
    """Run a command, and return its seconds from start to end: 0 if its run was there already."""
    if (workdir / "summary.json").exists():
        return 0.0
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
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return time.perf_counter() - start


def run_chain(runs: Path, seed: int) -> dict[str, float]:
    """Return all figures of a seed; the seconds of the main command are kept next to the runs."""
    kept_seconds = runs / "seconds.json"
    seconds = train("ppo.py", seed, runs / "ppo")
    if not kept_seconds.exists():
        kept_seconds.write_text(json.dumps(seconds))
    train("rm.py:no_pmp", seed, runs / "rm-no-pmp")
    summaries = {
        name: json.loads((runs / name / "summary.json").read_text())
        for name in ("rm", "rm-no-pmp", "ppo")
    }
    figures = {
        label: figure.factor * summaries[figure.run][figure.name]
        for label, figure in FIGURES.items()
    }
    return figures | {"the whole chain, minutes": json.loads(kept_seconds.read_text()) / 60}


def draw_curves(axes: np.ndarray, runs: Path, seed: int) -> None:
    rows = jsonl.read(runs / "ppo" / "metrics.jsonl")
    for axis, name in zip(axes.flat, CURVES, strict=True):
        steps = [row["step"] for row in rows if name in row]
        values = [row[name] for row in rows if name in row]
        width = max(1, len(values) // SMOOTHING)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(steps[width - 1 :], smooth, label=f"seed {seed}", linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)


def summarise(values: list[float]) -> dict:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": deviation, "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "chain.png")
    arguments = parser.parse_args()
    picture, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    figures = []
    for seed in range(arguments.seeds):
        runs = arguments.runs.absolute() / str(seed)
        runs.mkdir(parents=True, exist_ok=True)
        figures.append(run_chain(runs, seed))
        draw_curves(axes, runs, seed)
    axes.flat[0].legend(fontsize=7)
    for axis in axes[1]:
        axis.set_xlabel("PPO step", fontsize=8)
    picture.savefig(arguments.picture, dpi=110)
    summary = {label: summarise([of_seed[label] for of_seed in figures]) for label in figures[0]}
    (arguments.runs / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"| mean of {len(figures)} seeds | | deviation |\n|---|---|---|")
    for label, values in summary.items():
        print(f"| {label} | {values['mean']:.3g} | {values['std']:.2g} |")


if __name__ == "__main__":
    main()
