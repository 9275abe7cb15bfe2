"""Answer held-out prompts by the best of n responses under a reward model, without training.

python -m alignjax.evals.best_answers --policy runs/sft --reward runs/rm --n 16 --out DIR

DIR/responses.jsonl has each prompt with its answer, and DIR/summary.json the mean figures by the
names of a PPO run's summary: this is the baseline that RLHF is to beat.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignjax import inference
from alignjax.config import UserError
from alignjax.data import sources, toy
from alignjax.evals import best_of
from alignjax.evals.best_of import BestResponse
from alignjax.machine import console, jsonl, output_directories, outputs
from alignjax.machine.arguments import Parser
from alignjax.machine.compilation_cache import keep_programs
from alignjax.machine.console import say
from alignjax.weights import locations

COMMAND = "alignjax.evals.best_answers"  # in the marker of a directory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, 0 or one of `machine.failures`."""
    return console.run_command(functools.partial(run, argv))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="python -m alignjax.evals.best_answers",
        description="Answer prompts by the best of n responses under a reward model.",
    )
    parser.add_argument("--policy", required=True, metavar="RUN", help="what samples responses")
    parser.add_argument("--reward", required=True, metavar="RUN", help="what chooses the best one")
    parser.add_argument(
        "--prompts",
        default="toy/prompts",
        metavar="SOURCE",
        help="held-out prompts: a source as in a config, or a file; default: toy/prompts",
    )
    parser.add_argument("--n", type=int, default=16, help="responses to a prompt; default: 16")
    parser.add_argument("--examples", type=int, default=0, help="how many prompts; default: all")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1")
    parser.add_argument("--top_p", type=float, default=0.9, help="default: 0.9")
    parser.add_argument(
        "--max_tokens", type=int, help="of a response; default: 256, or a quarter of max_length"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--overwrite", action="store_true", help="write into a directory with other files"
    )
    return parser.parse_args(argv)


def run(argv: Sequence[str] | None) -> None:
    """Answer the prompts that the arguments name, and write answers and figures."""
    arguments = parse_arguments(argv)
    best_of.check(arguments.n, arguments.temperature)
    keep_programs()
    out = Path(arguments.out)
    output_directories.check_directory(
        out, "--out", command=COMMAND, is_own=is_no_result, overwrite=arguments.overwrite
    )
    policy = inference.load(arguments.policy)
    reward = inference.load(arguments.reward)
    rows = load_prompts(arguments)
    say(f"best of {arguments.n}: {len(rows)} prompts of {arguments.prompts}")
    begin = time.monotonic()
    answers = best_of.generate(
        policy,
        reward,
        [row["prompt"] for row in rows],
        n=arguments.n,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=seed_of(arguments.policy),
    )
    seconds = round(time.monotonic() - begin, 1)
    entries = [describe(row, answer) for row, answer in zip(rows, answers, strict=True)]
    if arguments.prompts.startswith("toy/"):
        for entry in entries:
            entry["true_score"] = toy.true_score(entry["prompt"], entry["response"])
    summary = summarise(arguments.n, seconds, entries)
    write(out, summary, entries)
    say(console.table(f"best of {arguments.n}: {seconds} s", summary["table"]))


def is_no_result(directory: Path) -> bool:
    """Return that a directory without a marker is not ours: no earlier version wrote any."""
    return False


def load_prompts(arguments: argparse.Namespace) -> list[dict]:
    """Return the rows of the prompts to answer; UserError if there are none."""
    if arguments.examples < 0:
        raise UserError(f"--examples={arguments.examples} must not be below 0")
    options = sources.ReadOptions(seed=seed_of(arguments.policy), limit=arguments.examples, say=say)
    rows = sources.load(arguments.prompts, "prompts", "heldout", options)
    if not rows:
        raise UserError(f"--prompts {arguments.prompts}: there are no prompts to hold out")
    return rows


def seed_of(policy: str) -> int:
    """Return the seed of a run, which draws its embedded world; 0 for a checkpoint."""
    return locations.read_config(locations.local_directory(policy)).get("seed", 0)


def describe(row: dict, answer: BestResponse) -> dict[str, Any]:
    """Return a prompt with its answer and the scores of all candidates."""
    return {
        "prompt": row["prompt"][-1]["content"],
        "response": answer.response.text,
        "score": answer.score,
        "length": len(answer.response.tokens),
        "truncated": answer.response.truncated,
        "scores": list(answer.scores),
    }


def summarise(n: int, seconds: float, entries: list[dict]) -> dict[str, Any]:
    """Return the content of summary.json: the means, and the bound of the KL to the policy."""
    names = ("true_score", "score", "length", "truncated")
    figures = {
        f"{name}/after": float(np.mean([entry[name] for entry in entries]))
        for name in names
        if name in entries[0]
    }
    figures["score/before"] = float(np.mean([entry["scores"] for entry in entries]))
    figures["kl/after"] = best_of.kl_bound(n)
    return {
        "name": f"best-of-{n}",
        "stage": "best_of",
        "steps": 0,
        "training_seconds": 0.0,
        "answering_seconds": seconds,
        **figures,
        "table": [[name, f"{value:.3f}"] for name, value in figures.items()],
    }


def write(out: Path, summary: dict[str, Any], entries: list[dict]) -> None:
    """Write the answers, and then the summary, which marks them as complete."""
    output_directories.claim_directory(out, COMMAND)
    outputs.write_text(out / "responses.jsonl", jsonl.dumps(entries))
    outputs.write_text(out / "summary.json", json.dumps(summary, indent=1))


if __name__ == "__main__":
    sys.exit(main())
