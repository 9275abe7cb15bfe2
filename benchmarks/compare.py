"""Compare ours with the alternatives, in turn, on one machine: medians, and ratios of paired runs.

python benchmarks/compare.py --trl PYTHON --tunix PYTHON [--rows ppo-tiny,rm-small] [--rounds N]

PYTHON is the interpreter of an environment that has the peer (see peers/). --out FILE keeps all
figures. Each round runs ours, then each peer of the row, one after the other. Every run prints its
own median over some iterations. "best" is torch with the switches that its users may know: MKL's
fast path on AMD, memory that is kept instead of given back, compilation or grouping by length. A
ratio above 1 says how many times as fast ours is.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Have the C library keep memory instead of giving it back.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


@dataclass(frozen=True)
class Unit:
    """A unit of measurement, and the sign of the exponent that makes more mean faster."""

    name: str
    sign: int


@dataclass(frozen=True)
class Peer:
    """A script of peers/, its words, and the environment that runs it: trl, best or tunix."""

    environment: str
    script: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: our script with its words, and the peers to compare with."""

    unit: Unit
    pattern: str  # finds the figure in what a script prints
    ours: tuple[str, ...]
    peers: dict[str, Peer]


SECONDS = Unit("s", -1)
RATE = Unit("tokens/s", 1)


def ppo(size: str, iterations: int, mean_length: int = 0) -> Row:
    """Return the row of PPO iterations; with a mean length, responses end at random."""
    option = ("--mean-length", str(mean_length)) if mean_length else ()
    word = (str(mean_length),) if mean_length else ()
    trl_words = (size, str(iterations + 1), *word)
    return Row(
        unit=SECONDS,
        pattern=r"(?:seconds_per_iteration) (\[.*?\])",
        ours=("ppo.py", size, "--iterations", str(iterations), *option),
        peers={
            "TRL": Peer("trl", "trl_ppo.py", trl_words),
            "TRL at best": Peer("best", "trl_ppo.py", trl_words),
            "Tunix": Peer("tunix", "tunix_ppo.py", (size, str(iterations + 2), "match", *word)),
        },
    )


def reward_model(size: str, steps: int, microbatch_tokens: int) -> Row:
    options = ("--steps", str(steps), "--microbatch-tokens", str(microbatch_tokens))
    return Row(
        unit=RATE,
        pattern=r"real_tokens_per_s ([\d.]+)",
        ours=("ranking.py", size, *options),
        peers={
            "TRL": Peer("trl", "trl_rm.py", (size, str(steps), "random")),
            "TRL at best": Peer("best", "trl_rm.py", (size, str(steps), "grouped")),
        },
    )


def sampling(size: str, repeats: int) -> Row:
    words = (size, str(repeats), "static")
    return Row(
        unit=RATE,
        pattern=r"new_tokens_per_s best/median [\d.]+ ([\d.]+)",
        ours=("sampling.py", size, "--repeats", str(repeats)),
        peers={
            "transformers": Peer("trl", "hf_generate.py", words),
            "transformers at best": Peer("best", "hf_generate.py", (*words, "compile")),
        },
    )


ROWS = {
    "ppo-tiny": ppo("tiny", 5),
    "ppo-small": ppo("small", 3),
    "ppo-small-random-ends": ppo("small", 3, 24),
    "rm-tiny": reward_model("tiny", 30, 2048),
    "rm-small": reward_model("small", 12, 2048),
    "sampling-tiny": sampling("tiny", 3),
    "sampling-small": sampling("small", 2),
}


def run_row(row: Row, pythons: dict[str, str]) -> dict[str, float]:
    """Run ours and each peer once; return the figure of each."""
    figures = {"ours": run_ours(row)}
    for name, peer in row.peers.items():
        figures[name] = run_peer(row, peer, pythons)
    return figures


def run_ours(row: Row) -> float:
    script, *words = row.ours
    command = [sys.executable, str(HERE / script), *words]
    return measure(command, {"PYTHONPATH": str(HERE.parent)}, row.pattern)


def run_peer(row: Row, peer: Peer, pythons: dict[str, str]) -> float:
    command = [pythons[peer.environment], str(HERE / "peers" / peer.script), *peer.words]
    variables = {}
    if peer.environment == "best":
        variables = KEEP_MEMORY | {"LD_PRELOAD": str(fast_mkl())}
    return measure(command, variables, row.pattern)


def measure(command: list[str], variables: dict[str, str], pattern: str) -> float:
    """Return the figure that a command prints; of a list of iterations the median."""
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    figures = re.findall(pattern, done.stdout)
    if done.returncode or not figures:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    value = json.loads(figures[-1])
    return statistics.median(value) if isinstance(value, list) else value


def fast_mkl() -> Path:
    """Return a library that makes MKL take its fast path on any processor."""
    path = Path(tempfile.gettempdir()) / "alignjax-fast-mkl.so"
    if not path.exists():
        source = "int mkl_serv_intel_cpu_true(void){return 1;}"
        command = ["gcc", "-shared", "-fPIC", "-xc", "-o", str(path), "-"]
        subprocess.run(command, input=source, text=True, check=True)
    return path


def print_row(name: str, row: Row, rounds: list[dict[str, float]]) -> None:
    unit = row.unit
    ours = statistics.median(figures["ours"] for figures in rounds)
    for peer in row.peers:
        theirs = statistics.median(figures[peer] for figures in rounds)
        ratios = [(figures["ours"] / figures[peer]) ** unit.sign for figures in rounds]
        print(
            f"| {name} | {ours:.4g} {unit.name} | {peer} | {theirs:.4g} {unit.name} "
            f"| {statistics.median(ratios):.2f} |",
            flush=True,
        )


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
    arguments = parser.parse_args()
    pythons = {"trl": arguments.trl, "best": arguments.trl, "tunix": arguments.tunix}
    results = {}
    print("| work | ours | peer | its figure | ratio |\n|---|---|---|---|---|")
    for name in arguments.rows.split(","):
        row = ROWS[name]
        results[name] = [run_row(row, pythons) for _ in range(arguments.rounds)]
        print_row(name, row, results[name])
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
