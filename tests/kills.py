"""A PPO run that is killed again and again, at random moments, for test_faults: python tests/kills.py RUNS, with its parents.

One process imports everything, and each attempt is a fork of it, made before JAX has a backend. One run, RUNS/whole, is
left alone; then two others go side by side, from kill to kill. Prints, as JSON, the phases that were killed and the
directories that came to their end.
"""

import collections
import functools
import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

if (
    __name__ == "__main__"
):  # an attempt is tracing, for the most part: one device, and all programs from the cache
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
import conftest  # noqa: E402, F401
from runs import command  # noqa: E402

from alignjax import train
from alignjax.machine import profile
from alignjax.runs.log import TrainingLog

STEPS = 12
TARGETS = (
    "start",
    "rollout",
    "update",
    "save",
    "evaluation",
)  # what is aimed at; others, between these, are hit too
BEGUN = {
    "data": "rollout",
    "rollout": "score",
    "score": "update",
    "update": "step",
    "other": "save",
    "save": "step",
    "due": "evaluation",
    "evaluation": "step",
}
KILLS, HITS = 10, 2  # of each of two runs: all in all, and in each of TARGETS


def run(runs: Path, workdir: Path, mark=lambda name: None) -> int:
    evaluate = TrainingLog.evaluate
    profile.Phases.mark = lambda self, name, *arrays: (
        self.name and mark(name)
    )  # which ends a phase of the loop
    TrainingLog.evaluate = lambda self, *what: (mark("due"), evaluate(self, *what))
    more = f"--config.steps={STEPS}", "--config.checkpoint_every=1", "--workdir", str(workdir)
    return train.main(command("ppo-tiny", runs, *more))


def forked(act, log: Path) -> int:
    """The number of a child that does `act` and ends with its result; what it prints goes to `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = act()
    finally:
        os._exit(code)


def half_written(workdir: Path) -> set:
    return {(path.name, path.stat().st_ctime_ns) for path in workdir.glob("checkpoints/*tmp*")}


def attempt(runs: Path, workdir: Path, log: Path, kind: str, rng: random.Random) -> str | None:
    """The phase in which it was killed, a moment after `kind` began once more; None if it came to its end."""
    read, write = os.pipe()
    names, before, phase, kill_at = list(BEGUN), half_written(workdir), "start", None
    tell = lambda name: os.write(write, bytes([names.index(name)]))
    child = forked(lambda: run(runs, workdir, tell), log)
    os.close(write)
    waits, delay = (
        (0, rng.uniform(0, 1.5)) if kind == "start" else (rng.randrange(2), rng.uniform(0, 0.5))
    )
    while True:
        if phase == kind and kill_at is None:
            kill_at, waits = (None, waits - 1) if waits else (time.monotonic() + delay, 0)
        heard, _, _ = select.select(
            [read], [], [], 300 if kill_at is None else max(kill_at - time.monotonic(), 0)
        )
        said = os.read(read, 1) if heard else None
        if not said:
            break
        phase = BEGUN[names[said[0]]]
    if not heard:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    (status,) = wait([child])
    assert status == -signal.SIGKILL or (heard and status == 0), (
        f"{status} in {phase}: {log.read_text()}"
    )
    if status == 0:
        return None
    if (
        phase != "evaluation" and half_written(workdir) - before
    ):  # an evaluation has the save before it beside it
        return "save"
    return "step" if phase == "save" else phase


def chain(runs: Path, name: str) -> int:
    """Kills; RUNS/NAME.json then has how many there were in each phase, and the directories that came to their end."""
    rng, hits, ended = random.Random(name), collections.Counter(), []
    workdir, log = runs / f"{name}0", runs / f"{name}.log"
    while sum(hits.values()) < KILLS or min(hits[kind] for kind in TARGETS) < HITS:
        assert sum(hits.values()) < 4 * KILLS, hits
        phase = attempt(runs, workdir, log, min(TARGETS, key=lambda kind: hits[kind]), rng)
        if phase:
            hits[phase] += 1
        else:
            ended.append(str(workdir))
            workdir = runs / f"{name}{len(ended)}"
    (runs / f"{name}.json").write_text(
        json.dumps({"hits": hits, "completed": [*ended, str(workdir)]})
    )
    return run(runs, workdir)


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(runs: Path) -> None:
    asked = [
        (["whole"], lambda name: run(runs, runs / name)),
        (["a", "b"], lambda name: chain(runs, name)),
    ]
    for names, act in asked:
        ends = wait([forked(functools.partial(act, name), runs / f"{name}.log") for name in names])
        assert not any(ends), "".join((runs / f"{name}.log").read_text() for name in names)
    print(json.dumps([json.loads((runs / f"{name}.json").read_text()) for name in names]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
