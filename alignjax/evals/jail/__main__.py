"""Isolate two processes: in one runs a program, in the other its tests.

`sandbox` starts this. There are seven processes, three in each of two cells:

- The starter reads the program, starts its cell, then reads the tests and starts theirs. So the
  memory of the program's cell never held the tests.
- The keeper of a cell makes namespaces of Linux and a root of its own.
- Its child is process 1 of the new namespaces. It gives up every right, starts the third process,
  and ends when that ends or when standard input does. When it ends, the kernel kills every
  process in the namespaces, whatever they made of their signals, sessions and parents.
- The third process runs the program, or its tests.

Through standard input the caller keeps hold of all of them. Standard output takes what the
program prints, and standard error takes how each cell ended. `wire`, a socket, brings the sources
and takes back the verdict of the tests; the program's cell does not have it. Two pipes join the
cells: requests and answers, see `exchange`.

All modules of this directory may import only the standard library, because a bare interpreter
runs them.
"""

import os
import select
import signal
import sys
from _collections_abc import Callable  # collections.abc would load all of collections

ROOT = os.path.abspath(__file__).rsplit(os.sep, 4)[0]
sys.path.append(ROOT)
from alignjax.evals.jail import exchange, isolation, system_calls  # noqa: E402

sys.path.remove(ROOT)


class Cell:
    """One of the two cells, and what its third process does."""

    def __init__(self, name: str, run: Callable[[], None], descriptors: tuple[int, ...]):
        self.name = name
        self.run = run
        self.descriptors = descriptors  # that the third process keeps, besides the standard ones


def start_cell(cell: Cell, limits: isolation.Limits, shared: tuple[int, ...]) -> None:
    """Fork the keeper of a cell, which closes the descriptors that it does not need."""
    starter = os.getpid()
    if os.fork() != 0:
        return
    for descriptor in set(shared) - set(cell.descriptors):
        os.close(descriptor)
    try:
        keep(cell, limits, starter)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        os.write(2, f"{reason}\n".encode())
        os._exit(1)


def keep(cell: Cell, limits: isolation.Limits, starter: int) -> None:
    """Be the keeper: isolate this process, start process 1, and wait for it."""
    os.umask(0o022)
    null = os.open("/dev/null", os.O_RDWR)
    # If the machine runs out of memory, the kernel kills these processes before any other.
    isolation.write_file("/proc/self/oom_score_adj", "1000")
    isolation.enter_namespaces(limits.files)
    end_with_parent()
    if os.getppid() != starter:
        os._exit(1)
    child = os.fork()
    if child == 0:
        be_process_one(cell, null, limits)
        os._exit(0)
    for descriptor in (1, *cell.descriptors):
        os.close(descriptor)
    os.waitpid(child, 0)
    os._exit(0)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    isolation.call("prctl", isolation.PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def be_process_one(cell: Cell, null: int, limits: isolation.Limits) -> None:
    """Start the third process, report how it ended, and end all others by returning."""
    end_with_parent()
    isolation.call("prctl", isolation.DUMPABLE, 0, 0, 0, 0)
    # A signal without a handler does not reach process 1.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()
    isolation.restrict()
    third = os.fork()
    if third == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        isolation.limit_program(limits)
        os.dup2(null, 0)
        os.dup2(1, 2)
        os.close(null)
        cell.run()
    for descriptor in (1, *cell.descriptors):
        os.close(descriptor)
    end = os.pidfd_open(third)
    ready = select.select([0, end], [], [], limits.seconds)[0]
    if end not in ready:  # the caller gave up or is gone, or hangs
        return
    status = os.waitpid(third, 0)[1]
    os.write(2, f"{cell.name} {describe_status(status)}\n".encode())


def describe_status(status: int) -> str:
    """Return how a process ended: "signal NUMBER" or "exit CODE"."""
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit {os.WEXITSTATUS(status)}"


def read_source(wire: int, length: int) -> bytes:
    """Read a source; exit if the caller is gone."""
    try:
        return exchange.read_exactly(wire, length)
    except (EOFError, ConnectionError):
        sys.exit("the caller is gone")


def start(wire: int, lengths: list[int], limits: isolation.Limits) -> None:
    """Be the starter: read program and tests, and start their cells in this order."""
    machine = os.uname().machine
    if machine not in system_calls.ARCHITECTURES:
        sys.exit(f"{machine}: expected x86_64 or aarch64")
    requests, request_end = os.pipe()
    answers, answer_end = os.pipe()
    shared = (wire, requests, request_end, answers, answer_end)
    program = read_source(wire, lengths[0])
    start_cell(
        Cell(
            "program",
            lambda: exchange.run_program(program, requests, answer_end),
            (requests, answer_end),
        ),
        limits,
        shared,
    )
    tests = read_source(wire, lengths[1])
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)  # the output is the program's alone
    start_cell(
        Cell(
            "tests",
            lambda: exchange.run_tests(tests, wire, request_end, answers),
            (wire, request_end, answers),
        ),
        limits,
        shared,
    )
    for descriptor in (1, *shared):
        os.close(descriptor)
    os.wait()
    os.wait()


def main() -> None:
    """Read the arguments: wire, lengths of the sources, memory, processes, files, seconds."""
    arguments = [int(argument) for argument in sys.argv[1:]]
    start(arguments[0], arguments[1:3], isolation.Limits(*arguments[3:]))


if __name__ == "__main__":
    main()
