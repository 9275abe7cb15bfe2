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
from tqdm import tqdm

from alignjax import checkpoint, metrics, roles
from alignjax import workdir as workdirs
from alignjax.command import say
from alignjax.config import UserError, nearest
from alignjax.evals import registry, sandbox
from alignjax.evals.adapter import AlignJax
from alignjax.evals.report import REPORT

Z = 1.96  # standard errors on either side of an estimate: its 95 % interval


def evaluate(arguments) -> None:
    """Everything that can be asked wrongly is looked at before a model is asked."""
    asked, outs = parse(arguments.tasks), places(arguments.run, arguments.out)
    settings = {"zero": ("zero",), "few": ("few",), "both": ("zero", "few")}[arguments.shots]
    columns = [
        (name, setting) for name in asked for setting in settings if setting in registry.BENCHMARKS[name].headline
    ]
    if not columns:
        raise UserError(f"--shots {arguments.shots}: none of {', '.join(asked)} has that setting")
    if "humaneval" in asked:
        sandbox.check()
    with quietly():
        manager = TaskManager(include_defaults=False, include_path=registry.include_paths(asked))
        groups = [
            registry.BENCHMARKS[name].group(setting, arguments.data_dir or None, asked[name])
            for name, setting in columns
        ]
        registry.load(manager, groups)
        for spec in arguments.run:
            check(spec)
        found = {spec: answered(spec, out, manager, groups, arguments) for spec, out in outs.items()}
    say(table(found, columns, arguments.examples))
    say("\n".join(f"results and answers of {spec} in {out}" for spec, out in outs.items()))


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """{benchmark: subjects, none named being all} of "mmlu,bbh:word_sorting+date_understanding"."""
    out = {}
    for part in filter(None, text.split(",")):
        name, _, subjects = part.partition(":")
        if name not in registry.BENCHMARKS:
            raise UserError(f"--tasks {name}: no such benchmark{nearest(name, list(registry.BENCHMARKS))}")
        out[name] = tuple(filter(None, subjects.split("+")))
    if not out:
        raise UserError(f"--tasks {text!r}: some of {', '.join(registry.BENCHMARKS)} wanted")
    return out


def places(specs: list[str], out: str | None) -> dict[str, Path]:
    """{model: where its results go}: DIR/benchmarks of a run, else --out, or directories in --out of several."""
    if out is not None:
        names = {spec: spec.removeprefix("hf://").strip("/").replace("/", "__") for spec in specs}
        return {spec: Path(out) / name if len(specs) > 1 else Path(out) for spec, name in names.items()}
    for spec in specs:
        if spec.startswith("hf://") or not workdirs.is_local(workdirs.place(spec)) or not roles.is_run(Path(spec)):
            raise UserError(f"--run {spec}: not a run in a local directory, so its results need a place: --out DIR")
    return {spec: Path(spec) / "benchmarks" for spec in specs}


def check(spec: str) -> Path:
    """The directory of a model, there and complete."""
    directory = roles.local(spec)
    if roles.is_run(directory) and not (directory / "summary.json").exists():
        raise UserError(f"--run {spec}: this run is not complete; the command that began it goes on")
    return directory


def answered(spec: str, out: Path, manager, groups: list[dict], arguments) -> dict:
    """The harness' results of one model, whose parameters are let go at the end, before the next model's come."""
    model = AlignJax(spec, arguments.slots, arguments.dtype, arguments.microbatch_tokens or 4096,
                     max_length=arguments.max_length)  # fmt: skip
    chat = templated(arguments.template, check(spec), model.tokenizer, spec)
    say(f"{spec}: {len(groups)} groups of tasks, {'with' if chat else 'without'} the chat template")
    out.mkdir(parents=True, exist_ok=True)
    results = lm_eval.simple_evaluate(model, tasks=list(registry.load(manager, groups)["groups"].values()),
                                      limit=arguments.examples, use_cache=str(out / f"answers-{fingerprint(spec, model)}"),
                                      apply_chat_template=chat, fewshot_as_multiturn=chat, task_manager=manager,
                                      confirm_run_unsafe_code=True)  # fmt: skip
    dump = functools.partial(json.dumps, default=handle_non_serializable, ensure_ascii=False)
    for task, rows in results.pop("samples").items():
        workdirs.write(out / f"samples_{task.rpartition('::')[2]}.jsonl", "\n".join(map(dump, rows)))
    workdirs.write(out / "results.json", dump(results, indent=1))
    return results


def templated(wanted: str, directory: Path, tokenizer, spec: str) -> bool:
    """Whether prompts go through the chat template; "auto": if there is one, and the model was trained on conversations."""
    if wanted == "none":
        return False
    if not tokenizer.chat_template:
        if wanted == "chat":
            raise UserError(f"--template chat: the tokenizer of {spec} has no chat template")
        return False
    return wanted == "chat" or roles.stored(directory).get("data.kind") != "text"


def fingerprint(spec: str, model: AlignJax) -> str:
    """Of what answers depend on besides the question: the answers kept of another checkpoint or type are not these."""
    directory = roles.local(spec)
    step = checkpoint.newest(directory).name if roles.is_run(directory) else ""
    facts = [str(directory.absolute()), step, model.inference.model.dtype, model.max_length]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def quietly():
    """Without the harness' own bars and notes, one for each of its many tasks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    silent = functools.partial(tqdm, disable=True)
    try:
        with mock.patch("lm_eval.api.task.tqdm", silent), mock.patch("lm_eval.api.model.tqdm", silent):
            yield
    finally:
        logger.setLevel(level)


def table(found: dict[str, dict], columns: list[tuple[str, str]], limit: int | None) -> str:
    """Figures in % of {model: results}, each with half of its 95 % interval, and the report's."""
    heads, cells = [], {spec: [] for spec in found}
    for name, setting in columns:
        benchmark = registry.BENCHMARKS[name]
        shots = benchmark.shots if setting == "few" else 0
        metric, chosen = benchmark.headline[setting]
        heads.append(f"{benchmark.title} {shots}")
        for spec, results in found.items():
            group = results["groups"][f"{name}-{shots}shot"]
            figure, error = group[f"{metric},{chosen}"], group[f"{metric}_stderr,{chosen}"]
            known = isinstance(error, float) and math.isfinite(error)
            cells[spec].append(f"{100 * figure:.1f}" + (f" ±{100 * Z * error:.1f}" if known else ""))
    lines = list(cells.items())
    lines += [(f"the report's {model}", [f"{row[c]:.1f}" if c in row else "-" for c in columns])
              for model, row in REPORT.items() if any(c in row for c in columns)]  # fmt: skip
    what = "accuracy in % ± half of the 95 % interval, by number of examples shown"
    return metrics.grid(what + (f"; the first {limit} of each task" if limit else ""), ("", heads), lines)
