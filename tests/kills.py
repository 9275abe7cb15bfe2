"""Kill PPO runs again and again at random moments, for test_faults: python tests/kills.py RUNS

RUNS holds the parents of the run. One process imports everything, and each attempt is a fork of
it, made before JAX has a backend. There is a run that trains all parameters and one that trains
adapters. One of each kind, RUNS/whole-KIND, is left alone. Then another of each goes from kill to
kill. Prints, as JSON by kind, how often each phase was killed and the directories of the runs that
completed.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # An attempt spends most of its time on tracing: it has one device, and fetches all programs
    # from the cache.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
import conftest  # noqa: E402, F401
from runs import command  # noqa: E402

from alignjax import train
from alignjax.machine import profile
from alignjax.runs.log import TrainingLog

STEPS = 12
# A kind of run -> its own fields.
KINDS = {"full": (), "adapters": ("--config.lora.rank=2",)}
# The phases at which kills are aimed; they hit the phases in between too.
TARGETS = ("start", "rollout", "update", "save", "evaluation")
# The mark that a run sends at the end of a phase -> the phase that begins then.
NEXT_PHASE = {
    "data": "rollout",
    "rollout": "score",
    "score": "update",
    "update": "step",
    "other": "save",
    "save": "step",
    "due": "evaluation",
    "evaluation": "step",
}
MARKS = list(NEXT_PHASE)
# Kills of each kind of run: in all, and in each target.
KILLS = 10
HITS = 2
# Seconds, at most, from the beginning of the target to the kill.
START_DELAY = 1.5
TRACING_DELAY = 0.5  # at first, a phase takes long, because its programs are traced
SAVE_PATIENCE = 1.0  # seconds that a kill waits for a half-written checkpoint
POLL = 0.001  # seconds between two looks for it
PATIENCE = 300  # seconds without a mark, at most


def train_marking(runs: Path, kind: str, workdir: Path, mark: Callable[[str], object]) -> int:
    """Run the PPO of the tiny chain, and call `mark` at the end of each phase."""
    evaluate = TrainingLog.evaluate

    def mark_phase(phases: profile.Phases, name: str, *arrays: object) -> None:
        if phases.name:
            mark(name)

    def mark_evaluation(*arguments: object) -> None:
        mark("due")
        evaluate(*arguments)

    profile.Phases.mark = mark_phase
    TrainingLog.evaluate = mark_evaluation
    overrides = [f"--config.steps={STEPS}", "--config.checkpoint_every=1", *KINDS[kind]]
    return train.main(command("ppo-tiny", runs, *overrides, "--workdir", str(workdir)))


def fork(body: Callable[[], int], output: Path) -> int:
    """Fork a child that ends with the result of `body`, printing to a file; return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with output.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = body()
    finally:
        os._exit(code)


def exit_codes(children: list[int]) -> list[int]:
    """Wait for children, and return their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run_whole(runs: Path, kind: str) -> int:
    """Run undisturbed; RUNS/whole-KIND.json then has the seconds of each target, once compiled."""
    times = []

    def remember(name: str) -> None:
        times.append((time.monotonic(), NEXT_PHASE[name]))

    code = train_marking(runs, kind, runs / f"whole-{kind}", remember)
    seconds = {}
    for (begin, phase), (end, _) in zip(times, times[1:], strict=False):
        seconds[phase] = end - begin  # the last one counts
    (runs / f"whole-{kind}.json").write_text(json.dumps(seconds))
    return code


def half_written(workdir: Path) -> set[tuple[str, int]]:
    """Return what identifies the half-written checkpoints of a run."""
    return {(path.name, path.stat().st_ctime_ns) for path in workdir.glob("checkpoints/*tmp*")}


@dataclass(frozen=True, kw_only=True)
class Aim:
    """When to kill a run."""

    target: str
    skipped: int  # how often the target begins before
    delay: float  # seconds from the beginning of the target

    @classmethod
    def draw(cls, target: str, seconds: dict[str, float], rng: random.Random) -> "Aim":
        """Draw a moment; `seconds` are those of the phases once they are compiled."""
        if target == "start":
            return cls(target=target, skipped=0, delay=rng.uniform(0, START_DELAY))
        skipped = rng.randrange(2)
        longest = seconds[target] if skipped else TRACING_DELAY
        return cls(target=target, skipped=skipped, delay=rng.uniform(0, longest))


def attempt(runs: Path, kind: str, workdir: Path, aim: Aim) -> str | None:
    """Start or resume a run, and kill it at a moment.

    Returns the phase in which it was killed, None if it completed before. A kill in a save counts
    as one if it leaves a half-written checkpoint, so such an aim waits for one.
    """
    read, write = os.pipe()
    before = half_written(workdir)
    output = runs / f"{kind}.log"

    def send(name: str) -> None:
        os.write(write, bytes([MARKS.index(name)]))

    child = fork(functools.partial(train_marking, runs, kind, workdir, send), output)
    os.close(write)
    phase = "start"
    skipped = 0
    kill_at = None
    while True:
        if phase == aim.target and kill_at is None:
            if skipped < aim.skipped:
                skipped += 1
            else:
                kill_at = time.monotonic() + aim.delay
        late = 0.0 if kill_at is None else time.monotonic() - kill_at
        waits_for_file = aim.target == "save" and late < SAVE_PATIENCE
        if late > 0 and not (waits_for_file and not half_written(workdir) - before):
            os.kill(child, signal.SIGKILL)
            break
        timeout = PATIENCE if kill_at is None else max(-late, POLL)
        if select.select([read], [], [], timeout)[0]:
            received = os.read(read, 1)
            if not received:  # the child has ended
                break
            phase = NEXT_PHASE[MARKS[received[0]]]
        else:
            assert kill_at is not None, f"no end of {phase}: {output.read_text()}"
    os.close(read)
    (code,) = exit_codes([child])
    assert code in (0, -signal.SIGKILL), f"{code} in {phase}: {output.read_text()}"
    if code == 0:
        return None
    has_half_written = bool(half_written(workdir) - before)
    if phase == "save":
        return "save" if has_half_written else "step"
    # The save of the step before may go on beside the phase that was aimed at.
    return "save" if has_half_written and phase != aim.target else phase


def run_killed(runs: Path, kind: str) -> int:
    """Kill a run until each target has been hit, and let it complete.

    RUNS/KIND.json then has how often each phase was killed, and the directories of the runs that
    completed: a run that completes too early is followed by another.
    """
    rng = random.Random(kind)
    seconds = json.loads((runs / f"whole-{kind}.json").read_text())
    hits = collections.Counter()
    completed = []
    workdir = runs / f"{kind}0"
    while hits.total() < KILLS or min(hits[target] for target in TARGETS) < HITS:
        assert hits.total() < 4 * KILLS, hits
        target = min(TARGETS, key=lambda target: hits[target])
        phase = attempt(runs, kind, workdir, Aim.draw(target, seconds, rng))
        if phase:
            hits[phase] += 1
        else:
            completed.append(str(workdir))
            workdir = runs / f"{kind}{len(completed)}"
    result = {"hits": hits, "completed": [*completed, str(workdir)]}
    (runs / f"{kind}.json").write_text(json.dumps(result))
    return train_marking(runs, kind, workdir, lambda name: None)


def complete(runs: Path, bodies: dict[str, Callable[[], int]]) -> None:
    """Run bodies side by side in processes of their own, which must all succeed."""
    children = [fork(body, runs / f"{name}.log") for name, body in bodies.items()]
    codes = exit_codes(children)
    assert not any(codes), "".join((runs / f"{name}.log").read_text() for name in bodies)


def main(runs: Path) -> None:
    complete(runs, {f"whole-{kind}": functools.partial(run_whole, runs, kind) for kind in KINDS})
    complete(runs, {kind: functools.partial(run_killed, runs, kind) for kind in KINDS})
    print(json.dumps({kind: json.loads((runs / f"{kind}.json").read_text()) for kind in KINDS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
