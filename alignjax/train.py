"""Run a config, its parents first: python -m alignjax.train --config ppo.py --config.ppo.kl_coef=0.1 --workdir DIR.

Top to bottom: arguments -> config -> parents -> mesh, tokenizer, stage -> loop -> save -> summary. The same command
again resumes, to the bit, or says that the run is complete.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from alignjax import config as configs
from alignjax.algorithms import lm, optimisation, ppo, ranking, rewards
from alignjax.algorithms.stage import Evaluation, StepDetails, StepOutput
from alignjax.config import Config, UserError
from alignjax.data import chat, mixture, toy
from alignjax.data import sources as data_sources
from alignjax.machine import console, jsonl, processes, sharding
from alignjax.machine import workdir as workdirs
from alignjax.machine.compilation_cache import keep_programs
from alignjax.machine.console import say
from alignjax.machine.lock import exclusive_use
from alignjax.machine.processes import Stopped
from alignjax.machine.profile import Compilations, Phases
from alignjax.machine.signals import Signals, watch_for_preemption
from alignjax.models import attention
from alignjax.runs import advice, environment, records, tracker
from alignjax.runs import log as run_log
from alignjax.runs.records import Records
from alignjax.weights import checkpoint, locations

CLAIMING = {
    "lock",
    "tokenizer",
    "tokenizer.partial",
    "config.partial",
}  # a run that was cut off there is begun anew
STAGES = {"lm": lm.build, "ranking": ranking.build, "ppo": ppo.build}


def main(argv=None) -> int:
    """The exit code: 0, also after SIGTERM and a save; 2 after a mistake of the user's; 130 after an interrupt and a save.

    Where there are several processes, an error in one ends all of them, with its code.
    """
    try:
        arguments, overrides = parse_arguments(argv)
        with processes.one_run(arguments.distributed):
            signals = Signals()  # not before jax.distributed, which takes SIGTERM for itself; to the end of the process
            config = configs.load(arguments.config, overrides)
            fit(config, arguments.workdir, overrides, arguments.profile, arguments.wandb, signals)
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if jax.process_index() == 0:
            print(f"alignjax: {stopped}", file=sys.stderr)
        return 0 if stopped.number == signal.SIGTERM else 128 + stopped.number
    return 0


def fit(
    config: Config,
    workdir: str | Path | None = None,
    fixed: Collection[str] = (),
    profile: bool = False,
    wandb: str = "",
    signals: Signals | None = None,
) -> Records:
    """Train as a config says, after its parents, in `workdir` (default: runs/NAME), and give what the run has left.

    What is there already isn't done again: a run that was cut off goes on, one that is complete is read. `config` isn't
    changed. Parents that are runs or checkpoints give their architecture; a field named in `fixed`, such as "model.layers",
    must be theirs already. `wandb` is a project of Weights & Biases to write to besides. A first interrupt or SIGTERM saves and
    raises `processes.Stopped`; a user's mistake is a UserError. `signals` are those of a caller that hears of them itself.
    """
    config = copy.deepcopy(config)
    configs.check(config)
    if wandb and jax.process_index() == 0:
        tracker.import_wandb()  # before the hours after which it would be missed
    with contextlib.nullcontext(signals) if signals else Signals() as signals:
        keep_programs()
        workdir = workdirs.resolve(workdir or Path("runs") / config.name)
        watch_for_preemption(lambda: signals.remember(signal.SIGTERM))
        with exclusive_use(workdir):
            return run(config, workdir, fixed, signals, profile, wandb)


def run(
    config: Config,
    workdir: Path,
    fixed: Collection[str],
    signals: Signals,
    profile: bool = False,
    project: str = "",
) -> Records:
    """Run a config to its end in `workdir`, after its parents; UserError or Stopped if it can't get there.

    Its parents are never profiled: that would slow what nobody asked about, and each can be asked for by itself. They too go
    to the `project` of Weights & Biases, if there is one, each as a run of its own.
    """
    mesh = sharding.make_mesh(config.mesh)
    adopt(config, fixed)
    compare(config, workdir)
    summary = workdir / "summary.json"
    if summary.exists():
        say(f"{config.name}: complete, in {workdir}")
    else:
        parents = resolve(config, workdir, signals, project)
        with jax.set_mesh(mesh), Compilations() as compilations:
            attention.check(config.model)
            tokenizer = tokenizer_of(config, workdir, parents)
            phases = Phases(config.name, profile, workdir / "profile", say)
            stage = STAGES[config.stage](config, mesh, parents, tokenizer, say, phases)
            shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
            devices = f"{mesh.size} {jax.default_backend()} device(s) ({shape})"
            say(f"{config.name}: {stage.steps} steps on {devices}, in {workdir}")
            keep(
                config, tokenizer, workdir
            )  # now that no mistake in config or data can leave it half made
            with tracker.tracking(project, config, workdir, say) as tracked:
                state = train(config, workdir, stage, signals, phases, compilations, tracked)
                say(f"{config.name}: {compilations}")
                say(f"{config.name}: evaluating")
                figures, responses = stage.evaluate(state)
                if bad := run_log.not_finite(figures):
                    raise UserError(
                        f"{config.name}: {bad[0]} is {figures[bad[0]]} in the evaluation; not complete"
                    )
                if tracked:
                    tracked.summary(figures)
        if jax.process_index() == 0:
            times = jsonl.read(workdir / "timing.jsonl")
            facts = {
                "name": config.name,
                "stage": config.stage,
                "steps": stage.steps,
                "seed": config.seed,
                "training_seconds": round(sum(row["seconds"] for row in times), 1),
            }
            if responses:
                workdirs.write_atomically(workdir / "responses.jsonl", jsonl.dumps(responses))
            workdirs.write_atomically(
                summary, json.dumps(facts | figures | {"table": stage.table(figures)}, indent=1)
            )
        together("summary")
    left = records.read(workdir)
    seconds = left.summary["training_seconds"]
    say(
        console.table(
            f"{config.name}: {left.summary['steps']} steps in {seconds:.0f} s",
            left.summary["table"],
        )
    )
    for warning in advice.advise(left.config, left.metrics, left.evaluations):
        say(advice.brief(config.name, warning))
    return left


def resolve(config: Config, workdir: Path, signals: Signals, project: str = "") -> dict[str, Path]:
    """role -> directory of each parent; one that is a config is reused from beside `workdir`, or run there first.

    A parent that is run takes its child's seed, mesh and model.
    """
    found, asked = {}, {}
    for role, spec in config.parents.items():
        if not is_config(spec):
            found[role] = locations.local_directory(spec)
            if locations.is_run(found[role]) and not (found[role] / "summary.json").exists():
                raise UserError(f"parents.{role}={spec}: this run is not complete")
    for role, spec in config.parents.items():
        if role in found:
            continue
        if spec not in asked:
            asked[spec] = beside(config, spec, workdir, signals, project)
        found[role] = asked[spec]
    return found


def is_config(spec: str) -> bool:
    return spec.partition(":")[0].endswith(".py")


def parent_of(run: Path, role: str) -> Path | None:
    """Where a run's parent of that role is, or was: one that is a config is beside the run. None if it has none."""
    spec = locations.read_config(run)["parents"].get(role)
    if spec is None:
        return None
    home = run.parent if run.name else run.absolute().parent
    return home / configs.load(spec).name if is_config(spec) else locations.local_directory(spec)


def beside(config: Config, spec: str, workdir: Path, signals: Signals, project: str = "") -> Path:
    """The directory of a parent that is a config, complete."""
    parent = configs.load(spec)
    directory = workdir.parent / parent.name
    if directory == workdir:
        raise UserError(f"--workdir {workdir}: that is where the parent {spec} goes")
    parent.seed, parent.mesh, parent.model = (
        config.seed,
        config.mesh,
        dataclasses.replace(config.model),
    )
    if (directory / "config.json").exists():
        parent.seed = locations.read_config(directory).get("seed", config.seed)
    configs.check(parent)
    if (directory / "summary.json").exists():
        compare(parent, directory, tuple(f"model.{name}" for name in locations.RUNTIME_FIELDS))
        say(f"{config.name}: {spec} is complete in {directory} (seed {parent.seed}), reused")
    else:
        say(f"{config.name}: {spec} comes first")
        with exclusive_use(directory):
            run(parent, directory, (), signals, project=project)
    return directory


def adopt(
    config: Config,
    fixed: Collection[str],
    architecture=lambda spec: locations.architecture(locations.local_directory(spec)),
) -> None:
    """Give the config the architecture of what its parents begin with, unless the user asks for another.

    The reward model's is its own affair: it may be another.
    """
    for parent in filter(
        None, (origin(spec) for role, spec in config.parents.items() if role != "reward")
    ):
        for name, value in dataclasses.asdict(architecture(parent)).items():
            if name in locations.RUNTIME_FIELDS:
                continue
            mine = getattr(config.model, name)
            if f"model.{name}" in fixed and mine != value:
                raise UserError(f"model.{name}={mine!r}, but the parent {parent} has {value!r}")
            setattr(config.model, name, value)
    configs.check(config)


def origin(spec: str) -> str | None:
    """The directory or hub name that a parent is, or that its own first parent begins with; None if that is a key."""
    if not is_config(spec):
        return spec
    return next(map(origin, configs.load(spec).parents.values()), None)


def compare(config: Config, workdir: Path, ignore: tuple[str, ...] = ()) -> None:
    """See that a work directory is free, or holds this run: nothing is overwritten. Another mesh may resume a run."""
    if (workdir / "config.json").exists():
        free = ("mesh.", "keep_checkpoints", "max_skipped", "ppo.eval_", *ignore)
        differs = configs.difference(config, locations.read_config(workdir), free)
        if differs:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(differs)}); name another --workdir"
            )
    elif workdir.exists() and {path.name for path in workdir.iterdir()} - CLAIMING:
        raise UserError(f"{workdir} is not empty and has no config.json; name another --workdir")


def tokenizer_of(config: Config, workdir: Path, parents: dict[str, Path]):
    """The tokenizer that the run has kept, else its parents', else the one it names, else one trained on its text.

    All roles but the reward share it: see `stages.rewards`.
    """
    sources = {role: path for role, path in parents.items() if role != "reward"}
    if (workdir / "config.json").exists():
        tokenizer = chat.load_tokenizer(workdir / "tokenizer")
    elif sources:
        if (config.tokenizer or config.chat_template) and all(
            map(locations.is_run, sources.values())
        ):
            raise UserError(
                f"tokenizer={config.tokenizer!r}, chat_template={config.chat_template!r}: the parents "
                f"{sorted(map(str, set(sources.values())))} are runs, which have their own"
            )
        tokenizers = {role: rewards.tokenizer_of(config, path) for role, path in sources.items()}
        first = next(iter(sources))
        tokenizer = tokenizers[first]
        for role in sources:
            if tokenizers[role].get_vocab() != tokenizer.get_vocab():
                raise UserError(
                    f"the tokenizers of {sources[first]} ({first}) and {sources[role]} ({role}) differ"
                )
    elif config.tokenizer:
        tokenizer = chat.load_tokenizer(
            locations.local_directory(config.tokenizer, weights=False), config.chat_template
        )
    else:
        if config.data.kind != "text":
            raise UserError(
                f"data.kind={config.data.kind!r} and no parent: a new tokenizer is trained on text only"
            )
        texts = toy.tokenizer_texts(config.seed)
        if not all(name.startswith("toy/") for name, _ in data_sources.parse(config.data.train)):
            texts = [
                row["text"]
                for rows in mixture.sets(config, "text", config.data.train, "", say).train
                for row in rows
            ]
        with tempfile.TemporaryDirectory() as directory:
            tokenizer = chat.train_tokenizer(texts, Path(directory), config.model.vocab_size)
    if len(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer has {len(tokenizer)} tokens"
        )
    return tokenizer


def keep(config: Config, tokenizer, workdir: Path) -> None:
    """Claim the work directory: the run's own copy of the tokenizer, then config.json."""
    if jax.process_index() == 0 and not (workdir / "config.json").exists():
        if workdirs.is_local(workdir):
            for name in ("tokenizer", "tokenizer.partial"):
                shutil.rmtree(workdir / name, ignore_errors=True)
            tokenizer.save_pretrained(workdir / "tokenizer.partial")
            (workdir / "tokenizer.partial").rename(workdir / "tokenizer")
        else:
            with workdirs.staging(workdir / "tokenizer") as staging:
                tokenizer.save_pretrained(staging.local)
        workdirs.write_atomically(workdir / "config.json", configs.to_json(config))
    together("keep")


def train(
    config: Config,
    workdir: Path,
    stage,
    signals: Signals,
    phases: Phases,
    compilations,
    tracked=None,
):
    """The loop: the state after the last step, which is the last checkpoint."""
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.keep_checkpoints)
    finite, files = jax.jit(optimisation.finite), workdirs.staging(workdir)
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(phases),
        files as staging,
        processes.reporting_errors(),
    ):
        found = checkpoints.restore(optimisation.to_items(stage.shapes), say)
        first, state = (
            (found[0], optimisation.from_items(found[1])) if found else (0, stage.start())
        )
        if found:
            say(f"{config.name}: goes on from step {first}")
        if jax.process_index() == 0:
            environment.record(workdir)
        adviser = advice.Adviser(dict(configs.flatten(config)))
        log = run_log.TrainingLog(
            staging.local,
            config.name,
            start=first,
            num_steps=stage.steps,
            progress_metrics=stage.shown,
            max_skipped=config.max_skipped,
            say=say,
            adviser=adviser,
            tracker=tracked,
        )
        with contextlib.closing(log):
            phases.begin(first, stage.steps)
            for i in range(first, stage.steps):
                if stage.watch and i and i % config.ppo.eval_every == 0:
                    log.evaluate(i, functools.partial(evaluation_of, stage, state))
                    phases.mark("evaluation")
                state, figures, late, batch = stage.step(state, i)
                output = StepOutput(
                    metrics=figures, details=functools.partial(details_of, late), batch=batch
                )
                log.write(i, output)
                last, stop = i + 1 == stage.steps, signals.received_anywhere()
                if last or stop or (i + 1) % config.checkpoint_every == 0:
                    log.flush()  # stops here if too many steps were skipped
                    staging.publish()
                    phases.mark("other")
                    state = stage.finish(state) if last else state
                    if not finite(state):  # a step by finite gradients may still overflow
                        raise UserError(
                            f"{config.name}: parameters or optimiser state are not finite after step {i}; stopped, "
                            "the last checkpoint is whole"
                        )
                    checkpoints.save(i + 1, optimisation.to_items(state))
                    phases.mark("save")
                costs = {
                    f"phases/{name}": round(seconds, 4)
                    for name, seconds in phases.end_step(i).items()
                }
                log.end_step(i, {"compilations": compilations.end_step(i), **costs})
                if stop:
                    checkpoints.close()
                    name = signal.Signals(signals.received).name
                    told = f"{name}: {config.name} saved at step {i + 1} of {stage.steps}; the same command goes on"
                    raise Stopped(told, signals.received)
        return state


def evaluation_of(stage, state) -> Evaluation:
    figures, rows = stage.watch(state)
    return Evaluation(figures=figures, rows=rows)


def details_of(late) -> StepDetails:
    metrics, samples = late()
    return StepDetails(metrics=metrics, samples=samples)


def together(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def parse_arguments(argv):
    """(arguments, {dotted field: text}) of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alignjax.train",
        allow_abbrev=False,
        description="Run a config, after its parents.",
        epilog="any field of the config: --config.FIELD=VALUE",
    )
    parser.add_argument(
        "--config", required=True, help="NAME.py[:variant], a path or a file of configs/"
    )
    parser.add_argument(
        "--workdir", help="default: runs/NAME; parents that have to be run go beside it"
    )
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,PROCESSES,INDEX",
        help="one process of several; without a value, what the cluster says of itself",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="say where each step's time goes; a trace of a few steps goes to WORKDIR/profile",
    )
    parser.add_argument(
        "--wandb",
        default="",
        metavar="PROJECT",
        help="write to a project of Weights & Biases too; its own variables, as WANDB_MODE=offline, hold",
    )
    arguments, rest = parser.parse_known_args(argv)
    return arguments, configs.parse_overrides(rest)


if __name__ == "__main__":
    sys.exit(main())
