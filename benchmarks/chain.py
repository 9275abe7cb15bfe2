"""The whole chain on the embedded world for several seeds: the README's table and picture.

python benchmarks/chain.py                 runs/seeds/N/..., then runs/seeds/summary.json, docs/chain.png
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from alignjax.machine import jsonl  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CLEAN = "accuracy/toy/comparisons-clean"
FIGURES = {  # name -> (run, figure of its summary.json, factor)
    "RM accuracy, held-out clean comparisons, %": ("rm", CLEAN, 100),
    "the same without PMP, %": ("rm-no-pmp", CLEAN, 100),
    "true score of the SFT policy (best 1)": ("ppo", "true_score/before", 1),
    "true score after PPO": ("ppo", "true_score/after", 1),
    "share of the distance to the best closed, %": ("ppo", "gap_closed", 100),
    "reward model's score before": ("ppo", "score/before", 1),
    "reward model's score after": ("ppo", "score/after", 1),
    "KL to the reference after, nats a response": ("ppo", "kl/after", 1),
    "response length before, tokens": ("ppo", "length/before", 1),
    "response length after, tokens": ("ppo", "length/after", 1),
    "entropy before, nats a token": ("ppo", "entropy/before", 1),
    "entropy after, nats a token": ("ppo", "entropy/after", 1),
    "loss on held-out pretraining text before, nats": ("ppo", "pretrain_loss/before", 1),
    "loss on held-out pretraining text after, nats": ("ppo", "pretrain_loss/after", 1),
}


def train(config: str, seed: int, workdir: Path) -> float:
    """Seconds that a command took, from start to end; 0 where its run was there already."""
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


def chain(runs: Path, seed: int) -> dict:
    """All figures of one seed; seconds of the main command are kept beside the runs."""
    kept = runs / "seconds.json"
    seconds = train("ppo.py", seed, runs / "ppo")
    if not kept.exists():
        kept.write_text(json.dumps(seconds))
    train("rm.py:no_pmp", seed, runs / "rm-no-pmp")
    summaries = {
        name: json.loads((runs / name / "summary.json").read_text())
        for name in ("rm", "rm-no-pmp", "ppo")
    }
    figures = {text: factor * summaries[run][name] for text, (run, name, factor) in FIGURES.items()}
    return figures | {"the whole chain, minutes": json.loads(kept.read_text()) / 60}


def curves(axes, runs: Path, seed: int) -> None:
    rows = jsonl.read(runs / "ppo" / "metrics.jsonl")
    names = (
        "objective/true_score",
        "objective/scores",
        "objective/kl",
        "policy/entropy_avg",
        "response/length_mean",
        "loss/pretrain_avg",
    )
    for axis, name in zip(axes.flat, names, strict=True):
        x, y = zip(*((row["step"], row[name]) for row in rows if name in row), strict=True)
        width = max(1, len(y) // 20)
        smooth = np.convolve(y, np.ones(width) / width, "valid")
        axis.plot(x[width - 1 :], smooth, label=f"seed {seed}", linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "chain.png")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    found = []
    for seed in range(arguments.seeds):
        runs = arguments.runs.absolute() / str(seed)
        runs.mkdir(parents=True, exist_ok=True)
        found.append(chain(runs, seed))
        curves(axes, runs, seed)
    axes.flat[0].legend(fontsize=7)
    for axis in axes[1]:
        axis.set_xlabel("PPO step", fontsize=8)
    figure.savefig(arguments.picture, dpi=110)
    summary = {
        k: {
            "mean": float(np.mean(v)),
            "std": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0,
            "values": v,
        }
        for k in found[0]
        for v in [[one[k] for one in found]]
    }
    (arguments.runs / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"| mean of {len(found)} seeds | | deviation |\n|---|---|---|")
    for name, value in summary.items():
        print(f"| {name} | {value['mean']:.3g} | {value['std']:.2g} |")


if __name__ == "__main__":
    main()
