"""Table 4 of the report: python -m alignjax.evaluate --run runs/rm --sets hh_helpful_base,summarize,shp,prm800k
Table 5 of the report: python -m alignjax.evaluate --run runs/ppo --tasks mmlu,ceval,gsm8k,humaneval,bbh --shots both

Table 5 is that of `evals.table5`. Table 4 is here: a run of the ranking stage, and the PMP that it began with, on sets of
comparisons: the share of the pairs whose chosen response scores strictly higher, in %, with its 95 % interval. A tie is not
right; ties are told beside, and so are the pairs left out as too long. Then accuracy by score ratio, where a set has it
(SHP), and calibration, as a picture.

Its scores are computed in float32 whatever the run's own type, so that neither the batch nor the number of devices
changes more of them than the last digits; of two equal responses the scores are equal.
"""

import argparse
import functools
import glob
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np

from alignjax import config as configs
from alignjax import inference, train
from alignjax.algorithms import ranking
from alignjax.config import UserError
from alignjax.data import chat, encoding, mixture, preferences, sources, toy
from alignjax.evals import calibration
from alignjax.machine import console, sharding
from alignjax.machine import workdir as workdirs
from alignjax.machine.compilation_cache import keep_programs
from alignjax.machine.console import say
from alignjax.weights import locations

REPORT = {
    "hh_helpful_base": (76.52, 73.98),
    "hh_helpful_online": (65.43, 64.57),
    "summarize": (69.60, 69.99),
    "shp": (60.05, 60.10),
    "prm800k": (70.59, 70.52),
}  # the report's Table 4: PMP, RM
PAIRS = 256  # tokenised and scored at a time: enough to fill microbatches


def main(argv=None) -> int:
    """The exit code: 0; 2 after a mistake of the user's; 130 after an interrupt."""
    try:
        arguments = parse(argv)
        keep_programs()
        if arguments.tasks:
            table5().evaluate(arguments)
        else:
            evaluate(arguments)
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "alignjax: interrupted" + ("; the same command goes on" if arguments.tasks else ""),
            file=sys.stderr,
        )
        return 130
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m alignjax.evaluate",
        allow_abbrev=False,
        description="Ranking runs on comparisons, or language models on benchmarks.",
    )
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        metavar="DIR",
        help="--sets: a ranking run, measured after its PMP parent, or several, measured as they are; "
        "--tasks: language models, runs or Hugging Face directories or hf://ORG/NAME",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--sets",
        metavar="SET,SET",
        help=f"comparisons: of {', '.join(preferences.SETS)} (with options as NAME:OPTION=VALUE), "
        "toy/comparisons-clean, or paths of JSON lines",
    )
    what.add_argument(
        "--tasks",
        metavar="NAME,NAME",
        help="benchmarks: of mmlu, ceval, gsm8k, humaneval (runs what the model writes, in a sandbox), bbh, "
        "world; a few subjects as bbh:word_sorting+navigate",
    )
    parser.add_argument(
        "--shots", default="both", choices=("zero", "few", "both"), help="of --tasks; default: both"
    )
    parser.add_argument(
        "--template",
        default="auto",
        choices=("auto", "chat", "none"),
        help="of --tasks: whether prompts go through the chat template; default: unless there is none, or the "
        "run was trained on plain text",
    )
    parser.add_argument(
        "--slots", type=int, default=64, help="of --tasks: responses decoded at once; default: 64"
    )
    parser.add_argument(
        "--data_dir",
        default="",
        help="--sets: where the public sets have been prepared; --tasks: "
        "where DIR/mmlu, DIR/gsm8k ... have the published files; default: the hub's",
    )
    parser.add_argument(
        "--split",
        default="heldout",
        choices=("heldout", "train"),
        help="of --sets; default: heldout",
    )
    parser.add_argument(
        "--examples", type=int, help="how many of each set or task, the first; default: all"
    )
    parser.add_argument(
        "--max_length",
        type=int,
        help="longer pairs are left out, longer prompts lose their beginning; "
        "default: as in the run's training, as the model allows",
    )
    parser.add_argument(
        "--microbatch_tokens",
        type=int,
        help="tokens at a time; default: as in the run's training, 4096",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=configs.CHOICES["model.dtype"],
        help="of the computation; in bfloat16 close calls depend on how a batch is laid out",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.json",
        help="--sets: default DIR/evaluation.json, with DIR/calibration.png, else with FILE.png; --tasks: a "
        "directory, default DIR/benchmarks",
    )
    arguments = parser.parse_args(argv)
    for name in ("examples", "max_length", "microbatch_tokens", "slots"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    return arguments


def table5():
    """`evals.table5`, which needs the extra [eval]: it is imported when it is asked for, as Table 4 needs none of it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs lm-evaluation-harness: pip install -c constraints.txt -e '.[eval]'"
        )
    return importlib.import_module("alignjax.evals.table5")


def evaluate(arguments) -> None:
    """Everything that can be asked wrongly is looked at before the first score."""
    given = [workdirs.resolve(run) for run in arguments.run]
    first, runs = given[0], runs_of(given)
    out, picture = places(arguments.out, first)
    stored = locations.read_config(first)
    length = arguments.max_length or stored["data.max_length"]
    budget = arguments.microbatch_tokens or stored["microbatch_tokens"]
    names = [source.name for source in sources.parse(arguments.sets)]
    sets = {name: load(name, arguments, stored["seed"]) for name in names}
    tokenizers = {label: chat.load_tokenizer(run / "tokenizer") for label, run in runs.items()}
    for label, tokenizer in tokenizers.items():
        for name, rows in sets.items():
            if not any(
                fitting(tokenizer, rows[i : i + PAIRS], length)[0]
                for i in range(0, len(rows), PAIRS)
            ):
                raise UserError(
                    f"--max_length {length}: all {len(rows)} pairs of {name} are longer in tokens of {label}"
                )
    mesh = sharding.make_mesh(configs.Mesh())
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        found = {
            label: measured(
                label, run, tokenizers[label], sets, arguments.dtype, length, budget, mesh
            )
            for label, run in runs.items()
        }
    say("\n\n".join(tables(found, list(sets), f"split {arguments.split}, up to {length} tokens")))
    facts = {
        "split": arguments.split,
        "max_length": length,
        "dtype": arguments.dtype,
        "runs": {label: str(run) for label, run in runs.items()},
    }
    report = {
        name: dict(zip(("PMP", "RM"), REPORT[base(name)], strict=True))
        for name in sets
        if base(name) in REPORT
    }
    workdirs.write_atomically(
        out, json.dumps(facts | {"figures": found, "report": report}, indent=1)
    )
    curves = {name: {label: found[label][name]["calibration"] for label in runs} for name in sets}
    calibration.picture(curves).savefig(picture, dpi=150)
    say(f"figures in {out}, calibration in {picture}")


def measured(
    label: str, run: Path, tokenizer, sets: dict, dtype: str, length: int, budget: int, mesh
) -> dict[str, dict]:
    """{set: its figures} of one run, whose parameters are let go at the end, before the next run's come."""
    model = inference.load(run, dtype=dtype, mesh=mesh)
    score_fn, found = jax.jit(functools.partial(ranking.score_pairs, model.architecture)), {}
    for name, rows in sets.items():
        with console.progress_bar(len(rows), f"{label}: {name}", "pair") as bar:
            difference, kept = differences(
                score_fn, model.params, tokenizer, rows, length, budget, mesh, bar
            )
        found[name] = figures(difference, kept, np.array([row.get("ratio", 0.0) for row in rows]))
    return found


def runs_of(given: list[Path]) -> dict[str, Path]:
    """What the rows are called -> the run: PMP and RM if one run is given that began with another of its stage."""
    for run in given:
        if not (run / "config.json").is_file():
            raise UserError(f"--run {run}: no config.json there, so this is not a run")
        stage = locations.read_config(run).get("stage")
        if stage != "ranking":
            raise UserError(
                f"--run {run}: a run of stage 'ranking' (PMP, RM) wanted, its stage is {stage!r}"
            )
        if not (run / "summary.json").exists():
            raise UserError(
                f"--run {run}: this run is not complete; the command that began it goes on"
            )
    parent = pmp_of(given[0]) if len(given) == 1 else None
    if parent is None:
        return {str(run): run for run in given}
    say(f"PMP is {parent}, RM is {given[0]}")
    return {"PMP": parent, "RM": given[0]}


def pmp_of(run: Path) -> Path | None:
    """The ranking run that this one began with, complete; None, and why is said, if it is not where it was."""
    if locations.read_config(run)["parents"].get("model", "hf://").startswith("hf://"):
        return None
    try:
        parent = train.parent_of(run, "model")
        if locations.read_config(parent).get("stage") != "ranking":
            return None
        if not (parent / "summary.json").exists():
            raise UserError(f"parent {parent}: this run is not complete")
    except UserError as error:
        say(f"{run} alone, for of what it began with: {error}")
        return None
    return parent


def places(out: str | None, run: Path) -> tuple[Path, Path]:
    """Where the figures and the picture go."""
    if out is None and not workdirs.is_local(run):
        raise UserError(f"--run {run}: the figures go to a local file, which --out FILE.json names")
    path = run / "evaluation.json" if out is None else Path(out)
    if path.suffix != ".json" or not path.parent.is_dir():
        raise UserError(
            f"--out {out}: the name of a .json file in a directory that exists is wanted"
        )
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: can't be written there; name another place by --out FILE.json")
    return path, run / "calibration.png" if out is None else path.with_suffix(".png")


def base(name: str) -> str:
    """A public set's name without its options."""
    return name.partition(":")[0]


def load(name: str, arguments, seed: int) -> list[dict]:
    """The pairs of a set; the seed is that of the embedded world."""
    source = f"tfds/{name}" if base(name) in preferences.SETS else name
    if not source.startswith(("tfds/", "toy/")) and not glob.glob(source):
        known = [
            *preferences.SETS,
            *(f"toy/{size}" for size in toy.SIZES if size.startswith("comparisons")),
        ]
        raise UserError(
            f"--sets {name}: no such set, and no such file{configs.nearest(name, known)}"
        )
    options = sources.ReadOptions(
        seed=seed, limit=arguments.examples or 0, data_dir=arguments.data_dir
    )
    rows = sources.load(source, "comparisons", arguments.split, options)
    if not rows:
        raise UserError(f"--sets {name}: there are no comparisons in its split {arguments.split!r}")
    return rows


def fitting(tokenizer, rows: list[dict], length: int) -> tuple[list[int], list[tuple]]:
    """Which of the rows are no longer than `length` tokens, and the (chosen, rejected) tokens of each of those."""
    encoded = chat.encode_comparisons(tokenizer, rows)
    kept = [i for i, pair in enumerate(encoded) if max(map(len, pair)) <= length]
    return kept, [encoded[i] for i in kept]


def arrays(pairs: list[tuple], length: int) -> dict:
    """As `encoding.encode_comparisons`, for PAIRS pairs: what lacks is made up by pairs of one token, so that shapes stay."""
    out = {"margin": np.zeros(PAIRS, np.float32)}
    filled = [*pairs, *[([0], [0])] * (PAIRS - len(pairs))]
    for side, ids in zip(ranking.SIDES, zip(*filled, strict=True), strict=True):
        out[side], out[f"{side}_length"] = encoding.pad(ids, length), encoding.lengths_of(ids)
    return out


def differences(score_fn, params, tokenizer, rows, length: int, budget: int, mesh, bar):
    """(difference[n] float64 of the scores of each pair that fits, kept[n], its row's number).

    A few rows at a time are in memory as tokens, those to come being read on another thread.
    """

    def read(i):
        part = rows[i * PAIRS : (i + 1) * PAIRS]
        return fitting(tokenizer, part, length) if part else None

    ahead, found, numbers = mixture.Ahead(read), [], []
    for i, start in enumerate(range(0, len(rows), PAIRS)):
        kept, pairs = ahead.get(i)
        if kept:
            scores = ranking.score_rows(score_fn, params, arrays(pairs, length), budget, mesh)[
                : len(kept)
            ]
            same = np.array([chosen == rejected for chosen, rejected in pairs])
            found.append(np.where(same, 0, -np.diff(scores.astype(np.float64), axis=1)[:, 0]))
            numbers.append(start + np.array(kept))
        bar.update(min(PAIRS, len(rows) - start))
    return np.concatenate(found), np.concatenate(numbers)


def figures(difference: np.ndarray, kept: np.ndarray, ratio: np.ndarray) -> dict:
    """Of the pairs of a set that fit: accuracy, ties, loss, interval, by_ratio, calibration; ratio is of all its rows."""
    out = ranking.figures_of(difference)
    out |= {
        "interval": calibration.interval(int((difference > 0).sum()), len(difference)),
        "dropped": len(ratio) - len(kept),
    }
    if (ratio > 0).any():
        out["by_ratio"] = calibration.by_ratio(difference, ratio[kept])
    return out | {"calibration": calibration.curve(difference)}


def percent(found: dict) -> str:
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.2f} [{100 * low:.1f}, {100 * high:.1f}]"


def tables(found: dict[str, dict], names: list[str], what: str) -> list[str]:
    """Table 4 of {run: {set: figures}}, and one for each set that has score ratios."""
    lines = []
    for label, sets in found.items():
        lines.append((label, [percent(sets[name]) for name in names]))
        counts = [
            (x["comparisons"], round(x["ties"] * x["comparisons"]), x["dropped"])
            for x in map(sets.get, names)
        ]
        lines.append(("  pairs, ties, too long", [", ".join(map(str, three)) for three in counts]))
    for i, label in enumerate(("PMP", "RM")):
        lines.append(
            (
                f"the report's {label}",
                [f"{REPORT[n][i]:.2f}" if n in REPORT else "-" for n in map(base, names)],
            )
        )
    out = [console.grid(f"accuracy in % [95 % interval], {what}", ("", names), lines)]
    for name in names:
        some = {
            label: sets[name]["by_ratio"]
            for label, sets in found.items()
            if "by_ratio" in sets[name]
        }
        for label, parts in some.items():
            heads = [
                f"{b['from']:g} to {b['to']:g}" if b["to"] else f"{b['from']:g} or more"
                for b in parts
            ]
            lines = [
                (label, [percent(b) if b["pairs"] else "-" for b in parts]),
                ("  pairs", [str(b["pairs"]) for b in parts]),
            ]
            out.append(console.grid(f"{name} by score ratio, {label}", ("", heads), lines))
    return out


if __name__ == "__main__":
    sys.exit(main())
