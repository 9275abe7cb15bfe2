"""What asks a run to save and end: signals, the end of its parent process, a TPU's notice.

`Signals.received_anywhere` uses a collective of our own, not JAX's preemption service
(`multihost_utils.reached_preemption_sync_point`, which Orbax uses too). Tried with two CPU
processes, that service ignores SIGINT, a notice from a metadata server has no way into it, and
a Python handler of SIGTERM, which a single process needs, disables it. It polls once a second:
with steps of 50 ms, its common stop was 20 steps after the signal, where ours is one step.
"""

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from types import FrameType

import jax

from alignjax.machine.collectives import largest_of_all
from alignjax.machine.processes import Stopped
from alignjax.machine.watchdog import Watchdog

METADATA_HOST = "metadata.google.internal"
POLL_SECONDS = 5.0
# Entries of the metadata server that announce the end of the machine, and the values that do.
END_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}

# Names a pipe that the process which started this one holds open: it closes when that one ends.
LIFELINE = "ALIGNJAX_LIFELINE"


class Signals:
    """Remembers SIGTERM or the first SIGINT, so that the loop can save before it stops.

    A second SIGINT raises KeyboardInterrupt. With `ends_process` it also ends the process, if the
    main thread cannot. A signal that is not answered soon is reported, with what the run waits for
    (`watchdog`). As a context manager, it restores the handlers that were there before. Outside
    the main thread Python delivers no signals, so none arrive.
    """

    def __init__(self, ends_process: bool = False):
        self.received = 0  # the number of the signal, or 0
        self.doing = "the run has not begun its first step"
        # What all processes had received at the last call of `received_anywhere`: an array
        # that may still be computing.
        self.pending: jax.Array | None = None
        self.previous_handlers = {}
        self.watchdog: Watchdog | None = None
        if threading.current_thread() is threading.main_thread():
            self.watchdog = Watchdog(self.meaning, ends_process)
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous_handlers[number] = signal.signal(number, self.remember)

    def __enter__(self) -> "Signals":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_watching()
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def stop_watching(self) -> None:
        """Report no more signals; the handlers stay."""
        if self.watchdog:
            self.watchdog.close()

    def meaning(self) -> str:
        """Return what a signal brings about, and how far the run is."""
        return f"the run saves and stops after its step, but {self.doing}"

    def announce_end(self) -> None:
        """Treat a notice that the machine is about to be taken away as a SIGTERM."""
        self.remember(signal.SIGTERM)
        if self.watchdog:
            self.watchdog.notice(signal.SIGTERM)

    def remember(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal; a SIGINT after another signal raises KeyboardInterrupt."""
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number

    def received_anywhere(self) -> bool:
        """Return whether any process has received a signal; all must save together.

        With several processes this is what had arrived by the previous call, so that no process
        waits for the steps that are still computing.
        """
        if jax.process_count() == 1:
            return self.received > 0
        previous = self.pending
        self.pending = largest_of_all(self.received)
        if previous is None:
            return False
        number = int(previous)
        self.received = number or self.received
        return number > 0

    def stopped(self, text: str) -> Stopped:
        """Return the error that ends a run by the signal received; `text` says how far it is."""
        return Stopped(f"{signal.Signals(self.received).name}: {text}", self.received)


def watch_for_preemption(notify: Callable[[], object]) -> None:
    """On a cloud TPU, call `notify` in a thread once the machine is about to be taken away.

    Google Cloud's metadata server says so. $GCE_METADATA_HOST names another server, and then
    any machine asks it; otherwise only a TPU does.
    """
    host = os.environ.get("GCE_METADATA_HOST")
    if host or jax.default_backend() == "tpu":
        arguments = (host or METADATA_HOST, notify)
        threading.Thread(target=poll_metadata, args=arguments, daemon=True).start()


def watch_lifeline(notify: Callable[[], object]) -> None:
    """Call `notify` in a thread once the process that started this one has ended, however.

    That process says by $ALIGNJAX_LIFELINE which open file of this one is the reading end of a
    pipe. Without the variable there is nothing to watch.
    """
    descriptor = os.environ.pop(LIFELINE, "")
    if descriptor:
        arguments = (int(descriptor), notify)
        threading.Thread(target=wait_for_end, args=arguments, daemon=True).start()


def wait_for_end(descriptor: int, notify: Callable[[], object]) -> None:
    """Call `notify` when no process holds the other end of a pipe any more."""
    while os.read(descriptor, 1):
        continue
    notify()


def poll_metadata(host: str, notify: Callable[[], object], every: float = POLL_SECONDS) -> None:
    """Ask a metadata server every few seconds; call `notify` once it announces the end."""
    while True:
        for entry, notice in END_NOTICES.items():
            if read_metadata(host, entry, every) == notice:
                notify()
                return
        time.sleep(every)


def read_metadata(host: str, entry: str, timeout: float) -> str | None:
    """Return an entry of the metadata server, or None if it does not answer."""
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{entry}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read().decode().strip()
    except OSError:  # URLError too: there is no such server, or no answer this time.
        return None
