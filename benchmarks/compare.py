"""Ours beside what a user would run instead, in turn, on one machine: medians and the ratio of each pair of runs.

python benchmarks/compare.py --trl PYTHON --tunix PYTHON [--rows ppo-tiny,rm-small] [--rounds N] [--out FILE]

PYTHON is the interpreter of an environment that has the peer (see peers/). Each round runs ours, then each peer of the
row, one after the other; every run prints its own median over some iterations. "best" is torch with the switches that
its users may know: MKL's fast path on AMD, memory kept rather than given back, compiled or grouped by length.
A ratio above 1 says how many times as fast ours is.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
SECONDS, RATE = ("s", -1), ("tokens/s", 1)  # unit, and whether more is better


def ppo(size: str, iterations: int, mean: int = 0) -> dict:
    more = [str(mean)] if mean else []
    return {
        "unit": SECONDS,
        "figure": r"(?:seconds_per_iteration) (\[.*?\])",
        "ours": [
            "ppo.py",
            size,
            "--iterations",
            str(iterations),
            *(["--mean-length", str(mean)] if mean else []),
        ],
        "TRL": ["trl", "trl_ppo.py", size, str(iterations + 1), *more],
        "TRL at best": ["best", "trl_ppo.py", size, str(iterations + 1), *more],
        "Tunix": ["tunix", "tunix_ppo.py", size, str(iterations + 2), "match", *more],
    }


def rm(size: str, steps: int, budget: int) -> dict:
    return {
        "unit": RATE,
        "figure": r"real_tokens_per_s ([\d.]+)",
        "ours": ["ranking.py", size, "--steps", str(steps), "--microbatch-tokens", str(budget)],
        "TRL": ["trl", "trl_rm.py", size, str(steps), "random"],
        "TRL at best": ["best", "trl_rm.py", size, str(steps), "grouped"],
    }


def sampling(size: str, repeats: int) -> dict:
    return {
        "unit": RATE,
        "figure": r"new_tokens_per_s best/median [\d.]+ ([\d.]+)",
        "ours": ["sampling.py", size, "--repeats", str(repeats)],
        "transformers": ["trl", "hf_generate.py", size, str(repeats), "static"],
        "transformers at best": ["best", "hf_generate.py", size, str(repeats), "static", "compile"],
    }


ROWS = {
    "ppo-tiny": ppo("tiny", 5),
    "ppo-small": ppo("small", 3),
    "ppo-small-random-ends": ppo("small", 3, 24),
    "rm-tiny": rm("tiny", 30, 2048),
    "rm-small": rm("small", 12, 2048),
    "sampling-tiny": sampling("tiny", 3),
    "sampling-small": sampling("small", 2),
}


def figure(row: dict, command: list[str], pythons: dict) -> float:
    """What one run gives: the median of its iterations."""
    environment = dict(os.environ)
    if command is row["ours"]:
        line = [sys.executable, str(HERE / command[0]), *command[1:]]
        environment["PYTHONPATH"] = str(HERE.parent)
    else:
        line = [pythons[command[0]], str(HERE / "peers" / command[1]), *command[2:]]
        if command[0] == "best":
            environment |= MEMORY | {"LD_PRELOAD": str(fast_mkl())}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    found = re.findall(row["figure"], done.stdout)
    if done.returncode or not found:
        raise SystemExit(f"{' '.join(line)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    value = json.loads(found[-1])
    return statistics.median(value) if isinstance(value, list) else value


def fast_mkl() -> Path:
    """A library that has MKL take its fast path on any processor."""
    path = Path(tempfile.gettempdir()) / "alignjax-fast-mkl.so"
    if not path.exists():
        source = "int mkl_serv_intel_cpu_true(void){return 1;}"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-xc", "-o", str(path), "-"],
            input=source,
            text=True,
            check=True,
        )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trl", required=True, help="interpreter with torch, transformers and TRL 1.9"
    )
    parser.add_argument("--tunix", required=True, help="interpreter with Tunix")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    pythons, results = {"trl": a.trl, "best": a.trl, "tunix": a.tunix}, {}
    print("| work | ours | peer | its figure | ratio |\n|---|---|---|---|---|")
    for name in a.rows.split(","):
        row = ROWS[name]
        unit, sign = row["unit"]
        sides = {side: command for side, command in row.items() if side not in ("unit", "figure")}
        runs = [
            {side: figure(row, command, pythons) for side, command in sides.items()}
            for _ in range(a.rounds)
        ]
        results[name] = runs
        for side in list(sides)[1:]:
            ratio = statistics.median((run["ours"] / run[side]) ** sign for run in runs)
            ours, theirs = (statistics.median(run[x] for run in runs) for x in ("ours", side))
            print(
                f"| {name} | {ours:.4g} {unit} | {side} | {theirs:.4g} {unit} | {ratio:.2f} |",
                flush=True,
            )
        if a.out:
            a.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
