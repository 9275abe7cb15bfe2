"""Compute the report's Table 5: what language models can do, zero-shot and few-shot.

python -m alignjax.evaluate --run runs/sft runs/ppo --tasks mmlu,gsm8k:... --shots both

Each model answers all benchmarks through lm-evaluation-harness. Then the table is printed, with
the report's figures beneath. A model's directory gets results.json in the harness's own format,
samples_TASK.jsonl, which holds each answer with what was extracted from it and the verdict, and
the answers themselves, from which an interrupted evaluation resumes.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lm_eval
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from transformers import PreTrainedTokenizerBase

from alignjax import inference
from alignjax.algorithms import intervals
from alignjax.config import UserError, nearest
from alignjax.evals import published_figures, registry
from alignjax.evals.adapter import AlignJax
from alignjax.evals.benchmark import Benchmark, Figure
from alignjax.evals.best_of import kl_bound
from alignjax.machine import console, jsonl, output_directories, outputs
from alignjax.machine import workdir as workdirs
from alignjax.machine.console import say
from alignjax.weights import bases, checkpoint, locations

MICROBATCH_TOKENS = 4096
COMMAND = "alignjax.evaluate"  # in the marker of a directory of results
RESULT_KEYS = frozenset({"results", "groups", "versions"})  # of results.json
SETTINGS = {"zero": ("zero",), "few": ("few",), "both": ("zero", "few")}  # of --shots

Results = dict[str, Any]  # the harness's results of one model


class Column(NamedTuple):
    """A benchmark in one of its settings."""

    name: str
    setting: str

    @property
    def benchmark(self) -> Benchmark:
        """Return the benchmark of that name."""
        return registry.BENCHMARKS[self.name]

    @property
    def shots(self) -> int:
        """Return the number of examples shown."""
        return self.benchmark.shots_of(self.setting)

    @property
    def headline(self) -> Figure:
        """Return the figure that stands in the table."""
        return self.benchmark.headline[self.setting]


def evaluate(arguments: argparse.Namespace) -> None:
    """Print Table 5 and write the results; report every user error before the first request.

    Errors that only a loaded model can show come when it is loaded.
    """
    subjects = parse_tasks(arguments.tasks)
    name = "benchmarks" if arguments.best_of == 1 else f"benchmarks-best-of-{arguments.best_of}"
    directories = result_directories(arguments.run, arguments.out, name)
    for directory in directories.values():
        output_directories.check_directory(
            directory,
            "--out",
            command=COMMAND,
            is_own=has_results,
            overwrite=arguments.overwrite,
        )
    columns = table_columns(list(subjects), arguments.shots)
    with quiet_harness():
        manager = TaskManager(include_defaults=False, include_path=registry.include_paths(subjects))
        configs = [
            column.benchmark.group(column.setting, arguments.data_dir, subjects[column.name])
            for column in columns
        ]
        groups = list(registry.load(manager, configs)["groups"].values())
        for spec in arguments.run:
            language_model_directory(spec)
        results = {}
        for spec, directory in directories.items():
            results[spec] = evaluate_model(spec, directory, manager, groups, arguments)
    say("\n\n".join(tables(results, columns, arguments.examples)))
    say("\n".join(f"results and answers of {spec} in {path}" for spec, path in directories.items()))


def parse_tasks(text: str) -> dict[str, tuple[str, ...]]:
    """Return {benchmark: subjects} of "mmlu,bbh:word_sorting+navigate".

    No subjects means all of them.
    """
    tasks = {}
    for part in filter(None, text.split(",")):
        name, *subjects = part.split(":", 1)
        if name not in registry.BENCHMARKS:
            hint = nearest(name, list(registry.BENCHMARKS))
            raise UserError(f"--tasks {name}: there is no such benchmark{hint}")
        tasks[name] = tuple(filter(None, "".join(subjects).split("+")))
    if not tasks:
        known = ", ".join(registry.BENCHMARKS)
        raise UserError(f"--tasks {text!r}: expected some of {known}")
    return tasks


def table_columns(names: list[str], shots: str) -> list[Column]:
    """Return the benchmarks in the settings that --shots asks for and that exist."""
    columns = [
        Column(name, setting)
        for name in names
        for setting in SETTINGS[shots]
        if setting in registry.BENCHMARKS[name].headline
    ]
    if not columns:
        raise UserError(f"--shots {shots}: none of {', '.join(names)} has that setting")
    return columns


def result_directories(specs: list[str], out: str | None, name: str) -> dict[str, Path]:
    """Return where the results of each model go.

    With --out, they go there, or for several models into directories there. Without it, they go
    to the directory `name` of a run.
    """
    if out is None:
        for spec in specs:
            check_local_run(spec)
        return {spec: Path(spec) / name for spec in specs}
    if len(specs) == 1:
        return {specs[0]: Path(out)}
    return {spec: Path(out) / directory_name(spec) for spec in specs}


def check_local_run(spec: str) -> None:
    """Raise UserError unless the model is a run in a local directory."""
    is_local = not spec.startswith("hf://") and workdirs.is_local(workdirs.resolve(spec))
    if not is_local or not locations.is_run(Path(spec)):
        raise UserError(
            f"--run {spec}: this is not a run in a local directory, so say where its results go: "
            "--out DIR"
        )


def directory_name(spec: str) -> str:
    """Return the name of a model's directory in --out."""
    return spec.removeprefix("hf://").strip("/").replace("/", "__")


def language_model_directory(spec: str) -> Path:
    """Return the directory of a language model; raise UserError unless it is complete."""
    directory = locations.local_directory(spec)
    if locations.is_run(directory):
        stage = locations.read_config(directory)["stage"]
        if (stage, "lm") not in bases.CHECKPOINT_ITEMS:
            raise UserError(
                f"--run {spec}: expected a language model, but this run's stage is {stage!r}"
            )
        if not (directory / "summary.json").exists():
            raise UserError(
                f"--run {spec}: this run is not complete; the command that started it resumes it"
            )
    return directory


def evaluate_model(
    spec: str,
    directory: Path,
    manager: TaskManager,
    groups: list[Group],
    arguments: argparse.Namespace,
) -> Results:
    """Return and write one model's results.

    Its parameters are freed at the end, before the next model is loaded.
    """
    model = AlignJax(
        spec,
        batch_size=arguments.slots,
        dtype=arguments.dtype,
        tokens=arguments.microbatch_tokens or MICROBATCH_TOKENS,
        max_length=arguments.max_length,
        best_of=arguments.best_of,
        reward=arguments.reward or "",
    )
    run_directory = language_model_directory(spec)
    chat = uses_chat_template(arguments.template, run_directory, model.tokenizer, spec)
    say(f"{spec}: {len(groups)} groups of tasks, {'with' if chat else 'without'} the chat template")
    if model.best_of:
        say(
            f"{spec}: what it writes is the best of {arguments.best_of} under {arguments.reward}, "
            f"a KL of at most {kl_bound(arguments.best_of):.2f} nats a response"
        )
    output_directories.claim_directory(directory, COMMAND)
    results = lm_eval.simple_evaluate(
        model,
        tasks=groups,
        limit=arguments.examples,
        use_cache=str(directory / f"answers-{fingerprint(spec, model)}"),
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=manager,
        confirm_run_unsafe_code=True,
    )
    write_results(directory, results)
    return results


def has_results(directory: Path) -> bool:
    """Return whether an older version, which left no marker, has written into a directory."""
    return outputs.has_keys(directory / "results.json", RESULT_KEYS)


def write_results(directory: Path, results: Results) -> None:
    """Write samples_TASK.jsonl and results.json; remove the samples from `results`."""
    options = {"default": handle_non_serializable, "ensure_ascii": False}
    for task, rows in results.pop("samples").items():
        path = directory / f"samples_{task.replace('::', '_')}.jsonl"
        outputs.write_text(path, jsonl.dumps(rows, **options))
    text = json.dumps(results, indent=1, **options)
    outputs.write_text(directory / "results.json", text)


def uses_chat_template(
    wanted: str, directory: Path, tokenizer: PreTrainedTokenizerBase, spec: str
) -> bool:
    """Return whether prompts go through the chat template.

    "auto" uses the template if there is one and the model was trained on conversations.
    """
    if wanted == "none":
        return False
    if not tokenizer.chat_template:
        if wanted == "chat":
            raise UserError(f"--template chat: the tokenizer of {spec} has no chat template")
        return False
    return wanted == "chat" or inference.uses_chat_template(
        locations.read_config(directory), tokenizer
    )


def fingerprint(spec: str, model: AlignJax) -> str:
    """Return a hash of what answers depend on, apart from the request.

    With it, answers that were kept from another checkpoint or type are not taken for these.
    """
    facts = [
        *checkpoint_of(spec),
        model.requests.model.architecture.dtype,
        model.max_length,
    ]
    if model.best_of:
        facts += [model.best_of.n, *checkpoint_of(model.reward)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def checkpoint_of(spec: str) -> list[str]:
    """Return the directory of a model and, of a run, its newest step."""
    directory = locations.local_directory(spec)
    step = checkpoint.newest(directory).name if locations.is_run(directory) else ""
    return [str(directory.absolute()), step]


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the harness's own bars and notes: there is one for each of its many tasks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with (
            mock.patch("lm_eval.api.task.tqdm", without_bar),
            mock.patch("lm_eval.api.model.tqdm", without_bar),
        ):
            yield
    finally:
        logger.setLevel(level)


def without_bar(items: Iterable, **_: Any) -> Iterable:
    """Return the items themselves, in place of `tqdm`."""
    return items


def tables(results: dict[str, Results], columns: list[Column], limit: int | None) -> Iterator[str]:
    """Yield Table 5 of {model: results}, then one table for each benchmark with several figures."""
    caption = "in % [95 % interval], by number of examples shown"
    if limit:
        caption += f"; the first {limit} of each task"
    report_columns = [column for column in columns if not column.benchmark.more_figures]
    if report_columns:
        yield report_table(results, report_columns, caption)
    other_columns = [column for column in columns if column.benchmark.more_figures]
    for name in dict.fromkeys(column.name for column in other_columns):
        own_columns = [column for column in other_columns if column.name == name]
        yield benchmark_table(results, own_columns, f"{name}, {caption}")


def report_table(results: dict[str, Results], columns: list[Column], caption: str) -> str:
    """Return a table with the models above the rows of the report."""
    heads = [f"{column.benchmark.title} {column.shots}" for column in columns]
    lines = [
        (spec, [cell(model_results, column, column.headline) for column in columns])
        for spec, model_results in results.items()
    ]
    for model, figures in published_figures.TABLE_5.items():
        if any(column in figures for column in columns):
            cells = [f"{figures[column]:.1f}" if column in figures else "-" for column in columns]
            lines.append((f"the report's {model}", cells))
    return console.grid(caption, ("", heads), lines)


def benchmark_table(results: dict[str, Results], columns: list[Column], caption: str) -> str:
    """Return a table of all figures of one benchmark: a line for each, a column for each model."""
    lines = []
    for column in columns:
        benchmark = column.benchmark
        for title, figure in ((benchmark.title, column.headline), *benchmark.more_figures):
            cells = [cell(model_results, column, figure) for model_results in results.values()]
            lines.append((f"{title}, {column.shots}", cells))
    return console.grid(caption, ("", list(results)), lines)


def cell(results: Results, column: Column, figure: Figure) -> str:
    """Return a figure in %, with its 95 % interval if it has one."""
    group = results["groups"][column.benchmark.group_name(column.setting)]
    value = group[f"{figure.metric},{figure.filter}"]
    interval = figure_interval(group, column.benchmark, figure)
    if interval is None:
        return f"{100 * value:.1f}"
    low, high = interval
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def figure_interval(
    group: dict, benchmark: Benchmark, figure: Figure
) -> tuple[float, float] | None:
    """Return a figure's 95 % interval, or None for a single document.

    It is Wilson's interval for a share of documents; otherwise it comes from the harness's
    standard error, which a single document does not have.
    """
    name = f"{figure.metric},{figure.filter}"
    value = group[name]
    if figure.is_share and benchmark.weight_by_size:
        documents = group["sample_count"][name]
        return intervals.wilson_interval(round(value * documents), documents)
    error = group[f"{figure.metric}_stderr,{figure.filter}"]
    if not isinstance(error, float) or not math.isfinite(error):
        return None
    margin = intervals.STANDARD_ERRORS * error
    return max(value - margin, 0.0), min(value + margin, 1.0)
