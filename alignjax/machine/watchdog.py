"""Answers signals while the main thread cannot: says what it waits for, or ends the process.

Python runs signal handlers in the main thread, between two instructions. While that thread waits
in compiled code, for a device or for the compiler, no handler runs. But at the moment of a signal,
the interpreter writes its number to a file descriptor (`signal.set_wakeup_fd`). A thread reads it
here.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from alignjax.machine import processes
from alignjax.machine.failures import INTERRUPTED

FIRST_REPORT = 5.0  # seconds after a signal in which it may be answered without a word
NEXT_REPORT = 30.0  # seconds between two reports
LAST_WORDS = 3.0  # seconds that the main thread has to end by itself after a second interrupt
ANSWERED = 0  # in place of a signal's number
PACKAGE = Path(__file__).resolve().parents[1]
COMPILER = os.path.join("jax", "_src", "compiler.py")


class Watchdog:
    """Watches over signals from its creation, which must be in the main thread, to `close`.

    A signal that is not answered is reported after `FIRST_REPORT` seconds, and then every
    `NEXT_REPORT` seconds, with what the main thread waits for.

    Args:
      meaning: returns the beginning of a report, which says what the signal has brought about.
      ends_process: whether an interrupt after an unanswered signal ends the process, after
        `LAST_WORDS` seconds, if the main thread has not ended it by then.
    """

    def __init__(self, meaning: Callable[[], str], ends_process: bool):
        self.meaning = meaning
        self.ends_process = ends_process
        self.received = 0  # the number of the first signal that is not answered, or 0
        self.since = 0.0  # when it was received
        self.next_report = 0.0
        self.end: float | None = None  # when the process is ended
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.previous = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.watch, daemon=True, name="watchdog")
        self.thread.start()

    def close(self) -> None:
        """Stop watching; whoever listened to signals before hears them again.

        A process that is to be ended stays watched: its exit may wait for the device.
        """
        if self.write_end < 0 or self.end is not None:
            return
        signal.set_wakeup_fd(self.previous)
        os.close(self.write_end)  # the thread reads the end of the file
        self.write_end = -1
        self.thread.join()
        os.close(self.read_end)

    def notice(self, number: int) -> None:
        """Treat a message from elsewhere as the signal `number`; any thread may call this.

        `ANSWERED` says that the main thread has dealt with the signals so far. It goes the way of
        the signals, so it comes after them.
        """
        with contextlib.suppress(OSError):
            os.write(self.write_end, bytes([number]))

    def watch(self) -> None:
        """Read signals and report those that are not answered, until `close`."""
        while True:
            ready = select.select([self.read_end], [], [], self.patience())
            if ready[0]:
                numbers = os.read(self.read_end, 64)
                if not numbers:
                    return
                for number in numbers:
                    self.note(number)
            now = time.monotonic()
            if self.end is not None and now >= self.end:
                self.end = None
                end_process()
            if self.received and now >= self.next_report:
                self.next_report = now + NEXT_REPORT
                self.report()

    def patience(self) -> float | None:
        """Return for how many seconds to wait for a signal; None is for ever."""
        if not self.received:
            return None
        until = self.next_report if self.end is None else min(self.next_report, self.end)
        return max(until - time.monotonic(), 0.0)

    def note(self, number: int) -> None:
        """Note a signal: the first one, or an interrupt of what the first one waits for."""
        now = time.monotonic()
        if number == ANSWERED:
            self.received = 0
            self.end = None
        elif not self.received:
            self.received = number
            self.since = now
            self.next_report = now + FIRST_REPORT
        elif number == signal.SIGINT and self.ends_process:
            self.end = now + LAST_WORDS
        else:
            self.next_report = now

    def report(self) -> None:
        """Print what the signal has brought about, and what the main thread waits for."""
        name = signal.Signals(self.received).name
        seconds = time.monotonic() - self.since
        advice = ""
        if self.ends_process:
            advice = f" Ctrl-C, or kill -INT {os.getpid()}, ends it at once."
        print_line(
            f"{name} came {seconds:.0f} s ago: {self.meaning()}. The process is "
            f"{describe_main_thread()}.{advice}"
        )


def print_line(text: str) -> None:
    """Print a line on standard error, below a progress bar that may be open."""
    print(f"\nalignjax: {text}", file=sys.stderr, flush=True)


def end_process() -> None:
    """End the process at once, with the exit code of an interrupt."""
    # The other processes of a run learn of it, unless the one that holds the store is gone.
    reporter = threading.Thread(
        target=processes.report_error, args=(KeyboardInterrupt(),), daemon=True
    )
    reporter.start()
    reporter.join(1.0)
    print_line("interrupted, and ended at once; what was saved before is intact")
    os._exit(INTERRUPTED)


def describe_main_thread() -> str:
    """Return what the main thread is doing, and the line of this package that it has come to."""
    frames = list(frames_of(threading.main_thread()))
    here = next((frame for frame in frames if is_ours(frame)), None)
    compiles = any(frame.f_code.co_filename.endswith(COMPILER) for frame in frames)
    waits = bool(frames) and not is_ours(frames[0])
    doing = "compiling a program" if compiles else "waiting" if waits else "working"
    if here is None:
        return doing
    path = Path(here.f_code.co_filename).relative_to(PACKAGE.parent)
    return f"{doing} in {here.f_code.co_qualname} ({path}:{here.f_lineno})"


def frames_of(thread: threading.Thread) -> Iterator[FrameType]:
    """Yield the frames of a thread, the innermost first."""
    frame = sys._current_frames().get(thread.ident)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_ours(frame: FrameType) -> bool:
    """Return whether a frame runs code of this package."""
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


class Interrupts:
    """Takes the place of Python's own handler of SIGINT, with a watchdog beside it."""

    def __init__(self):
        self.watchdog = Watchdog(self.meaning, ends_process=True)

    def meaning(self) -> str:
        """Return what an interrupt brings about."""
        return "the command stops as soon as it can"

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt in the main thread, which is the answer."""
        self.watchdog.notice(ANSWERED)
        raise KeyboardInterrupt


@contextlib.contextmanager
def watching_interrupts() -> Iterator[None]:
    """Watch over SIGINT in the body, unless somebody else handles it.

    An interrupt raises KeyboardInterrupt. While the main thread cannot do so, its wait is
    reported, and a second interrupt ends the process.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupts = Interrupts()
    signal.signal(signal.SIGINT, interrupts)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.watchdog.close()
