"""Where a step's time goes: seconds by phase, a profiler's trace of a few steps, and the programs that were compiled."""

import contextlib
import time
from pathlib import Path

import jax

from alignjax.machine import workdir as workdirs

COMPILING, TRACED = (
    2,
    3,
)  # steps that are left to the compiler, and those after them that a trace holds


class Phases:
    """Seconds of a step by phase, if `on` (--profile): each phase waits for its arrays, steps are said, some are traced.

    Otherwise nothing is waited for and nothing told: what dispatching took would only mislead. A trace of the third to
    the fifth step that are run here (of all, if they are fewer) opens in XProf, the profiler of TensorBoard, from
    `directory`; perfetto_trace.json.gz in it opens in Perfetto. With several processes it is the first one's.
    """

    def __init__(
        self, name="", on=False, directory: Path | None = None, say=print, clock=time.perf_counter
    ):
        self.name, self.on, self.directory, self.say, self.clock = name, on, directory, say, clock
        self.seconds, self.last = {}, clock()
        self.traced, self.tracing, self.annotation = range(0), False, None
        self.files = (
            contextlib.ExitStack()
        )  # where a trace is written, until it is where it belongs

    def begin(self, first: int, end: int) -> None:
        """The loop starts: steps from `first` on, `end` excluded."""
        if self.on and self.directory and jax.process_index() == 0:
            start = first + COMPILING
            self.traced = (
                range(start, start + TRACED) if start + TRACED <= end else range(first, end)
            )
        self.turn(first)

    def mark(self, name: str, *arrays) -> None:
        """Here ends a phase, or a part of one, which began at the last mark and has computed `arrays` (any pytrees)."""
        if not self.on:
            return
        with jax.profiler.TraceAnnotation(f"wait for {name}"):
            jax.block_until_ready(arrays)
        now = self.clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def end_step(self, step: int) -> dict[str, float]:
        """Seconds of this step by phase, what no phase took being "other"; nothing if not `on`."""
        if not self.on:
            return {}
        self.mark("other")
        seconds = self.seconds
        seconds["other"] = seconds.pop(
            "other"
        )  # comes last, wherever a first part of it was marked
        total = sum(seconds.values())
        digits = 2 if total >= 1 else 4
        parts = " + ".join(f"{name} {x:.{digits}f}" for name, x in seconds.items())
        self.say(f"{self.name} step {step}: {total:.{digits}f} s = {parts}")
        self.turn(step + 1)
        return seconds

    def turn(self, step: int) -> None:
        """Begin a step, and its clock: to write a trace takes seconds, which are no step's."""
        self.trace(step)
        self.seconds, self.last = {}, self.clock()

    def trace(self, step: int | None) -> None:
        """Begin a step (None: there are no more) in the trace; the trace itself begins and ends with the steps it holds."""
        if self.annotation:
            self.annotation.__exit__(None, None, None)
            self.annotation = None
        wanted = step in self.traced
        if wanted and not self.tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = (
                0  # a row for every Python call slows a step and crowds out the device's rows
            )
            # A link to Perfetto would stop the run until somebody follows it.
            staging = self.files.enter_context(workdirs.staging(self.directory))
            jax.profiler.start_trace(
                staging.local, create_perfetto_trace=True, profiler_options=options
            )
        if self.tracing and not wanted:
            jax.profiler.stop_trace()
            self.files.close()
            self.say(f"{self.name}: a trace from step {self.traced[0]} on is in {self.directory}")
        self.tracing = wanted
        if wanted:
            self.annotation = jax.profiler.StepTraceAnnotation(self.name, step_num=step)
            self.annotation.__enter__()

    def close(self) -> None:
        """Write the trace of a run that ended within it."""
        self.trace(None)


class Compilations:
    """Counts, inside its `with`, the XLA programs that this process compiles or fetches from the persistent cache."""

    def __init__(self):
        self.programs, self.fetched = [], []  # lists, since any thread may append
        self.seen, self.last = 0, None

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self.of_duration)
        jax.monitoring.register_event_listener(self.of_event)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.of_duration)
        jax.monitoring.unregister_event_listener(self.of_event)

    def of_duration(self, event: str, seconds: float, **more) -> None:
        if (
            event == "/jax/core/compile/backend_compile_duration"
        ):  # recorded for a fetched program too
            self.programs.append(more.get("fun_name", "?"))

    def of_event(self, event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.fetched.append(event)

    def end_step(self, step: int) -> int:
        """How many there have been by the end of this step."""
        if len(self.programs) > self.seen:
            self.seen, self.last = len(self.programs), step
        return self.seen

    def __str__(self) -> str:
        count = len(self.programs)
        text = f"{count} program{'s' * (count != 1)} compiled, {len(self.fetched)} of them from the cache"
        return (
            text
            if self.last is None
            else f"{text}, the last one ({self.programs[self.seen - 1]}) at step {self.last}"
        )
