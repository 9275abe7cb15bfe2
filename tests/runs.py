"""What tests of whole runs share: the tiny chain's commands, and what of a run must repeat to the bit."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np

from alignjax import train
from alignjax.weights import checkpoint

ROOT = Path(__file__).resolve().parent.parent
PARENTS = {
    "lm-tiny": [],
    "sft-tiny": ["lm-tiny"],
    "rm-tiny": ["pmp-tiny"],
    "ppo-tiny": ["sft-tiny", "rm-tiny"],
}
STEPS = 4


def command(name, runs, *more):
    return [
        "--config",
        f"{name.removesuffix('-tiny')}.py:tiny",
        "--workdir",
        str(runs / name),
        *more,
    ]


def files_of(run: Path, steps: int = STEPS) -> dict:
    """What must repeat to the bit: metrics, samples, evaluations and responses if there are any, summary (less its
    seconds), every array of the last checkpoint."""
    names = ["metrics.jsonl", "samples.jsonl", "config.json"]
    names += [name for name in ("evaluations.jsonl", "responses.jsonl") if (run / name).exists()]
    out = {name: (run / name).read_bytes() for name in names}
    out["summary"] = {
        k: v
        for k, v in json.loads((run / "summary.json").read_text()).items()
        if "seconds" not in k
    }
    checkpoints = checkpoint.Checkpoints(run / "checkpoints", None)
    assert checkpoints.latest() == steps
    items = [
        p.name
        for p in (run / "checkpoints" / str(steps)).iterdir()
        if p.is_dir() and p.name not in ("metrics", "checksums")
    ]
    restored = checkpoints.manager.restore(
        steps,
        args=checkpoint.ocp.args.Composite(
            **{item: checkpoint.ocp.args.StandardRestore() for item in items}
        ),
    )
    checkpoints.close()
    for item in items:
        for path, x in jax.tree_util.tree_leaves_with_path(restored[item]):
            out[item + jax.tree_util.keystr(path)] = np.asarray(x).tobytes()
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_parents(name, chain_runs: Path, runs: Path) -> Path:
    for parent in PARENTS[name]:
        shutil.copytree(chain_runs / parent, runs / parent)
    return runs


def cut(run: Path, other: Path) -> None:
    """Make a copy of a run as it was after its checkpoint of step 2."""
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints" / str(STEPS))
    (other / "summary.json").unlink()


def fails(capsys, *arguments) -> str:
    """The one line on standard error of a command that a mistake stops."""
    assert train.main(list(arguments)) == 2
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line and "%|" not in line]  # but for the bar
    assert len(lines) == 1 and lines[0].startswith("alignjax: "), printed
    return lines[0]
