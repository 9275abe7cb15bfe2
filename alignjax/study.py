"""A claim put to the test in the embedded world, over several seeds: python -m alignjax.study warmup --seeds 5

A study is a file of studies/, or any path: a Study whose arms are one config with other fields. Each arm is run
with each seed by the command that its table shows, in WORKDIR/SEED/; arms of any study that are the same run, and what
they begin with, are run once. The same command goes on where it was stopped, and does no finished run again.

OUT/study/NAME.json has every figure, NAME.png the picture, OUT/study.md all studies that OUT has.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

from alignjax import claims
from alignjax import config as configs
from alignjax.claims import Study, Trial
from alignjax.config import UserError
from alignjax.machine import console
from alignjax.machine import workdir as workdirs
from alignjax.runs import claim, lineage, records

STUDIES = configs.CONFIGS.parent / "studies"


def main(argv=None) -> int:
    """The exit code: 0; 2 after a mistake of the user's, or where a run failed; 130 after an interrupt."""
    try:
        arguments = parse(argv)
        studies = {name: load(name) for name in arguments.name}
        for name, study in studies.items():
            carry_out(
                name,
                study,
                arguments.seeds,
                arguments.jobs,
                Path(arguments.workdir),
                Path(arguments.out),
            )
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alignjax: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m alignjax.study",
        allow_abbrev=False,
        description="Put a claim to the test over several seeds.",
    )
    parser.add_argument(
        "name",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(known())}; all; or the path of a file",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on; default: 5")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="seeds at work at once, which share the cores; default: 1",
    )
    parser.add_argument(
        "--workdir", default="runs/study", help="where the runs go; default: runs/study"
    )
    parser.add_argument(
        "--out",
        default="runs",
        metavar="DIR",
        help="DIR/study.md, DIR/study/NAME.png and .json; default: runs",
    )
    arguments = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}={getattr(arguments, name)} must be at least 1")
    if arguments.name == ["all"]:
        arguments.name = known()
    return arguments


def known() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.py"))


def load(name: str) -> Study:
    """The study that a name or a path means, its arms' fields checked."""
    path = Path(name) if name.endswith(".py") else STUDIES / f"{name}.py"
    if not path.is_file():
        raise UserError(f"study {name}: no file {path}{configs.nearest(name, known())}")
    study = runpy.run_path(str(path)).get("study")
    if not isinstance(study, Study):
        raise UserError(f"study {name}: {path} has no `study`, an alignjax.claims.Study")
    trials(study, 1, Path())
    return study


def trials(study: Study, seeds: int, workdir: Path) -> list[Trial]:
    """Every arm with every seed; UserError for a config that isn't one, or a run that is there and is another."""
    out = []
    for seed in range(seeds):
        for arm, fields in study.arms.items():
            spec = fields.get("config", study.config)
            overrides = {key: str(value) for key, value in fields.items() if key != "config"}
            config = configs.load(spec, overrides | {"seed": str(seed)})
            directory = workdir / str(seed) / directory_of(config.name, overrides)
            lineage.adopt_architecture(config, overrides)
            claim.check_workdir(config, directory)
            given = (
                f"--config.{key}={value}" for key, value in {"seed": seed, **overrides}.items()
            )
            command = (
                "python",
                "-m",
                "alignjax.train",
                "--config",
                spec,
                *given,
                "--workdir",
                str(directory),
            )
            out.append(Trial(arm, seed, directory, command, config.steps))
    return out


def directory_of(name: str, overrides: dict[str, str]) -> str:
    """A run's directory: its config's name and the fields that differ; a digest where they are too long."""
    text = ",".join([name, *(f"{key}={value}" for key, value in sorted(overrides.items()))])
    return re.sub(
        r"[^\w.=+,-]+",
        "_",
        text if len(text) < 100 else f"{text[:80]}-{zlib.crc32(text.encode()):08x}",
    )


def carry_out(name: str, study: Study, seeds: int, jobs: int, workdir: Path, out: Path) -> None:
    """Run what of a study has not been run, and write what came out."""
    name, planned = Path(name).stem, trials(study, seeds, workdir)
    run_all(name, planned, jobs)
    mine = {arm: [trial for trial in planned if trial.arm == arm] for arm in study.arms}
    runs = {arm: [records.read(trial.workdir) for trial in some] for arm, some in mine.items()}
    found = {
        "name": name,
        "title": study.title,
        "claim": study.claim,
        "found": study.found,
        "seeds": seeds,
        "arms": {arm: claims.outcome(study, mine[arm], runs[arm]) for arm in study.arms},
    }
    (out / "study").mkdir(parents=True, exist_ok=True)
    claims.picture(study, found, runs).savefig(out / "study" / f"{name}.png", dpi=110)
    workdirs.write_atomically(out / "study" / f"{name}.json", json.dumps(found, indent=1) + "\n")
    workdirs.write_atomically(out / "study.md", claims.document(out))
    head, *lines = claims.cells(found)
    print(
        console.grid(
            f"{name}: {seeds} seeds, mean and half of the 95 % interval",
            (head[0], head[1:]),
            [(line[0], line[1:]) for line in lines],
        )
    )
    print(f"figures in {out / 'study' / name}.json, picture beside it, all in {out / 'study.md'}")


def run_all(name: str, planned: list[Trial], jobs: int) -> None:
    """The runs of each seed one after the other, for they share their parents; `jobs` seeds at once, on cores of their own."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    seeds = sorted({trial.seed for trial in planned})
    jobs = min(jobs, len(seeds))
    stop, children, free = threading.Event(), set(), list(range(jobs))

    def work(seed):
        place = free.pop()
        for trial in (t for t in planned if t.seed == seed):
            if not (trial.workdir / "summary.json").exists() and not stop.is_set():
                launch(trial, cores[place::jobs], children)
        free.append(place)

    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        terminated(),
        bar(name, planned) as show,
    ):
        pending = {pool.submit(work, seed) for seed in seeds}
        try:
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, 1, concurrent.futures.FIRST_EXCEPTION
                )
                show()
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            for child in list(children):  # each saves, and ends
                child.terminate()
            raise


def launch(trial: Trial, cores: list[int], children: set) -> None:
    """One run, as a process; UserError with its last words if it doesn't come to its end."""
    log = trial.workdir.parent / f"{trial.workdir.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *trial.command[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        children.add(child)
        if cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(child.pid, cores)
        code = child.wait()
        children.discard(child)
    if not (trial.workdir / "summary.json").exists():
        said = [line for line in log.read_text().splitlines() if line.strip()]
        raise UserError(
            f"{trial.arm}, seed {trial.seed}: the run ended with code {code}: {said[-1] if said else ''} (all in {log})"
        )
    log.unlink()


@contextlib.contextmanager
def terminated():
    """SIGTERM ends a study as an interrupt does."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def bar(name: str, planned: list[Trial]):
    """A bar over the steps of all runs, and what brings it up to date."""
    total = sum(trial.steps for trial in planned)
    with console.progress_bar(total, name, "step", log_refresh=60) as shown:

        def show():
            counts = [
                min(written(trial.workdir / "metrics.jsonl"), trial.steps) for trial in planned
            ]
            at_work = [
                f"{t.arm} {t.seed}" for t, n in zip(planned, counts, strict=True) if 0 < n < t.steps
            ]
            shown.set_postfix_str(", ".join(at_work), refresh=False)
            shown.update(sum(counts) - shown.n)

        yield show
        show()


def written(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
