"""The runs of a study: every arm with every seed, each as a process of its own."""

import concurrent.futures
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tqdm import tqdm

from alignjax import config as configs
from alignjax.claims import BestOf, Study
from alignjax.config import UserError
from alignjax.machine import console, lock, outputs, signals
from alignjax.runs.claim import check_workdir
from alignjax.runs.lineage import adopt_architecture

LONGEST_NAME = 100  # characters of a directory's name
BAR_REFRESH = 60  # seconds between two lines of the bar where there is no terminal
LOCK_POLL = 1.0  # seconds between two looks at a lock
LOG_MARK = "alignjax.study: "  # the beginning of a log
KEPT_OF_NAME = 80  # characters of a longer name that are kept before its digest


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run: one arm with one seed."""

    arm: str
    seed: int
    workdir: Path
    command: tuple[str, ...]
    steps: int

    @property
    def complete(self) -> bool:
        return (self.workdir / "summary.json").exists()

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def command_line(self) -> str:
        return shlex.join(self.command)

    def steps_written(self) -> int:
        metrics = self.workdir / "metrics.jsonl"
        rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        return min(rows, self.steps)


def plan_trials(study: Study, seeds: int, workdir: Path) -> list[Trial]:
    """Return every arm with every seed.

    Raises `UserError` for an arm whose config is not valid, and for a directory that holds
    another run than the trial's.
    """
    return [plan_trial(study, arm, seed, workdir) for seed in range(seeds) for arm in study.arms]


def plan_trial(study: Study, arm: str, seed: int, workdir: Path) -> Trial:
    fields = study.arms[arm]
    if isinstance(fields, BestOf):
        return plan_best_of(study, arm, seed, workdir)
    fields = dict(fields)
    spec = fields.pop("config", study.config)
    overrides = {name: str(value) for name, value in fields.items()}
    config = configs.load(spec, overrides | {"seed": str(seed)})
    directory = workdir / str(seed) / directory_name(config.name, overrides)
    adopt_architecture(config, overrides)
    check_workdir(config, directory)
    options = [f"--config.{name}={value}" for name, value in {"seed": seed, **overrides}.items()]
    program = ["python", "-m", "alignjax.train", "--config", spec]
    return Trial(
        arm=arm,
        seed=seed,
        workdir=directory,
        command=(*program, *options, "--workdir", str(directory)),
        steps=config.steps,
    )


def plan_best_of(study: Study, arm: str, seed: int, workdir: Path) -> Trial:
    """Return a trial that trains nothing and answers the config's held-out prompts.

    Raises `UserError` if policy and reward model are not runs of configs.
    """
    best_of = study.arms[arm]
    config = configs.load(study.config, {"seed": str(seed)})
    runs = workdir / str(seed)
    directories = {}
    for role in ("policy", "reward"):
        spec = config.parents.get(role, "")
        if not configs.is_config_file(spec):
            raise UserError(f"arm {arm}: parents.{role}={spec!r} of {study.config} is no config")
        directories[role] = runs / configs.load(spec).name
    directory = runs / directory_name(f"best-of-{best_of.n}", {"of": config.name})
    options = {
        "policy": directories["policy"],
        "reward": directories["reward"],
        "prompts": config.data.heldout,
        "n": best_of.n,
        "examples": config.data.examples,
        "temperature": config.ppo.temperature,
        "top_p": config.ppo.top_p,
        "max_tokens": config.ppo.response_length,
        "out": directory,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return Trial(
        arm=arm,
        seed=seed,
        workdir=directory,
        command=("python", "-m", "alignjax.evals.best_answers", *words),
        steps=0,
    )


def directory_name(name: str, overrides: dict[str, str]) -> str:
    """Return a run's directory: its config's name and the fields that differ.

    Arms of any study that are the same run share a directory. A digest ends a name that is too
    long.
    """
    fields = [f"{field}={value}" for field, value in sorted(overrides.items())]
    text = ",".join([name, *fields])
    if len(text) >= LONGEST_NAME:
        text = f"{text[:KEPT_OF_NAME]}-{zlib.crc32(text.encode()):08x}"
    return re.sub(r"[^\w.=+,-]+", "_", text)


def run_trials(name: str, trials: list[Trial], jobs: int) -> None:
    """Run the trials that are not complete, `jobs` seeds at once, each on cores of its own.

    The runs of a seed follow one another, because they share their parents. After an error or an
    interrupt the runs at work save and end before the exception goes on.
    """
    seeds = sorted({trial.seed for trial in trials})
    jobs = min(jobs, len(seeds))
    runner = TrialRunner(jobs)
    total_steps = sum(trial.steps for trial in trials)
    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        sigterm_as_interrupt(),
        console.progress_bar(total_steps, name, "step", log_refresh=BAR_REFRESH) as bar,
    ):
        pending = set()
        for seed in seeds:
            of_seed = [trial for trial in trials if trial.seed == seed]
            pending.add(pool.submit(runner.run_seed, of_seed))
        try:
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, timeout=1, return_when=concurrent.futures.FIRST_EXCEPTION
                )
                update_bar(bar, trials)
                for future in done:
                    future.result()
        except BaseException:
            runner.stop()
            raise
        update_bar(bar, trials)


class Children:
    """The processes of the runs at work."""

    def __init__(self):
        self.stopping = threading.Event()
        self.processes: set[subprocess.Popen] = set()

    def add(self, process: subprocess.Popen) -> None:
        """Take a process that has just started."""
        self.processes.add(process)
        if self.stopping.is_set():  # in the moment between the start and now
            process.terminate()

    def discard(self, process: subprocess.Popen) -> None:
        """Forget a process that has ended."""
        self.processes.discard(process)

    def stop(self) -> None:
        """Have all runs save and end, also one that is just starting."""
        self.stopping.set()
        for process in list(self.processes):
            process.terminate()


class TrialRunner:
    """Runs seeds on several threads, each with its own share of the cores."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.free_shares = list(range(jobs))
        self.children = Children()
        self.cores: list[int] = []
        if hasattr(os, "sched_getaffinity"):
            self.cores = sorted(os.sched_getaffinity(0))

    def run_seed(self, trials: list[Trial]) -> None:
        """Run the trials of one seed that are not complete, one after the other."""
        share = self.free_shares.pop()
        try:
            for trial in trials:
                self.run_trial(trial, share)
        finally:
            self.free_shares.append(share)

    def run_trial(self, trial: Trial, share: int) -> None:
        """Run a trial on a share of the cores, unless it is complete or all are to stop."""
        self.wait_for_others(trial)
        if trial.complete or self.children.stopping.is_set():
            return
        if (trial.workdir / "config.json").exists():
            written = f"{trial.steps_written()} of {trial.steps} steps are written"
            console.say(f"{trial.label}: was interrupted and goes on, {written}")
        launch(trial, self.cores[share :: self.jobs], self.children)

    def wait_for_others(self, trial: Trial) -> None:
        """Wait while another process, such as that of a study that was killed, makes the run."""
        holder = lock.holder(trial.workdir)
        if holder:
            console.say(f"{trial.label}: waits for {holder}, which is still at work on it")
        while holder and not self.children.stopping.wait(LOCK_POLL):
            holder = lock.holder(trial.workdir)

    def stop(self) -> None:
        """Start no further run, and have those at work save and end."""
        self.children.stop()


class Lifeline(NamedTuple):
    """The end of a pipe by which a child knows that this process is alive."""

    descriptor: int
    environment: dict[str, str]  # of the child, which says where the pipe is


@contextlib.contextmanager
def lifeline() -> Iterator[Lifeline]:
    """Yield a lifeline for one child. However this process ends, the child saves and ends too."""
    reading, writing = os.pipe()
    try:
        yield Lifeline(reading, os.environ | {signals.LIFELINE: str(reading)})
    finally:
        os.close(reading)
        os.close(writing)


def launch(trial: Trial, cores: list[int], children: Children) -> None:
    """Run a trial as a process on these cores; while it runs, it is one of `children`.

    Raises `UserError` with the last line of its output if it ends before it is complete.
    """
    log = log_file(trial)
    with outputs.writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{LOG_MARK}{trial.command_line}\n")
    with log.open("ab") as file, lifeline() as line:
        process = subprocess.Popen(
            [sys.executable, *trial.command[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[line.descriptor],
            env=line.environment,
        )
        children.add(process)
        if cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, cores)
        code = process.wait()
        children.discard(process)
    if not trial.complete:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(
            f"{trial.label}: the run ended with code {code}: {lines[-1]} (all in {log})"
        )
    log.unlink()


def log_file(trial: Trial) -> Path:
    """Return where the output of a run goes: beside its directory, over no file but an old log."""
    log = trial.workdir.parent / f"{trial.workdir.name}.log"
    if log.is_symlink() or (log.exists() and not outputs.begins_with(log, LOG_MARK.encode())):
        return outputs.free_path(log)
    return log


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Have SIGTERM end a study in the same way as an interrupt."""
    previous = signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def update_bar(bar: tqdm, trials: list[Trial]) -> None:
    """Move the bar to the steps that are written, and show which runs are at work."""
    steps = [trial.steps_written() for trial in trials]
    at_work = [
        f"{trial.arm} {trial.seed}"
        for trial, count in zip(trials, steps, strict=True)
        if 0 < count < trial.steps
    ]
    bar.set_postfix_str(", ".join(at_work), refresh=False)
    bar.update(sum(steps) - bar.n)
