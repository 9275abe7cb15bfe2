"""Run a config, after its parents.

python -m alignjax.train --config ppo.py --config.ppo.kl_coef=0.1 --workdir DIR

From top to bottom: arguments, config, parents, then mesh, tokenizer and stage, then the loop and
the summary. The same command again resumes the run, exact to the bit, or says that it is complete.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from alignjax import config as configs
from alignjax.algorithms import ppo_plugins
from alignjax.algorithms.registry import STAGES
from alignjax.algorithms.stage import RunInputs, Stage
from alignjax.config import Config, UserError
from alignjax.machine import console, jsonl, outputs, processes, sharding
from alignjax.machine import workdir as workdirs
from alignjax.machine.allocator import keep_memory
from alignjax.machine.arguments import Parser
from alignjax.machine.compilation_cache import keep_programs
from alignjax.machine.console import say
from alignjax.machine.failures import tracebacks_in
from alignjax.machine.lock import exclusive_use
from alignjax.machine.precision import products_of
from alignjax.machine.profile import Compilations, Phases
from alignjax.machine.signals import Signals, watch_for_preemption, watch_lifeline
from alignjax.models import attention
from alignjax.planning import remat
from alignjax.runs import advice, record_checks, records, tracker
from alignjax.runs import log as run_log
from alignjax.runs.claim import (
    check_same_parents,
    check_workdir,
    claim_workdir,
    is_complete,
    prolong,
)
from alignjax.runs.evaluating import EvaluationProgress
from alignjax.runs.lineage import adopt_architecture, check_parent, parent_of
from alignjax.runs.loop import Loop
from alignjax.runs.records import Records
from alignjax.runs.tokenizers import choose_tokenizer
from alignjax.weights import locations
from alignjax.weights.imported import inherit

__all__ = ["fit", "main", "parent_of"]


@dataclass(frozen=True, kw_only=True)
class Session:
    """What one command shares among the runs that it makes."""

    signals: Signals
    say: Callable[[str], None]
    wandb_project: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    The code is 0, also after SIGTERM and a save, 130 after an interrupt and a save, or one of
    `machine.failures`. With several processes, an error in one ends all of them, with its code.
    """
    return console.run_command(lambda: run_from_arguments(argv))


def run_from_arguments(argv: Sequence[str] | None) -> None:
    """Parse the command line and train."""
    arguments, overrides = parse_arguments(argv)
    with processes.one_run(arguments.distributed):
        # Not before JAX's distributed runtime, which takes SIGTERM for itself. These handlers
        # stay to the end of the process.
        signals = Signals(ends_process=True)
        try:
            config = configs.load(arguments.config, overrides)
            fit(config, arguments.workdir, overrides, arguments.profile, arguments.wandb, signals)
        finally:
            signals.stop_watching()


def parse_arguments(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the arguments and the overrides {dotted field: text} of a command line."""
    parser = Parser(
        prog="python -m alignjax.train",
        description="Run a config, after its parents.",
        epilog="Set any field of the config by --config.FIELD=VALUE.",
    )
    parser.add_argument(
        "--config", required=True, help="NAME.py[:variant], a path or a file of configs/"
    )
    parser.add_argument(
        "--workdir",
        help="the run's directory (default: runs/NAME); parents that must be run go beside it",
    )
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,PROCESSES,INDEX",
        help="join several processes; without a value, ask the cluster's environment",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print where the time of each step goes, and trace a few steps to WORKDIR/profile",
    )
    parser.add_argument(
        "--wandb",
        default="",
        metavar="PROJECT",
        help="log to this Weights & Biases project too; its own variables, "
        "such as WANDB_MODE=offline, apply",
    )
    arguments, rest = parser.parse_known_args(argv)
    return arguments, configs.parse_overrides(rest)


def fit(
    config: Config,
    workdir: str | Path | None = None,
    fixed: Collection[str] = (),
    profile: bool = False,
    wandb: str = "",
    signals: Signals | None = None,
) -> Records:
    """Train a config, after its parents, and return the records of the run.

    A run that was interrupted resumes; one that is complete is only read. Parents that are runs
    or checkpoints determine the architecture.

    Args:
      config: what to train; it is not changed.
      workdir: directory of the run; default: runs/NAME.
      fixed: fields that must keep their values, such as "model.layers": a parent with another
        value is an error.
      profile: measure the phases of each step, and trace a few steps.
      wandb: project of Weights & Biases to log to as well.
      signals: pass the caller's `Signals` if it installs its own handlers.

    Raises:
      UserError: for a user's mistake.
      alignjax.machine.processes.Stopped: after a first interrupt or SIGTERM, once the run is
        saved.
    """
    config = copy.deepcopy(config)
    configs.check(config)
    if wandb and jax.process_index() == 0:
        tracker.import_wandb()  # fail now, not after hours of training
    with contextlib.nullcontext(signals) if signals else Signals() as active_signals:
        keep_programs()
        directory = workdirs.resolve(workdir or Path("runs") / config.name)
        watch_for_preemption(active_signals.announce_end)
        watch_lifeline(active_signals.announce_end)
        session = Session(signals=active_signals, say=say, wandb_project=wandb)
        workdirs.check_files(directory)
        with exclusive_use(directory, read_only=is_complete(config, directory)):
            return run(config, directory, fixed, session, profile)


def run(
    config: Config,
    workdir: Path,
    fixed: Collection[str],
    session: Session,
    profile: bool = False,
) -> Records:
    """Run a config to its end, after its parents, and print its result.

    Parents are never profiled: that would slow them, and each can be profiled by itself.
    """
    mesh = sharding.make_mesh(config.mesh)
    keep_memory()
    adopt_architecture(config, fixed)
    check_workdir(config, workdir, may_grow=True)
    if is_complete(config, workdir):
        session.say(f"{config.name}: complete, in {workdir}")
    else:
        if config.stage == "ppo" and any(
            map(configs.is_config_file, configs.parent_specs(config).values())
        ):
            # Parents may train for hours before the run itself finds a mistake in such code.
            ppo_plugins.try_before_parents(config, session.say)
        parents = prepare_parents(config, workdir, session)
        with jax.set_mesh(mesh), products_of(config.model.dtype), Compilations() as compilations:
            train(config, workdir, mesh, parents, session, compilations, profile)
    return report(workdir, session)


def train(
    config: Config,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    parents: dict[str, Path],
    session: Session,
    compilations: Compilations,
    profile: bool,
) -> None:
    """Train, evaluate and write the summary of a run whose parents are complete."""
    attention.check(config.model)
    resolve_remat(config, workdir, mesh, session.say)
    tokenizer = choose_tokenizer(config, workdir, parents, session.say)
    phases = Phases(config.name, profile, workdir / "profile", session.say)
    imported = inherit(workdir, parents)
    imported.check_ends(config.model.vocab_size)
    inputs = RunInputs(
        parents=parents,
        tokenizer=tokenizer,
        say=session.say,
        phases=phases,
        imported=imported,
        evaluation_progress=EvaluationProgress(config.name, session.signals),
    )
    stage = STAGES[config.stage].load(config, mesh, inputs)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = f"{mesh.size} {jax.default_backend()} device(s) ({axes})"
    session.say(f"{config.name}: {stage.num_steps} steps on {devices}, in {workdir}")
    # Only now, so that a mistake in config or data leaves no half-claimed directory.
    claim_workdir(config, inputs, workdir)
    prolong(config, workdir, session.say)
    with (
        tracebacks_in(workdir),
        tracker.tracking(session.wandb_project, config, workdir, session.say) as tracked,
    ):
        loop = Loop(
            config=config,
            workdir=workdir,
            stage=stage,
            signals=session.signals,
            phases=phases,
            compilations=compilations,
            say=session.say,
            tracker=tracked,
        )
        state = loop.run()
        session.say(f"{config.name}: {compilations}")
        session.say(f"{config.name}: evaluating")
        evaluation = stage.evaluate(state)
        check_figures(config, evaluation.figures)
        if tracked:
            tracked.summary(evaluation.figures)
    if jax.process_index() == 0:
        if evaluation.rows:
            outputs.write_text(workdir / "responses.jsonl", jsonl.dumps(evaluation.rows))
        write_summary(config, workdir, stage, evaluation.figures)
    processes.wait_for_all("summary")


def resolve_remat(
    config: Config, workdir: Path, mesh: jax.sharding.Mesh, say: Callable[[str], None]
) -> None:
    """Give `model.remat="auto"` its level: that of the run if it resumes, or the one that fits."""
    if config.model.remat != remat.AUTO:
        return
    if (workdir / "config.json").exists():
        config.model.remat = locations.read_config(workdir)["model.remat"]
        say(f"{config.name}: remat: {config.model.remat}, as when the run began")
        return
    choice = remat.choose_here(config, mesh)
    config.model.remat = choice.level
    say(f"{config.name}: {choice}")


def check_figures(config: Config, figures: dict[str, float]) -> None:
    """Raise UserError if a figure of the final evaluation is not finite."""
    names = run_log.not_finite(figures)
    if names:
        raise UserError(
            f"{config.name}: {names[0]} is {figures[names[0]]} in the evaluation; "
            "the run is not complete"
        )


def write_summary(config: Config, workdir: Path, stage: Stage, figures: dict[str, float]) -> None:
    """Write summary.json, which marks the run as complete."""
    timing = jsonl.read(workdir / "timing.jsonl")
    facts = {
        "name": config.name,
        "stage": config.stage,
        "steps": stage.num_steps,
        "seed": config.seed,
        "training_seconds": round(sum(row["seconds"] for row in timing), 1),
    }
    summary = facts | figures | {"table": stage.table(figures)}
    outputs.write_text(workdir / "summary.json", json.dumps(summary, indent=1))


def report(workdir: Path, session: Session) -> Records:
    """Print the result and the warnings of a complete run, and return its records."""
    run_records = records.read(workdir)
    summary = run_records.summary
    record_checks.check_result(summary, str(workdir / "summary.json"))
    title = f"{summary['name']}: {summary['steps']} steps in {summary['training_seconds']:.0f} s"
    session.say(console.table(title, summary["table"]))
    warnings = advice.advise(run_records.config, run_records.metrics, run_records.evaluations)
    for warning in warnings:
        session.say(advice.brief(summary["name"], warning))
    return run_records


def prepare_parents(config: Config, workdir: Path, session: Session) -> dict[str, Path]:
    """Return role -> directory of each parent, all complete.

    A parent that is a config is reused from beside `workdir`, or run there first, with the
    seed, the mesh and the model of its child.
    """
    parents = {}
    specs = configs.parent_specs(config)
    for role, spec in specs.items():
        if not configs.is_config_file(spec):
            parents[role] = locations.local_directory(spec)
            check_parent(config, role, spec, parents[role])
    complete = {}  # spec -> directory: several roles may have one parent
    for role, spec in specs.items():
        if configs.is_config_file(spec):
            if spec not in complete:
                complete[spec] = run_parent(config, spec, workdir, session)
            parents[role] = complete[spec]
            check_parent(config, role, spec, parents[role])
    check_same_parents(workdir, parents)
    return {role: parents[role] for role in specs}


def run_parent(config: Config, spec: str, workdir: Path, session: Session) -> Path:
    """Return the directory of a parent that is a config, complete."""
    parent = configs.load(spec)
    directory = workdir.parent / parent.name
    if directory == workdir:
        raise UserError(f"--workdir {workdir}: that is where the parent {spec} goes")
    parent.seed = config.seed
    parent.mesh = config.mesh
    parent.model = dataclasses.replace(config.model)
    parent.template_date = config.template_date
    parent.special_tokens_in_content = config.special_tokens_in_content
    if (directory / "config.json").exists():
        parent.seed = locations.read_config(directory).get("seed", config.seed)
    configs.check(parent)
    if (directory / "summary.json").exists():
        runtime = tuple(f"model.{name}" for name in locations.CHILDS_OWN)
        check_workdir(parent, directory, ignore=runtime)
        session.say(
            f"{config.name}: {spec} is complete in {directory} (seed {parent.seed}), reused"
        )
    else:
        session.say(f"{config.name}: {spec} comes first")
        with exclusive_use(directory):
            run(parent, directory, (), session)
    return directory


if __name__ == "__main__":
    console.leave(main())
