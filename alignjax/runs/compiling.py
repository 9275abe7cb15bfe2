"""The programs of a run, compiled before its first step, several at a time.

JAX keeps what is compiled from shapes, and the call of a function with these shapes finds it. So
the steps run these very programs, with or without the persistent cache; a call with other shapes
compiles them when it comes.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

import jax

from alignjax.algorithms.stage import Program

MOST_THREADS = 8
REPORT_SECONDS = 5.0  # between lines that count


class CompileAhead:
    """Compiles programs on threads of its own, from when it is entered until it is closed."""

    def __init__(
        self,
        name: str,
        programs: Iterable[Program],
        mesh: jax.sharding.Mesh,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.name = name
        self.programs = list(programs)
        self.mesh = mesh
        self.say = say
        self.clock = clock
        self.compiled: list[Future] = []  # kept, as JAX drops a program that nobody holds
        self.pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS))
        self.start = clock()

    def __enter__(self) -> Self:
        # In the order of the programs, which is the same in all processes: some compilers wait
        # for the same program of the other processes.
        self.compiled = [self.pool.submit(self.compile, program) for program in self.programs]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def compile(self, program: Program) -> jax.stages.Compiled:
        """Compile a program from the shapes of its arguments."""
        # The mesh that is set belongs to a thread.
        with jax.set_mesh(program.mesh or self.mesh):
            return program.function.lower(*program.arguments).compile()

    def wait(self) -> None:
        """Wait until all are compiled; a line every few seconds says how many are.

        Raises what a compiler raised.
        """
        pending = set(self.compiled)
        last_line = self.start
        while pending:
            left = max(last_line + REPORT_SECONDS - self.clock(), 0)
            done, pending = wait(pending, timeout=left, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            now = self.clock()
            if pending and now >= last_line + REPORT_SECONDS:
                last_line = now
                self.report(len(self.compiled) - len(pending))
        if last_line > self.start:
            self.report(len(self.compiled))

    def report(self, done: int) -> None:
        """Print how many programs are compiled, and for how long this has been going on."""
        count = len(self.compiled)
        seconds = self.clock() - self.start
        self.say(f"{self.name}: compiling {count} programs: {done} of {count}, {seconds:.0f} s")
