"""Write problems whose answers can be checked: prompts in plain English, for PPO.

python -m alignjax.data.problems --out data/problems

DIR/train.jsonl and DIR/heldout.jsonl have rows with a prompt, its answer and its task: sums of
one-digit numbers, sums of two-digit numbers, and the last word of a list. What is held out never
occurs in training, in either order of a sum, and held-out lists have words of their own. The same
seed gives the same files.
"""

import argparse
import functools
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignjax.config import UserError
from alignjax.machine import jsonl, output_directories, outputs
from alignjax.machine.arguments import Parser
from alignjax.machine.console import run_command, say

COMMAND = "alignjax.data.problems"  # in the marker of a directory
TASKS = ("one_digit", "two_digits", "last_word")
WORDS = (
    "apple river chair music window garden pencil coffee bridge yellow mountain rabbit paper "
    "silver candle winter bottle horse market doctor ticket flower engine pocket lemon castle "
    "summer basket letter island hammer kitchen planet button forest orange mirror station "
    "blanket dragon carrot village jacket copper tiger bread needle camera butter pirate tunnel "
    "feather desert piano banana ladder circus helmet ocean turtle"
).split()
SHORTEST_LIST = 3
LONGEST_LIST = 5
HELDOUT_SHARE_OF_WORDS = 0.3
# Sums of two one-digit numbers in either order: there are only 55 of them.
HELDOUT_ONE_DIGIT_SUMS = 22


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Rows to train on and to hold out."""

    train: list[dict]
    heldout: list[dict]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, 0 or one of `machine.failures`."""
    return run_command(functools.partial(run, argv))


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description="Write problems whose answers can be checked, to train on and to hold out.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--train", type=int, default=120, help="problems of each task to train on; default: 120"
    )
    parser.add_argument(
        "--heldout", type=int, default=40, help="problems of each task to hold out; default: 40"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--overwrite", action="store_true", help="write into a directory with other files"
    )
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Write the files that the arguments ask for."""
    arguments = argument_parser().parse_args(argv)
    for name, count in (("train", arguments.train), ("heldout", arguments.heldout)):
        if count < 1:
            raise UserError(f"--{name}={count} must be at least 1")
    out = Path(arguments.out)
    output_directories.check_directory(out, "--out", command=COMMAND, overwrite=arguments.overwrite)
    problems = make(arguments.seed, arguments.train, arguments.heldout)
    output_directories.claim_directory(out, COMMAND)
    for name, rows in (("train", problems.train), ("heldout", problems.heldout)):
        outputs.write_text(out / f"{name}.jsonl", jsonl.dumps(rows))
        counts = ", ".join(f"{count_of(task, rows)} {task}" for task in TASKS)
        say(f"{out / name}.jsonl: {len(rows)} problems: {counts}")


def count_of(task: str, rows: list[dict]) -> int:
    """Return how many rows are of a task."""
    return sum(row["task"] == task for row in rows)


def make(seed: int, train: int, heldout: int) -> Problems:
    """Return at most so many problems of each task to train on, and to hold out.

    The tasks take turns, so the first rows have all of them. There are no more than 67 one-digit
    sums to train on and 43 to hold out.
    """
    generator = random.Random(seed)
    makers = {
        "one_digit": one_digit_sums,
        "two_digits": two_digit_sums,
        "last_word": lists_of_words,
    }
    train_rows = []
    heldout_rows = []
    for task in TASKS:
        problems = makers[task](generator, train, heldout)
        train_rows.append([row | {"task": task} for row in problems.train[:train]])
        heldout_rows.append([row | {"task": task} for row in problems.heldout[:heldout]])
    return Problems(train=list(taking_turns(train_rows)), heldout=list(taking_turns(heldout_rows)))


def taking_turns(rows_of_tasks: list[list[dict]]) -> Iterator[dict]:
    """Yield a row of each task, then another of each, until none is left."""
    for turn in itertools.zip_longest(*rows_of_tasks):
        yield from (row for row in turn if row is not None)


def one_digit_sums(generator: random.Random, train: int, heldout: int) -> Problems:
    """Return the sums of two one-digit numbers, all of them, in both orders."""
    pairs = list(itertools.combinations_with_replacement(range(10), 2))
    generator.shuffle(pairs)
    return Problems(
        train=both_orders(generator, pairs[HELDOUT_ONE_DIGIT_SUMS:]),
        heldout=both_orders(generator, pairs[:HELDOUT_ONE_DIGIT_SUMS]),
    )


def both_orders(generator: random.Random, pairs: list[tuple[int, int]]) -> list[dict]:
    """Return the sums of pairs of numbers in both orders, shuffled."""
    ordered = sorted({order for pair in pairs for order in itertools.permutations(pair)})
    generator.shuffle(ordered)
    return [sum_of(first, second) for first, second in ordered]


def two_digit_sums(generator: random.Random, train: int, heldout: int) -> Problems:
    """Return sums of two two-digit numbers, each pair in one order only."""
    pairs = list(itertools.combinations_with_replacement(range(10, 100), 2))
    rows = []
    for pair in generator.sample(pairs, min(train + heldout, len(pairs))):
        first, second = generator.sample(pair, 2)
        rows.append(sum_of(first, second))
    return Problems(train=rows[heldout:], heldout=rows[:heldout])


def sum_of(first: int, second: int) -> dict:
    """Return a row that asks for a sum."""
    prompt = f"What is {first} + {second}? Answer with just the number."
    return {"prompt": prompt, "answer": str(first + second)}


def lists_of_words(generator: random.Random, train: int, heldout: int) -> Problems:
    """Return lists of words of which the last one is asked for; held-out words are others."""
    words = generator.sample(WORDS, len(WORDS))
    border = round(HELDOUT_SHARE_OF_WORDS * len(words))
    return Problems(
        train=last_words(generator, words[border:], train),
        heldout=last_words(generator, words[:border], heldout),
    )


def last_words(generator: random.Random, words: list[str], count: int) -> list[dict]:
    """Return `count` different lists of these words."""
    lists = {}
    while len(lists) < count:
        length = generator.randint(SHORTEST_LIST, LONGEST_LIST)
        chosen = tuple(generator.sample(words, length))
        lists[chosen] = {
            "prompt": (
                f"What is the last word in this list: {', '.join(chosen)}? Answer with one word."
            ),
            "answer": chosen[-1],
        }
    return list(lists.values())


if __name__ == "__main__":
    sys.exit(main())
