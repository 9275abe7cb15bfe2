"""Several processes as one run: they start together, and end together when one cannot go on.

A process reports an error to the key-value store of JAX's coordination service, which process 0
holds. Process 0 decides how the run ends and announces it, and every process exits at once,
whatever collective or barrier it waits in. Each process also writes a sign of life to the store
every second, so process 0 notices one that is gone; if no error follows, JAX's own heartbeats
end the run. If process 0 itself is gone, so is the store, and JAX ends the other processes at
once with a message about "the leader task".
"""

import atexit
import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from alignjax.config import UserError, first_line
from alignjax.machine.failures import MACHINE_LOST, Failure, failure_of, print_details

BEAT = 1.0  # seconds between two signs of life of a process
SILENT = 5.0  # after an error, seconds without a sign of life that mean a process is gone
PATIENCE = 10.0  # seconds after the first error in which the other processes may close files
HEARTBEAT = 30  # seconds without a sign of life, or waiting at exit, after which JAX ends a process
GOODBYES = 5.0  # seconds that process 0 waits until the others have read its decision
# Keys of the store. Those with a slash at the end are followed by a process's number.
BEATS = "alignjax/beats/"
ERRORS = "alignjax/errors/"
CLOSED = "alignjax/closed/"
LEFT = "alignjax/left/"
END = "alignjax/end"


class Stopped(Exception):
    """A signal ended the run after a save."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.number = number  # of the signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """A process's place among the processes of a run."""

    client: Any  # of the key-value store that all processes share; None if there is one process
    index: int
    count: int


def membership() -> Membership:
    """Return this process's place among the processes of the run.

    JAX has no public access to the key-value store, so this reads its private state.
    """
    state = distributed.global_state
    return Membership(client=state.client, index=state.process_id, count=state.num_processes)


def start(address: str) -> None:
    """Join the other processes of the run and watch over them.

    `address` is HOST:PORT,PROCESSES,INDEX, or "auto" to use what the cluster tells JAX.
    """
    arguments = parse_address(address)
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed={address}: {first_line(str(error))}") from None
    leaving = threading.Event()
    end_together = watch_over_all if membership().index == 0 else wait_for_end
    threads = [
        threading.Thread(target=work, args=(leaving,), daemon=True)
        for work in (send_beats, end_together)
    ]
    for thread in threads:
        thread.start()
    atexit.register(leave, leaving, threads)


def parse_address(address: str) -> dict[str, Any]:
    """Return the arguments of `jax.distributed.initialize` for the text of --distributed."""
    if address == "auto":
        return {}
    try:
        coordinator, *numbers = address.split(",")
        count, index = map(int, numbers)
    except ValueError:
        raise UserError(f"--distributed={address}: expected HOST:PORT,PROCESSES,INDEX") from None
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}


def leave(leaving: threading.Event, threads: list[threading.Thread]) -> None:
    """Disconnect at exit, together with the other processes.

    A thread that is still inside a call of the store when Python ends would crash the process.
    """
    leaving.set()
    for thread in threads:
        thread.join(2 * BEAT)  # `wait_for_end` returns only once it is disconnected.
    jax.distributed.shutdown()
    threads[-1].join()


@contextlib.contextmanager
def one_run(address: str | None) -> Iterator[None]:
    """Run the body as one of several processes if there is an `address` (see `start`).

    An error in the body of one process then ends all of them.
    """
    if address:
        start(address)
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        member = membership()
        if member.client is None:
            raise
        report_error(error)
        member.client.key_value_set(f"{CLOSED}{member.index}", "")
        # `watch_over_all` or `wait_for_end` ends this process in the meantime.
        time.sleep(PATIENCE + HEARTBEAT)
        os._exit(MACHINE_LOST)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Report an error of the body to the other processes at once.

    What is closed after the body may wait for them.
    """
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        report_error(error)
        raise


def report_error(error: BaseException) -> None:
    """Report an error to the other processes, if there are any and none was reported before."""
    member = membership()
    if member.client is None:
        return
    print_details(error)  # here, because process 0 prints the line alone, and ends this process
    # The store refuses a second value of a key, so the first error of a process stays.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        failure = json.dumps(dataclasses.asdict(failure_of(error, several_processes=True)))
        member.client.key_value_set(f"{ERRORS}{member.index}", failure)


def send_beats(leaving: threading.Event) -> None:
    """Write signs of life until this process leaves or the store is gone."""
    member = membership()
    number = 0
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        while not leaving.wait(BEAT if number else 0):
            number += 1
            beat = json.dumps([number, socket.gethostname()])
            member.client.key_value_set(f"{BEATS}{member.index}", beat, allow_overwrite=True)


def wait_for_end(leaving: threading.Event) -> None:
    """Exit when process 0 announces the end; runs in all processes but 0."""
    member = membership()
    try:
        code = int(member.client.blocking_key_value_get(END, 10**10))
        member.client.key_value_set(f"{LEFT}{member.index}", "")
    except jax.errors.JaxRuntimeError:
        # This process leaves, or process 0 is gone and JAX ends this one with a message.
        return
    os._exit(code)


def watch_over_all(leaving: threading.Event) -> None:
    """End all processes once one has failed; runs in process 0 until it leaves."""
    Watch(membership()).run(leaving)


class Watch:
    """Process 0's view of all processes, and its decision to end them."""

    def __init__(self, member: Membership):
        self.client = member.client
        self.count = member.count
        self.beats: dict[int, str] = {}  # process -> its last sign of life
        self.last_seen = dict.fromkeys(range(member.count), time.monotonic())
        self.failures: dict[int, Failure] = {}  # in the order of their arrival
        self.first_failure: float | None = None  # when it arrived
        self.closed: set[int] = set()  # failed processes that have closed their files
        self.missed: set[int] = set()  # processes whose silence was reported

    def run(self, leaving: threading.Event) -> None:
        """Watch until this process leaves, or until all of them must end."""
        while not leaving.wait(BEAT / 2):
            self.read_store()
            self.report_silence()
            if self.must_end():
                self.end_all()

    def read_store(self) -> None:
        """Note signs of life, failures and processes that have closed their files."""
        beats = self.read(BEATS)
        self.closed = set(self.read(CLOSED))
        failures = self.read(ERRORS)
        now = time.monotonic()
        for process, beat in beats.items():
            if self.beats.get(process) != beat:
                self.last_seen[process] = now
        self.beats |= beats
        for process, failure in failures.items():
            if process not in self.failures:
                self.failures[process] = Failure(**json.loads(failure))
        if self.failures and self.first_failure is None:
            self.first_failure = now

    def read(self, prefix: str) -> dict[int, str]:
        """Read {process: value} of all keys that begin with `prefix`."""
        pairs = self.client.key_value_dir_get(prefix)
        return {int(key.removeprefix(prefix)): value for key, value in pairs}

    def silence(self, process: int) -> float:
        """Return the seconds since a process last gave a sign of life."""
        return time.monotonic() - self.last_seen[process]

    def describe(self, process: int) -> str:
        """Name a process, and its host once it has given a sign of life."""
        if process not in self.beats:
            return f"process {process}"
        _, host = json.loads(self.beats[process])
        return f"process {process} on {host}"

    def report_silence(self) -> None:
        """Print a warning, once, for each process that gives no sign of life.

        It may only be busy. JAX's heartbeats, which another thread sends, decide.
        """
        for process in self.beats.keys() - self.missed:
            if self.silence(process) > HEARTBEAT / 2:
                self.missed.add(process)
                print(
                    f"\nalignjax: no sign of life from {self.describe(process)} for "
                    f"{HEARTBEAT // 2} s; if it is gone, JAX ends the run in {HEARTBEAT // 2} s, "
                    "and the same command resumes from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )

    def must_end(self) -> bool:
        """Return whether one has failed, and all have closed their files or had time to."""
        if self.first_failure is None:
            return False
        waited = time.monotonic() - self.first_failure
        return len(self.closed) == self.count or waited > PATIENCE

    def end_all(self) -> None:
        """Print why the run ends, announce its exit code, and exit."""
        gone = [
            process
            for process in self.beats
            if process not in self.failures and self.silence(process) > SILENT
        ]
        code = MACHINE_LOST if gone else next(iter(self.failures.values())).code
        # A progress bar that is still open has not ended its line.
        end_of_bar = "" if 0 in self.closed else "\n"
        lines = [f"alignjax: {line}" for line in self.reasons(gone)]
        print(end_of_bar + "\n".join(lines), file=sys.stderr, flush=True)
        self.client.key_value_set(END, str(code))
        self.wait_for_goodbyes(self.count - 1 - len(gone))
        os._exit(code)

    def reasons(self, gone: list[int]) -> list[str]:
        """Say which processes are gone, and which error came first.

        An error that all processes share, such as a mistake in the config, names none of them.
        """
        lines = [
            f"{self.describe(process)} is gone; the same command resumes from the last checkpoint"
            for process in gone
        ]
        first, failure = next(iter(self.failures.items()))
        texts = {failure.text for failure in self.failures.values()}
        if len(self.failures) == self.count and len(texts) == 1:
            return [*lines, failure.line]
        return [*lines, f"{self.describe(first)}: {failure.line}"]

    def wait_for_goodbyes(self, count: int) -> None:
        """Wait until `count` processes have read the decision: the store ends with this one."""
        deadline = time.monotonic() + GOODBYES
        while len(self.read(LEFT)) < count and time.monotonic() < deadline:
            time.sleep(0.1)


def wait_for_all(name: str) -> None:
    """Wait until every process has come to the point of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
