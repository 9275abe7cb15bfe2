"""Run programs that a model has written where they can do no harm, and judge them.

A program and its tests run in two processes, each isolated by `jail`, on Linux only, with
namespaces of its own:

- It sees no network, no processes but its own, and an empty /tmp in memory. The standard library
  and the directories of libraries around it (/lib, /usr/lib, the interpreter's lib) are visible as
  a whole, but read-only.
- It is the user nobody, has no capabilities and can get none. It may make the system calls of a
  list (`jail/system_calls.py`), which has no sockets but unnamed pairs, and none that keep memory
  uncounted.
- It has limits. The caller ends it when its time is over, whatever it does with its signals, and
  all of its processes die with the first.

Nothing runs without all of this, and no option says otherwise.

The tests call the program's functions through a pipe, by name and with values of Python's own
types, and get such values back (`jail/exchange.py`). So the tests share no namespace, no frame, no
memory, no file and no process with the program, and no object of the program reaches them. Only
the tests' process can send the verdict. A program passes if its answers pass the tests, and can
deceive nothing but itself.

What remains possible:

- Memory is limited for each process, so all of them together may use `processes` times as much,
  plus the files in /tmp and what the kernel keeps for pipes.
- The kernel is shared, so a hole in it is a way out.
- Without tests, a program passes if it says that it has loaded, which proves nothing.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from alignjax.config import UserError
from alignjax.evals import jail
from alignjax.evals.jail.exchange import FAILED, PASSED

GRACE = 5.0  # seconds that a sandbox may take to end after it is told to
STATUS_BYTES = 4096  # kept of what the jail reports, and of the verdict
CHUNK_BYTES = 1 << 16  # read at a time

STATUS = re.compile(r"(program|tests) (exit|signal) \d+")
# The interpreter starts without what is installed (-S), without the file's directory on the path
# (-P) and without the user's site (-s). It does not use -I, which ignores the hash seed: the seed
# makes the order of sets of strings, and with it verdicts, repeat.
COMMAND = [
    sys.executable,
    "-s",
    "-S",
    "-P",
    "-B",
    "-X",
    "utf8",
    str(Path(jail.__file__).with_name("__main__.py")),
]
REQUIREMENTS = (
    "it takes Linux 5.12 or later on x86-64 or arm64, user namespaces (sysctl "
    "user.max_user_namespaces, kernel.unprivileged_userns_clone, "
    "kernel.apparmor_restrict_unprivileged_userns), and in a container a seccomp profile that "
    "allows unshare, mount and pivot_root (--privileged does)"
)
# A program that tries each thing from which programs must be kept.
PROBE = """
import mmap, os, socket, time

def must_fail(what, action):
    try:
        action()
    except (OSError, MemoryError):
        return
    raise AssertionError(what + " is not kept from programs")

def write():
    places = ("/", os.path.dirname(os.__file__))
    if all(os.statvfs(place).f_flag & os.ST_RDONLY for place in places):
        raise OSError

def fork():
    for _ in range({processes}):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(1)

for family in range(64):
    must_fail("a socket", lambda: socket.socket(family, socket.SOCK_STREAM))
must_fail("a file outside", lambda: os.stat({path!r}))
must_fail("a process outside", lambda: os.kill(-1, 0))
must_fail("writing", write)
must_fail("a right", lambda: os.chroot("/tmp"))
must_fail("more memory", lambda: mmap.mmap(-1, {memory}))
must_fail("one more process", fork)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float = 3.0  # by the clock, including the start of the sandbox (0.03)
    memory: int = 512 << 20  # bytes of address space of each process
    processes: int = 4  # threads count too
    output: int = 64 << 10  # bytes of its output that are kept; the rest is read and dropped
    files: int = 16 << 20  # bytes of all its files


DEFAULT_LIMITS = Limits()


class Verdict(NamedTuple):
    """How a program ended."""

    passed: bool  # it passed its tests
    reason: str  # in the words of the exception that the program or a test raised
    output: str  # what the program printed to both streams, up to the limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """What a sandbox left when it ended."""

    output: bytes  # what the program printed
    status: str  # a line for each cell, "program exit CODE" or "tests signal NUMBER", or an error
    verdict: bytes  # of the tests
    timed_out: bool

    def of(self, cell: str) -> str:
        """Return how the process of a cell ended: "exit CODE", "signal NUMBER", or ""."""
        lines = [line for line in self.status.splitlines() if line.startswith(f"{cell} ")]
        return lines[0].partition(" ")[2] if lines else ""

    @property
    def problem(self) -> str:
        """Return why there is no sandbox; "" if there was one."""
        lines = self.status.splitlines()
        return "; ".join(dict.fromkeys(line for line in lines if not STATUS.fullmatch(line)))


@functools.cache
def check() -> None:
    """Try the sandbox on this machine, once.

    Raises UserError if a program is not kept from everything that it should be kept from.
    """
    if sys.platform != "linux":
        raise UserError(f"no sandbox for programs on {sys.platform}: {REQUIREMENTS}")
    limits = Limits(seconds=30)
    with tempfile.NamedTemporaryFile() as file:
        program = PROBE.format(
            path=file.name,
            processes=limits.processes,
            memory=limits.memory,
        )
        verdict = launch(program, "", limits)
    if not verdict.passed:
        raise no_sandbox(verdict.reason)


def no_sandbox(reason: str) -> UserError:
    """Return the error for a machine that cannot isolate programs."""
    return UserError(f"no sandbox for programs on this machine: {reason}; {REQUIREMENTS}")


def run(program: str, limits: Limits = DEFAULT_LIMITS, *, tests: str = "") -> Verdict:
    """Run a program and its tests in a sandbox; several threads may do so at once.

    The program is loaded first. In the tests, `program_function(name)` returns the program's
    function of that name, to be called. The program passes if it loads and the tests reach their
    end.

    Raises UserError if there is no sandbox.
    """
    check()
    return launch(program, tests, limits)


def launch(program: str, tests: str, limits: Limits) -> Verdict:
    """Run a program and its tests without checking that the sandbox holds.

    Raises UserError if the sandbox cannot be made.
    """
    sources = [source.encode(errors="surrogatepass") for source in (program, tests)]
    our_end, jail_end = socket.socketpair()
    with our_end:
        with jail_end:
            process = start_jail(jail_end, [len(source) for source in sources], limits)
        with process:  # an exception in here closes its standard input, which ends it
            with contextlib.suppress(ConnectionError):
                our_end.sendall(b"".join(sources))
            ending = follow(process, our_end, limits)
    if ending.problem:
        raise no_sandbox(one_line(ending.problem)[-300:])
    is_over = not ending.timed_out and ending.of("tests") == "exit 0"
    passed = is_over and ending.verdict == PASSED
    reason = "passed" if passed else failure_reason(ending, limits)
    return Verdict(passed, reason, ending.output.decode(errors="replace"))


def start_jail(wire: socket.socket, lengths: list[int], limits: Limits) -> subprocess.Popen:
    """Start the interpreter that makes the two isolated processes."""
    arguments = (
        wire.fileno(),
        *lengths,
        limits.memory,
        limits.processes,
        limits.files,
        math.ceil(limits.seconds) + 1,  # of the processor
    )
    try:
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            pass_fds=[wire.fileno()],
            cwd="/",
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        raise UserError(
            f"no sandbox for programs: {COMMAND[0]} cannot be started: {error}"
        ) from None


def follow(process: subprocess.Popen, wire: socket.socket, limits: Limits) -> Ending:
    """Read all streams of a sandbox to their ends, and end it when its time is over."""
    bounds = {process.stdout: limits.output, process.stderr: STATUS_BYTES, wire: STATUS_BYTES}
    kept = {stream: bytearray() for stream in bounds}
    # First close its standard input; if it does not end within GRACE, kill it.
    ways_to_end: list[Callable[[], None]] = [process.kill, process.stdin.close]
    timed_out = False
    deadline = time.monotonic() + limits.seconds
    with selectors.DefaultSelector() as selector:
        for stream in bounds:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            if ways_to_end and time.monotonic() >= deadline:
                end = ways_to_end.pop()
                end()
                timed_out = True
                deadline += GRACE
            wait = max(0.0, deadline - time.monotonic()) if ways_to_end else None
            for key, _ in selector.select(wait):
                stream = key.fileobj
                data = read_available(key.fd)
                kept[stream] += data[: bounds[stream] - len(kept[stream])]
                if not data:
                    selector.unregister(stream)
    return Ending(
        output=bytes(kept[process.stdout]),
        status=kept[process.stderr].decode(errors="replace").strip(),
        verdict=bytes(kept[wire]),
        timed_out=timed_out,
    )


def read_available(file_descriptor: int) -> bytes:
    """Return the next bytes of a stream, none at its end."""
    try:
        return os.read(file_descriptor, CHUNK_BYTES)
    except ConnectionResetError:  # the socket was closed with a source unread
        return b""


def failure_reason(ending: Ending, limits: Limits) -> str:
    """Return why a program did not pass."""
    if ending.timed_out:
        return f"timed out after {limits.seconds:g} s"
    if ending.verdict.startswith(FAILED):
        exception = ending.verdict.removeprefix(FAILED).decode(errors="replace")
        return "out of memory" if exception == "MemoryError" else one_line(exception)
    if ending.of("tests").startswith("signal"):
        return f"the tests were killed by {ending.of('tests')}"
    if ending.of("program").startswith("signal"):
        return f"killed by {ending.of('program')}"
    if not ending.of("program"):
        return "killed, and the sandbox with it"
    return f"left before its end, with {ending.of('program')}"


def one_line(text: str) -> str:
    """Return a text with single spaces for all white space."""
    return " ".join(text.split())
