"""Where a step's time goes: seconds by phase, a trace of a few steps, and compiled programs."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from alignjax.machine import workdir as workdirs

COMPILING_STEPS = 2  # left out of a trace, because they compile
TRACED_STEPS = 3  # in a trace
COMPILED = "/jax/core/compile/backend_compile_duration"  # recorded for a fetched program too
FETCHED = "/jax/compilation_cache/cache_hits"


class Phases:
    """Measures the seconds of each step by phase, if `enabled` (--profile).

    Each phase then waits for its arrays, each step is reported with `say`, and some are traced.
    Otherwise nothing waits and nothing is reported: the time of dispatching would only mislead.

    The trace holds the third to the fifth step of this process, or all steps if there are
    fewer. It opens from `directory` in XProf, TensorBoard's profiler; the file
    perfetto_trace.json.gz in it opens in Perfetto. With several processes, only the first one
    is traced.
    """

    def __init__(
        self,
        name: str = "",
        enabled: bool = False,
        directory: Path | None = None,
        say: Callable[[str], object] = print,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.name = name
        self.enabled = enabled
        self.directory = directory
        self.say = say
        self.clock = clock
        self.seconds: dict[str, float] = {}  # of this step, by phase
        self.last_mark = clock()
        self.traced_steps = range(0)
        self.tracing = False
        self.annotation: jax.profiler.StepTraceAnnotation | None = None  # of this step
        # Closing it moves a trace from where it is written to where it belongs.
        self.trace_files = contextlib.ExitStack()

    def begin(self, first: int, end: int) -> None:
        """Start the loop over the steps from `first` up to, but not including, `end`."""
        if self.enabled and self.directory and jax.process_index() == 0:
            start = first + COMPILING_STEPS
            if start + TRACED_STEPS <= end:
                self.traced_steps = range(start, start + TRACED_STEPS)
            else:
                self.traced_steps = range(first, end)
        self.begin_step(first)

    def mark(self, name: str, *arrays: Any) -> None:
        """End a phase, or a part of one, that began at the last mark.

        `arrays` are the pytrees that it computes; the phase lasts until they are there.
        """
        if not self.enabled:
            return
        with jax.profiler.TraceAnnotation(f"wait for {name}"):
            jax.block_until_ready(arrays)
        now = self.clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last_mark
        self.last_mark = now

    def end_step(self, step: int) -> dict[str, float]:
        """End a step, report it, and return its seconds by phase, {} if not `enabled`.

        The phase "other", always the last one, has the time of no other phase.
        """
        if not self.enabled:
            return {}
        self.mark("other")
        seconds = self.seconds
        seconds["other"] = seconds.pop("other")  # Move it to the end.
        total = sum(seconds.values())
        digits = 2 if total >= 1 else 4
        parts = [f"{name} {phase_seconds:.{digits}f}" for name, phase_seconds in seconds.items()]
        self.say(f"{self.name} step {step}: {total:.{digits}f} s = {' + '.join(parts)}")
        self.begin_step(step + 1)
        return seconds

    def begin_step(self, step: int) -> None:
        """Begin a step and its clock; the seconds that writing a trace takes are not charged."""
        self.trace(step)
        self.seconds = {}
        self.last_mark = self.clock()

    def trace(self, step: int | None) -> None:
        """Show the beginning of a step in the trace, after starting or ending the trace itself.

        None means that there are no more steps.
        """
        if self.annotation:
            self.annotation.__exit__(None, None, None)
            self.annotation = None
        wanted = step in self.traced_steps
        if wanted and not self.tracing:
            self.start_trace()
        if self.tracing and not wanted:
            self.stop_trace()
        self.tracing = wanted
        if wanted:
            self.annotation = jax.profiler.StepTraceAnnotation(self.name, step_num=step)
            self.annotation.__enter__()

    def start_trace(self) -> None:
        """Start the profiler.

        It makes no link to Perfetto, which would stop the run until somebody follows it.
        """
        options = jax.profiler.ProfileOptions()
        # A row for every Python call slows a step and crowds out the device's rows.
        options.python_tracer_level = 0
        staging = self.trace_files.enter_context(workdirs.staging(self.directory))
        jax.profiler.start_trace(
            staging.local, create_perfetto_trace=True, profiler_options=options
        )

    def stop_trace(self) -> None:
        """Stop the profiler and write the trace."""
        jax.profiler.stop_trace()
        self.trace_files.close()
        self.say(f"{self.name}: a trace from step {self.traced_steps[0]} on is in {self.directory}")

    def close(self) -> None:
        """Write the trace of a run that ended within it."""
        self.trace(None)


class Compilations:
    """Counts the XLA programs that this process compiles or fetches from the persistent cache.

    It counts while it is open as a context manager.
    """

    def __init__(self):
        # Lists, because any thread may append.
        self.programs: list[str] = []  # names of the functions, compiled or fetched
        self.fetched: list[str] = []  # one entry for each program from the cache
        self.seen = 0  # programs by the end of the last step
        self.last_step: int | None = None  # the last step in which there was a new program

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self.on_duration)
        jax.monitoring.register_event_listener(self.on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self.on_duration)
        jax.monitoring.unregister_event_listener(self.on_event)

    def on_duration(self, event: str, seconds: float, **details: Any) -> None:
        """Count a program that was compiled or fetched; JAX calls this for each of its events."""
        if event == COMPILED:
            self.programs.append(details.get("fun_name", "?"))

    def on_event(self, event: str, **_: Any) -> None:
        """Count a program that was fetched; JAX calls this for each of its events."""
        if event == FETCHED:
            self.fetched.append(event)

    def end_step(self, step: int) -> int:
        """Return the number of programs by the end of this step."""
        if len(self.programs) > self.seen:
            self.seen = len(self.programs)
            self.last_step = step
        return self.seen

    def __str__(self) -> str:
        count = len(self.programs)
        plural = "" if count == 1 else "s"
        text = f"{count} program{plural} compiled, {len(self.fetched)} of them from the cache"
        if self.last_step is None:
            return text
        last_program = self.programs[self.seen - 1]
        return f"{text}, the last one ({last_program}) at step {self.last_step}"
