"""Programs that a model has written, run where they can do no harm, and whether they ran to their end.

`jail` does it, on Linux alone, by namespaces of its own: a program sees no network, no process but its own, an empty /tmp
in memory, and read-only the standard library and the directories of libraries around it (/lib, /usr/lib, the
interpreter's lib), whole. It is nobody, has no capability and can get none, and is refused the system calls that keep
memory uncounted. It has limits; time is ours to end, whatever it does with its signals, and all of its processes die
with the first. Nothing runs without all this, and no option says otherwise.

What remains possible. Memory is limited for each process, so that all together may have `processes` times as much,
the files in /tmp besides, and what the kernel keeps for pipes and sockets. The kernel is shared: a hole in it is a
way out. A program that is at its last line has passed, so that one may deceive the tests in it, with an answer that
equals anything, or by a tracing function that jumps over them. And the token, which says that the end was reached, is
in the process's memory: not by leaving early, by printing, nor by looking through frames and objects is it to be had,
but by reading memory at raw addresses (ctypes) it is. What is deceived so is the verdict alone.
"""

import contextlib
import functools
import math
import os
import re
import secrets
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from alignjax.config import UserError

TOKEN = 16  # bytes, as in jail
GRACE = 5.0  # seconds that a sandbox may take to end when it is told to
# Without what is installed (-S), the file's directory on the path (-P), and the user's site (-s). Not -I, which ignores
# the hash seed: that makes sets of strings, and with them verdicts, repeat.
COMMAND = [
    sys.executable,
    "-s",
    "-S",
    "-P",
    "-B",
    "-X",
    "utf8",
    str(Path(__file__).with_name("jail.py")),
]
HELP = (
    "it takes Linux 5.12 or later on x86-64 or arm64, user namespaces (sysctl user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), and in a container a seccomp "
    "profile that allows unshare, mount and pivot_root (--privileged does)"
)
PROBE = """
import mmap, os, socket, time
def refused(what, act):
    try:
        act()
    except (OSError, MemoryError):
        return
    raise AssertionError(what + " is not kept from programs")
def write():
    if all(os.statvfs(place).f_flag & os.ST_RDONLY for place in ("/", os.path.dirname(os.__file__))):
        raise OSError
def fork():
    for _ in range({processes}):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(1)
refused("the network", lambda: socket.create_connection(("127.0.0.1", {port}), 1))
refused("a file outside", lambda: os.stat({path!r}))
refused("a process outside", lambda: os.kill(-1, 0))
refused("writing", write)
refused("a right", lambda: os.chroot("/tmp"))
refused("more memory", lambda: mmap.mmap(-1, {memory}))
refused("one more process", fork)
"""


class Limits(NamedTuple):
    """What a program may use."""

    seconds: float = 3.0  # by the clock, the start of the sandbox (0.03) included
    memory: int = 512 << 20  # bytes of address space of each process
    processes: int = 4  # threads count
    output: int = 64 << 10  # bytes of what it prints that are kept; the rest is read and dropped
    files: int = 16 << 20  # bytes of all its files


DEFAULTS = Limits()


class Verdict(NamedTuple):
    """How a program ended. `reason` is the program's own word where it raised an exception."""

    passed: bool  # it ran to its end
    reason: str
    output: str  # what it printed, both streams, up to the limit


@functools.cache
def check() -> None:
    """Try the sandbox on this machine, once. Raises UserError where a program is not kept from all that it should be."""
    if sys.platform != "linux":
        raise UserError(f"no sandbox for programs on {sys.platform}: {HELP}")
    limits = Limits(seconds=30)
    with tempfile.NamedTemporaryFile() as file, socket.create_server(("127.0.0.1", 0)) as server:
        fields = {**limits._asdict(), "port": server.getsockname()[1], "path": file.name}
        verdict = launch(PROBE.format(**fields), limits)
    if not verdict.passed:
        raise UserError(f"no sandbox for programs on this machine: {verdict.reason}; {HELP}")


def run(program: str, limits: Limits = DEFAULTS) -> Verdict:
    """Run a program in a sandbox of its own; several threads may at once. Raises UserError where there is no sandbox."""
    check()
    return launch(program, limits)


def launch(program: str, limits: Limits) -> Verdict:
    """`run` without the check that the sandbox holds; UserError if it can't be made."""
    source, token = program.encode(errors="surrogatepass"), secrets.token_bytes(TOKEN)
    ours, theirs = socket.socketpair()
    values = (
        len(source),
        limits.memory,
        limits.processes,
        limits.files,
        math.ceil(limits.seconds) + 1,
    )
    with ours:
        with theirs:
            try:
                process = subprocess.Popen(
                    [*COMMAND, *map(str, (theirs.fileno(), *values))],
                    pass_fds=[theirs.fileno()],
                    cwd="/",
                    env={"PYTHONHASHSEED": "0"},
                    start_new_session=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            except OSError as error:
                raise UserError(
                    f"no sandbox for programs: {COMMAND[0]} can't be started: {error}"
                ) from None
        with process:  # whatever is raised in here closes its standard input, which ends it
            with contextlib.suppress(ConnectionError):
                ours.sendall(source + token)
            bounds = {process.stdout: limits.output, process.stderr: 4096, ours: 4096}
            (output, status, wire), late = follow(process, bounds, limits.seconds)
    status = status.decode(errors="replace").strip()
    if status and not re.fullmatch(r"(exit|signal) \d+", status):
        raise UserError(
            f"no sandbox for programs on this machine: {' '.join(status.split())[-300:]}; {HELP}"
        )
    passed = not late and status == "exit 0" and secrets.compare_digest(bytes(wire), token)
    reason = "passed" if passed else why(limits, late, status, wire.decode(errors="replace"))
    return Verdict(passed, reason, output.decode(errors="replace"))


def follow(process, bounds: dict, seconds: float) -> tuple[list[bytearray], bool]:
    """Read each stream to its end, and keep as many bytes as its bound; (what was kept, whether time ran out)."""
    kept, late = {stream: bytearray() for stream in bounds}, False
    deadline, stops = time.monotonic() + seconds, [process.kill, process.stdin.close]
    with selectors.DefaultSelector() as selector:
        for stream in bounds:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            if stops and time.monotonic() >= deadline:
                stops.pop()()
                late, deadline = True, deadline + GRACE
            for key, _ in selector.select(max(0.0, deadline - time.monotonic()) if stops else None):
                try:
                    data = os.read(key.fd, 1 << 16)
                except ConnectionResetError:  # a socket closed with the token unread
                    data = b""
                kept[key.fileobj] += data[: bounds[key.fileobj] - len(kept[key.fileobj])]
                if not data:
                    selector.unregister(key.fileobj)
    return list(kept.values()), late


def why(limits: Limits, late: bool, status: str, said: str) -> str:
    """Why a program didn't pass."""
    if late:
        return f"timed out after {limits.seconds:g} s"
    if status.startswith("signal"):
        return f"killed by {status}"
    if not status:
        return "killed, and the sandbox with it"
    if said == "MemoryError":
        return "out of memory"
    return (
        " ".join(said.split())
        if said and status == "exit 1"
        else f"left before its end, with {status}"
    )
