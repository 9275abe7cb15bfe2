"""Table 5 of the report: python -m alignjax.evaluate --run runs/sft runs/ppo --tasks mmlu,gsm8k:... --shots both

Each model answers all benchmarks, zero-shot and few-shot, through lm-evaluation-harness; then comes the table, with the
report's figures beneath. In its directory a model has results.json, in the harness' own format, samples_TASK.jsonl, where
each answer stands with what was taken out of it and the verdict, and the answers themselves, from which a run that was cut
off goes on.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
from pathlib import Path
from unittest import mock

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from alignjax import inference
from alignjax.config import UserError, nearest
from alignjax.evals import calibration, registry
from alignjax.evals.adapter import AlignJax
from alignjax.evals.report import REPORT
from alignjax.machine import console, jsonl
from alignjax.machine import workdir as workdirs
from alignjax.machine.console import say
from alignjax.weights import checkpoint, locations, roles

Z = 1.96  # standard errors on either side of an estimate: its 95 % interval


def evaluate(arguments) -> None:
    """Everything that can be asked wrongly is looked at before a model is asked."""
    asked, outs = parse(arguments.tasks), places(arguments.run, arguments.out)
    settings = {"zero": ("zero",), "few": ("few",), "both": ("zero", "few")}[arguments.shots]
    columns = [
        (name, setting)
        for name in asked
        for setting in settings
        if setting in registry.BENCHMARKS[name].headline
    ]
    if not columns:
        raise UserError(f"--shots {arguments.shots}: none of {', '.join(asked)} has that setting")
    with quietly():
        manager = TaskManager(include_defaults=False, include_path=registry.include_paths(asked))
        groups = [
            registry.BENCHMARKS[name].group(setting, arguments.data_dir or None, asked[name])
            for name, setting in columns
        ]
        loaded = list(registry.load(manager, groups)["groups"].values())
        for spec in arguments.run:
            check(spec)
        found = {
            spec: answered(spec, out, manager, loaded, arguments) for spec, out in outs.items()
        }
    say("\n\n".join(tables(found, columns, arguments.examples)))
    say("\n".join(f"results and answers of {spec} in {out}" for spec, out in outs.items()))


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """{benchmark: subjects, none named being all} of "mmlu,bbh:word_sorting+date_understanding"."""
    out = {}
    for part in filter(None, text.split(",")):
        name, _, subjects = part.partition(":")
        if name not in registry.BENCHMARKS:
            raise UserError(
                f"--tasks {name}: no such benchmark{nearest(name, list(registry.BENCHMARKS))}"
            )
        out[name] = tuple(filter(None, subjects.split("+")))
    if not out:
        raise UserError(f"--tasks {text!r}: some of {', '.join(registry.BENCHMARKS)} wanted")
    return out


def places(specs: list[str], out: str | None) -> dict[str, Path]:
    """{model: where its results go}: DIR/benchmarks of a run, else --out, or directories in --out of several."""
    if out is not None:
        names = {spec: spec.removeprefix("hf://").strip("/").replace("/", "__") for spec in specs}
        return {
            spec: Path(out) / name if len(specs) > 1 else Path(out) for spec, name in names.items()
        }
    for spec in specs:
        if (
            spec.startswith("hf://")
            or not workdirs.is_local(workdirs.resolve(spec))
            or not locations.is_run(Path(spec))
        ):
            raise UserError(
                f"--run {spec}: not a run in a local directory, so its results need a place: --out DIR"
            )
    return {spec: Path(spec) / "benchmarks" for spec in specs}


def check(spec: str) -> Path:
    """The directory of a language model, there and complete."""
    directory = locations.local_directory(spec)
    if locations.is_run(directory):
        stage = locations.read_config(directory)["stage"]
        if (stage, "lm") not in roles.CHECKPOINT_ITEMS:
            raise UserError(
                f"--run {spec}: a language model is wanted, this run's stage is {stage!r}"
            )
        if not (directory / "summary.json").exists():
            raise UserError(
                f"--run {spec}: this run is not complete; the command that began it goes on"
            )
    return directory


def answered(spec: str, out: Path, manager, groups: list, arguments) -> dict:
    """The harness' results of one model, whose parameters are let go at the end, before the next model's come."""
    model = AlignJax(
        spec,
        arguments.slots,
        arguments.dtype,
        arguments.microbatch_tokens or 4096,
        max_length=arguments.max_length,
    )
    chat = templated(arguments.template, check(spec), model.tokenizer, spec)
    say(f"{spec}: {len(groups)} groups of tasks, {'with' if chat else 'without'} the chat template")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out}: no directory for results can be made there ({error.strerror}); name another by --out"
        ) from None
    answers = str(out / f"answers-{fingerprint(spec, model)}")
    results = lm_eval.simple_evaluate(
        model,
        tasks=groups,
        limit=arguments.examples,
        use_cache=answers,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=manager,
        confirm_run_unsafe_code=True,
    )
    dump = functools.partial(json.dumps, default=handle_non_serializable, ensure_ascii=False)
    for task, rows in results.pop("samples").items():
        text = jsonl.dumps(rows, default=handle_non_serializable, ensure_ascii=False)
        workdirs.write_atomically(out / f"samples_{task.replace('::', '_')}.jsonl", text)
    workdirs.write_atomically(out / "results.json", dump(results, indent=1))
    return results


def templated(wanted: str, directory: Path, tokenizer, spec: str) -> bool:
    """Whether prompts go through the chat template; "auto": if there is one, and the model was trained on conversations."""
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
    """Of what answers depend on besides the question: the answers kept of another checkpoint or type are not these."""
    directory = locations.local_directory(spec)
    step = checkpoint.newest(directory).name if locations.is_run(directory) else ""
    facts = [
        str(directory.absolute()),
        step,
        model.asked.model.architecture.dtype,
        model.max_length,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def quietly():
    """Without the harness' own bars and notes, one for each of its many tasks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    silent = lambda items, **_: items
    try:
        with (
            mock.patch("lm_eval.api.task.tqdm", silent),
            mock.patch("lm_eval.api.model.tqdm", silent),
        ):
            yield
    finally:
        logger.setLevel(level)


def tables(found: dict[str, dict], columns: list[tuple[str, str]], limit: int | None) -> list[str]:
    """Table 5 of {model: results}, the report's rows beneath; and a table for each benchmark that has several figures."""
    what = "in % [95 % interval], by number of examples shown"
    what += f"; the first {limit} of each task" if limit else ""
    few = [(name, setting) for name, setting in columns if not registry.BENCHMARKS[name].more]
    out = []
    if few:
        heads = [
            f"{registry.BENCHMARKS[name].title} {shots(name, setting)}" for name, setting in few
        ]
        lines = [
            (spec, [cell(results, *c, registry.BENCHMARKS[c[0]].headline[c[1]]) for c in few])
            for spec, results in found.items()
        ]
        lines += [
            (f"the report's {model}", [f"{row[c]:.1f}" if c in row else "-" for c in few])
            for model, row in REPORT.items()
            if any(c in row for c in few)
        ]
        out.append(console.grid(what, ("", heads), lines))
    for name in dict.fromkeys(name for name, setting in columns if (name, setting) not in few):
        benchmark = registry.BENCHMARKS[name]
        lines = [
            (
                f"{title}, {shots(name, setting)}",
                [cell(results, name, setting, figure) for results in found.values()],
            )
            for _, setting in (c for c in columns if c[0] == name)
            for title, figure in ((benchmark.title, benchmark.headline[setting]), *benchmark.more)
        ]
        out.append(console.grid(f"{name}, {what}", ("", list(found)), lines))
    return out


def shots(name: str, setting: str) -> int:
    return registry.BENCHMARKS[name].shots if setting == "few" else 0


def cell(results: dict, name: str, setting: str, figure) -> str:
    """A figure in % with its 95 % interval: Wilson's of a share of documents, else by the harness' standard error."""
    group = results["groups"][f"{name}-{shots(name, setting)}shot"]
    value, error = (group[f"{figure.metric}{which},{figure.filter}"] for which in ("", "_stderr"))
    if figure.share and registry.BENCHMARKS[name].weight_by_size:
        n = group["sample_count"][f"{figure.metric},{figure.filter}"]
        interval = calibration.interval(round(value * n), n)
    elif isinstance(error, float) and math.isfinite(error):
        interval = max(value - Z * error, 0.0), min(value + Z * error, 1.0)
    else:  # of a single document there is no error
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
