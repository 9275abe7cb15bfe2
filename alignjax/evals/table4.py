"""Compute Table 4 of the report: how often a reward model prefers what people preferred.

A run of the ranking stage, and the PMP run that it started from, or reward models of Hugging
Face's format, score both responses of each pair in several sets of comparisons. The accuracy is
the share of pairs whose chosen response scores strictly higher, in % with its 95 % interval. A
tie is not right. The table also counts ties and the pairs left out as too long. Two more results
follow: accuracy by score ratio, for sets that have one (SHP), and a picture of the calibration.

Scores are computed in float32, whatever the run's own type, so neither the batch nor the number
of devices changes more than their last digits. Two equal responses get equal scores.
"""

import argparse
import functools
import glob
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from alignjax import config as configs
from alignjax import inference
from alignjax.algorithms import intervals, ranking
from alignjax.config import UserError
from alignjax.data import chat, encoding, mixture, paths, preferences, sources, tokenising, toy
from alignjax.data.ends import replace_end
from alignjax.evals import calibration, published_figures
from alignjax.machine import console, outputs, pictures, sharding
from alignjax.machine import workdir as workdirs
from alignjax.machine.console import say
from alignjax.runs import lineage
from alignjax.weights import imported, locations
from alignjax.weights.score_place import ending_of

# Of the file of results, by which one from an earlier evaluation is known.
RESULT_KEYS = frozenset({"split", "max_length", "runs", "figures", "report"})
CHUNK = 256  # pairs tokenised and scored at a time: enough to fill microbatches

Pair = tuple[list[int], list[int]]  # tokens of prompt and chosen, of prompt and rejected response


class OutputFiles(NamedTuple):
    """Where the results go."""

    figures: Path
    picture: Path


class FittingPairs(NamedTuple):
    """The pairs of some rows that are short enough."""

    rows: list[int]  # the number of each pair's row
    pairs: list[Pair]


class ScoreDifferences(NamedTuple):
    """The chosen response's score minus the rejected one's, for each pair that is short enough."""

    differences: Float[np.ndarray, " pairs"]  # float64
    rows: Int[np.ndarray, " pairs"]  # the number of each pair's row


@dataclass(frozen=True, kw_only=True)
class PairReader:
    """How a reward model reads comparisons."""

    tokenizer: PreTrainedTokenizerBase
    ending: tuple[int, ...]  # of what it reads, see `weights.score_place`
    max_length: int  # longer pairs are left out

    def fitting_pairs(self, rows: list[dict]) -> FittingPairs:
        """Tokenise rows and keep the pairs of which neither side is too long."""
        if not rows:
            return FittingPairs([], [])
        chat.end_token(self.tokenizer)  # a template that is of no use is no fault of a row
        encode = functools.partial(chat.encode_comparisons, self.tokenizer)
        pairs = [
            (replace_end(chosen, self.ending), replace_end(rejected, self.ending))
            for chosen, rejected in tokenising.naming_rows(encode, rows)
        ]
        numbers = [
            number
            for number, (chosen, rejected) in enumerate(pairs)
            if max(len(chosen), len(rejected)) <= self.max_length
        ]
        return FittingPairs(numbers, [pairs[number] for number in numbers])


@dataclass(frozen=True, kw_only=True)
class PairScorer:
    """A reward model that scores both responses of comparisons."""

    score_pairs: Callable  # the compiled `ranking.score_pairs` of the model
    params: dict
    reader: PairReader
    microbatch_tokens: int
    mesh: jax.sharding.Mesh

    def differences(self, rows: list[dict], progress: tqdm) -> ScoreDifferences:
        """Return the score differences of all pairs that fit; at least one must.

        Only a few rows at a time are in memory as tokens; a thread reads the next ones ahead.
        """
        chunks = mixture.Ahead(functools.partial(self.read_chunk, rows))
        differences = []
        numbers = []
        for chunk, start in enumerate(range(0, len(rows), CHUNK)):
            fitting = chunks.get(chunk)
            if fitting.pairs:
                differences.append(self.chunk_differences(fitting.pairs))
                numbers.append(start + np.array(fitting.rows))
            progress.update(min(CHUNK, len(rows) - start))
        return ScoreDifferences(np.concatenate(differences), np.concatenate(numbers))

    def read_chunk(self, rows: list[dict], chunk: int) -> FittingPairs:
        """Tokenise one chunk of the rows; a chunk after the last row has no pairs."""
        part = rows[chunk * CHUNK : (chunk + 1) * CHUNK]
        return self.reader.fitting_pairs(part)

    def chunk_differences(self, pairs: list[Pair]) -> Float[np.ndarray, " pairs"]:
        """Score up to CHUNK pairs and return their differences; equal responses differ by 0."""
        longest = max(max(len(chosen), len(rejected)) for chosen, rejected in pairs)
        arrays = padded_pairs(pairs, inference.round_up(longest))
        scores = ranking.score_rows(
            self.score_pairs, self.params, arrays, self.microbatch_tokens, self.mesh
        )[: len(pairs)].astype(np.float64)
        equal = np.array([chosen == rejected for chosen, rejected in pairs])
        return np.where(equal, 0, -np.diff(scores, axis=1)[:, 0])


def evaluate(arguments: argparse.Namespace) -> None:
    """Print Table 4 and write its figures; report every user error before the first score."""
    given_runs = {run: locations.local_directory(run) for run in arguments.run}
    first_run = next(iter(given_runs.values()))
    runs = ranking_runs(given_runs)
    files = output_files(arguments, first_run)
    # A Hugging Face checkpoint has none of a run's fields.
    stored = {"seed": 0, "microbatch_tokens": 4096} | locations.read_config(first_run)
    max_length = arguments.max_length or stored.get("data.max_length")
    max_length = max_length or locations.architecture(first_run).max_length
    sets = {
        name: load_comparisons(name, arguments, stored["seed"])
        for name in names_of_sets(arguments.sets)
    }
    readers = {label: pair_reader(run, max_length) for label, run in runs.items()}
    if arguments.on_bad_row == "skip":
        tokenizers = [reader.tokenizer for reader in readers.values()]
        sets = {name: without_refused(name, rows, tokenizers) for name, rows in sets.items()}
    for label, reader in readers.items():
        check_some_pairs_fit(label, reader, sets)

    mesh = sharding.make_mesh(configs.Mesh())
    figures = {}
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        for label, run in runs.items():
            scorer = load_scorer(
                run,
                reader=readers[label],
                dtype=arguments.dtype,
                microbatch_tokens=arguments.microbatch_tokens or stored["microbatch_tokens"],
                mesh=mesh,
            )
            figures[label] = figures_of_run(label, scorer, sets)
            del scorer  # free this run's parameters before loading the next run's

    conditions = f"split {arguments.split}, up to {max_length} tokens"
    say("\n\n".join([accuracy_table(figures, list(sets), conditions), *ratio_tables(figures)]))
    settings = {
        "split": arguments.split,
        "max_length": max_length,
        "dtype": arguments.dtype,
        "runs": {label: str(run) for label, run in runs.items()},
    }
    write_results(files, settings, figures)


def ranking_runs(given: dict[str, Path]) -> dict[str, Path]:
    """Return {row label: directory} of reward models; raise UserError for anything else.

    A single run that started from another run of its stage gives two rows, PMP and RM.
    """
    for name, directory in given.items():
        check_reward_model(name, directory)
    first = next(iter(given.values()))
    parent = pmp_parent(first) if len(given) == 1 else None
    if parent is None:
        return given
    say(f"PMP is {parent}, RM is {first}")
    return {"PMP": parent, "RM": first}


def check_reward_model(run: str, directory: Path) -> None:
    """Raise UserError unless this is a complete ranking run or a checkpoint of a classifier."""
    stored = locations.read_config(directory)
    if not inference.is_reward_model(directory):
        what = "is a language model"
        if locations.is_run(directory):
            what = f"run's stage is {stored['stage']!r}"
        raise UserError(
            f"--run {run}: --sets needs a reward model: a run of stage 'ranking' (PMP, RM), or a "
            f"sequence classifier of Hugging Face's format; this {what}"
        )
    if locations.is_run(directory) and not (directory / "summary.json").exists():
        raise UserError(
            f"--run {run}: this run is not complete; the command that started it resumes it"
        )


def pmp_parent(run: Path) -> Path | None:
    """Return the complete ranking run that this run started from, or None.

    If that run exists but cannot be used, print why.
    """
    if not locations.is_run(run):
        return None
    if locations.read_config(run)["parents"].get("model", "hf://").startswith("hf://"):
        return None
    try:
        parent = lineage.parent_of(run, "model")
        if locations.read_config(parent).get("stage") != "ranking":
            return None
        if not (parent / "summary.json").exists():
            raise UserError(f"parent {parent}: this run is not complete")
    except UserError as error:
        say(f"evaluating {run} alone, because its parent cannot be used: {error}")
        return None
    return parent


def output_files(arguments: argparse.Namespace, run: Path) -> OutputFiles:
    """Return where the results go; raise UserError unless they may be written there."""
    out = arguments.out
    if out is None and not workdirs.is_local(run):
        raise UserError(
            f"--run {run}: the results go to a local file, so name one with --out FILE.json"
        )
    default = default_files(run)
    path = default.figures if out is None else Path(out)
    if path.suffix != ".json" or not path.parent.is_dir():
        raise UserError(f"--out {out}: expected the name of a .json file in an existing directory")
    picture = default.picture if out is None else path.with_suffix(".png")
    inputs = [Path(file) for name in names_of_sets(arguments.sets) for file in glob.glob(name)]
    is_own = {
        path: functools.partial(outputs.has_keys, keys=RESULT_KEYS),
        # Older versions left no mark of their own in the picture.
        picture: functools.partial(pictures.is_picture, record=path, keys=RESULT_KEYS),
    }
    for file, test in is_own.items():
        outputs.check_file(file, "--out", is_own=test, overwrite=arguments.overwrite, inputs=inputs)
    return OutputFiles(path, picture)


def default_files(run: Path) -> OutputFiles:
    """Return where the results go if nobody says so: to a run's directory.

    A checkpoint's directory is not ours, so its results go to the working directory.
    """
    if locations.is_run(run):
        return OutputFiles(run / "evaluation.json", run / "calibration.png")
    name = imported.name_of(run).replace("/", "--")
    return OutputFiles(Path(f"{name}.evaluation.json"), Path(f"{name}.calibration.png"))


def names_of_sets(text: str) -> list[str]:
    """Return the names that --sets gives; UserError if there are none, or with weights."""
    named = sources.parse(text, "--sets")
    if not named:
        raise UserError("--sets is empty: expected the names of sets of comparisons, or of files")
    for source in named:
        if source.weight is not None:
            raise UserError(f"--sets {text}: weights are for training; name {source.name} alone")
    return [source.name for source in named]


def load_comparisons(name: str, arguments: argparse.Namespace, seed: int) -> list[dict]:
    """Return the pairs of a set; `seed` is the seed of the embedded world."""
    is_public = name_without_options(name) in preferences.SETS
    source = f"tfds/{name}" if is_public else name
    if sources.is_file(source) and not paths.exists(source):
        world_sets = [f"toy/{size}" for size in toy.SIZES if size.startswith("comparisons")]
        hint = configs.nearest(name, [*preferences.SETS, *world_sets])
        raise UserError(f"--sets {name}: there is no such set and no such file{hint}")
    options = sources.ReadOptions(
        seed=seed,
        limit=arguments.examples or 0,
        data_dir=arguments.data_dir,
        skip_bad_rows=arguments.on_bad_row == "skip",
        columns=configs.parse_names(arguments.columns, "--columns"),
        say=say,
    )
    rows = sources.load(source, "comparisons", arguments.split, options)
    if not rows:
        raise UserError(f"--sets {name}: its split {arguments.split!r} has no comparisons")
    return rows


def without_refused(
    name: str, rows: list[dict], tokenizers: list[PreTrainedTokenizerBase]
) -> list[dict]:
    """Return the pairs of a set that all chat templates take; print how many others there are.

    So all runs are evaluated on the same pairs. Raises UserError if none is left.
    """
    faults: dict[int, str] = {}  # number of the row -> what is wrong
    for tokenizer in tokenizers:
        for start in range(0, len(rows), CHUNK):
            part = tokenising.encode_part(
                encoding.comparison_columns,
                ranking.SIDES,
                tokenizer,
                rows[start : start + CHUNK],
            )
            faults |= {start + place: fault for place, fault in part.faults.items()}
    if not faults:
        return rows
    first = min(faults)
    where = tokenising.place_of(rows[first], first, len(rows))
    if len(faults) == len(rows):
        raise UserError(f"--sets {name}: all {len(rows)} pairs are bad; {where}: {faults[first]}")
    say(
        f"{name}: {len(faults)} of {len(rows)} pairs cannot be encoded and are skipped; "
        f"the first: {where}: {faults[first]}"
    )
    return [row for number, row in enumerate(rows) if number not in faults]


def name_without_options(name: str) -> str:
    """Return the name of a public set without its options."""
    return name.partition(":")[0]


def check_some_pairs_fit(label: str, reader: PairReader, sets: dict[str, list[dict]]) -> None:
    """Raise UserError if all pairs of a set are too long for this run."""
    for name, rows in sets.items():
        chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
        if not any(reader.fitting_pairs(chunk).pairs for chunk in chunks):
            raise UserError(
                f"--max_length {reader.max_length}: all {len(rows)} pairs of {name} are longer in "
                f"tokens of {label}"
            )


def pair_reader(run: Path, max_length: int) -> PairReader:
    """Return how the reward model of a run or a checkpoint reads comparisons."""
    directory = run / "tokenizer" if locations.is_run(run) else locations.tokenizer_source(run)
    tokenizer = chat.load_tokenizer(directory)
    ending = ending_of(run, tokenizer)
    return PairReader(tokenizer=tokenizer, ending=ending, max_length=max_length)


def padded_pairs(pairs: list[Pair], width: int) -> dict[str, np.ndarray]:
    """Return arrays like those of `encoding.encode_comparisons`, always for CHUNK pairs.

    Pairs of one token make up the number, so the shapes stay the same.
    """
    filler = [([0], [0])] * (CHUNK - len(pairs))
    arrays = {"margin": np.zeros(CHUNK, np.float32)}
    for side, sequences in zip(ranking.SIDES, zip(*pairs, *filler, strict=True), strict=True):
        arrays[side] = encoding.pad(sequences, width)
        arrays[f"{side}_length"] = encoding.lengths_of(sequences)
    return arrays


def load_scorer(run: Path, *, dtype: str, mesh: jax.sharding.Mesh, **settings) -> PairScorer:
    """Load a run's parameters; `settings` are the scorer's remaining fields."""
    model = inference.load(run, dtype=dtype, mesh=mesh)
    score_pairs = jax.jit(functools.partial(ranking.score_pairs, model.architecture))
    return PairScorer(score_pairs=score_pairs, params=model.params, mesh=mesh, **settings)


def figures_of_run(label: str, scorer: PairScorer, sets: dict[str, list[dict]]) -> dict[str, dict]:
    """Return {set: figures} of one run, and show the progress."""
    figures = {}
    for name, rows in sets.items():
        with console.progress_bar(len(rows), f"{label}: {name}", "pair") as progress:
            scored = scorer.differences(rows, progress)
        if not np.isfinite(scored.differences).all():
            raise UserError(f"{label}: the model's scores of {name} overflow; try --dtype float32")
        ratios = np.array([row.get("ratio", 0.0) for row in rows])
        figures[name] = figures_of_set(scored, ratios)
    return figures


def figures_of_set(scored: ScoreDifferences, ratios: Float[np.ndarray, " rows"]) -> dict:
    """Return the figures of one set; `ratios` holds the score ratio of all its rows, or 0."""
    differences = scored.differences
    right = int((differences > 0).sum())
    figures = ranking.figures_of(differences) | {
        "interval": intervals.wilson_interval(right, len(differences)),
        "dropped": len(ratios) - len(differences),
    }
    if (ratios > 0).any():
        figures["by_ratio"] = calibration.accuracy_by_ratio(differences, ratios[scored.rows])
    figures["calibration"] = calibration.calibration_curve(differences)
    return figures


def accuracy_table(figures: dict[str, dict], names: list[str], conditions: str) -> str:
    """Return Table 4 of {run: {set: figures}} as text, with the report's rows if it has a set."""
    lines = []
    for label, sets in figures.items():
        lines.append((label, [percentage(sets[name]) for name in names]))
        lines.append(("  pairs, ties, too long", [pair_counts(sets[name]) for name in names]))
    for label in ("PMP", "RM"):
        cells = [reported(name, label) for name in names]
        if set(cells) != {"-"}:
            lines.append((f"the report's {label}", cells))
    return console.grid(f"accuracy in % [95 % interval], {conditions}", ("", names), lines)


def ratio_tables(figures: dict[str, dict]) -> Iterable[str]:
    """Yield a table as text for each set that has score ratios and each run."""
    names = dict.fromkeys(name for sets in figures.values() for name in sets)
    for name in names:
        for label, sets in figures.items():
            if "by_ratio" not in sets[name]:
                continue
            buckets = sets[name]["by_ratio"]
            accuracies = [percentage(bucket) if bucket["pairs"] else "-" for bucket in buckets]
            lines = [
                (label, accuracies),
                ("  pairs", [str(bucket["pairs"]) for bucket in buckets]),
            ]
            head = ("", list(map(bucket_name, buckets)))
            yield console.grid(f"{name} by score ratio, {label}", head, lines)


def percentage(figures: dict) -> str:
    """Return an accuracy in % with its interval."""
    low, high = figures["interval"]
    return f"{100 * figures['accuracy']:.2f} [{100 * low:.1f}, {100 * high:.1f}]"


def pair_counts(figures: dict) -> str:
    """Return the numbers of pairs, of ties and of pairs left out as too long."""
    ties = round(figures["ties"] * figures["comparisons"])
    return f"{figures['comparisons']}, {ties}, {figures['dropped']}"


def reported(name: str, label: str) -> str:
    """Return the report's figure for a set, or "-" if it has none."""
    figures = published_figures.TABLE_4.get(name_without_options(name))
    return f"{figures[label]:.2f}" if figures else "-"


def bucket_name(bucket: dict) -> str:
    """Return the bounds of a bucket of score ratios as text."""
    if bucket["to"]:
        return f"{bucket['from']:g} to {bucket['to']:g}"
    return f"{bucket['from']:g} or more"


def write_results(files: OutputFiles, settings: dict, figures: dict[str, dict]) -> None:
    """Write the figures, with their settings and the report's figures, and the picture."""
    names = list(next(iter(figures.values())))
    report = {
        name: published_figures.TABLE_4[name_without_options(name)]
        for name in names
        if name_without_options(name) in published_figures.TABLE_4
    }
    results = settings | {"figures": figures, "report": report}
    outputs.write_text(files.figures, json.dumps(results, indent=1))
    curves = {
        name: {label: sets[name]["calibration"] for label, sets in figures.items()}
        for name in names
    }
    picture = calibration.calibration_figure(curves)
    pictures.write_picture(files.picture, picture, dpi=150)
    say(f"figures in {files.figures}, calibration in {files.picture}")
