"""What an error means for a command: one line, an exit code, and a traceback in a file.

The exit codes tell a launcher whether to start the command again:

| code | meaning                                                     | start again?     |
|------|-------------------------------------------------------------|------------------|
| 0    | done, or stopped by SIGTERM and saved                       | if not complete  |
| 1    | a machine, or the network between machines, was lost        | yes              |
| 2    | a foreseen mistake: of the user, the disk, or the memory    | no               |
| 70   | an unforeseen error; a file has its traceback               | no               |
| 130  | interrupted                                                 | no               |
| 141  | the reader of the output has closed it                      | no               |
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from alignjax.config import PACKAGE, UserError, describe_error, first_line, one_line
from alignjax.machine import workdir as workdirs
from alignjax.machine.lock import disk_problem

# Exit codes.
MACHINE_LOST = 1
USER_ERROR = 2
UNFORESEEN = 70
INTERRUPTED = 128 + signal.SIGINT
CLOSED_OUTPUT = 128 + signal.SIGPIPE

# How the errors of JAX begin when a process or a network is gone, and when memory is short.
LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "DATA_LOSS")
NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")
BACKENDS = os.path.join("jax", "_src", "xla_bridge.py")  # where JAX looks for devices
LESS_MEMORY = (
    "lower microbatch_tokens, data.batch or ppo.slots (evaluate: --microbatch_tokens, --slots), "
    "or use more devices; python -m alignjax.plan says what a run needs"
)
# Codes of system calls that a program used wrongly; all others are about the system's state.
PROGRAM_ERRORS = (errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTTY, errno.EPIPE)
PACKAGES = (
    "alignjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
)
# Attributes of an exception in which its directory and the file of its traceback are remembered.
DIRECTORY = "_alignjax_directory"
TRACEBACK = "_alignjax_traceback"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """An error as a command reports it."""

    text: str  # one line
    code: int  # the exit code
    traceback: str = ""  # what the line says of the traceback of an unforeseen error

    @property
    def line(self) -> str:
        """The line that a command prints."""
        return f"{self.text}; {self.traceback}" if self.traceback else self.text


def failure_of(error: BaseException, *, several_processes: bool = False) -> Failure:
    """Describe an error; write the traceback of an unforeseen one to a file, once.

    Args:
      error: any exception but `Stopped`.
      several_processes: whether the error may be the end of another process.
    """
    foreseen = foreseen_failure(error, several_processes)
    if foreseen:
        return foreseen
    return Failure(
        text=one_line(f"unforeseen {describe_error(error)}{place_of(error)}"),
        code=UNFORESEEN,
        traceback=traceback_note(error),
    )


def print_details(error: BaseException) -> None:
    """Print the details of an error, such as the traceback of code that the user wrote, once."""
    details = getattr(error, "details", "")
    if not details:
        return
    error.details = ""
    with contextlib.suppress(OSError):
        print(details.rstrip("\n"), file=sys.stderr, flush=True)


def foreseen_failure(error: BaseException, several_processes: bool) -> Failure | None:
    """Describe an error that can occur without a fault in the program; None for any other."""
    if isinstance(error, UserError):
        return Failure(text=one_line(str(error)), code=USER_ERROR)
    if isinstance(error, KeyboardInterrupt):
        texts = [text for text in error.args if isinstance(text, str)]
        return Failure(text=one_line(texts[0] if texts else "interrupted"), code=INTERRUPTED)
    text = str(error).strip()
    if several_processes and text.startswith(LOST):
        return Failure(text=one_line(describe_error(error)), code=MACHINE_LOST)
    problem = memory_problem(error, text) or system_problem(error) or backend_problem(error)
    return Failure(text=one_line(problem), code=USER_ERROR) if problem else None


def memory_problem(error: BaseException, text: str) -> str:
    """Return what to do about memory that is short, "" for other errors."""
    if isinstance(error, MemoryError) or text.startswith(NO_MEMORY):
        reason = f" ({first_line(text)})" if text else ""
        return f"out of memory{reason}; {LESS_MEMORY}"
    return ""


def system_problem(error: BaseException) -> str:
    """Return the file and the reason of an error of the system, "" for other errors.

    A full or read-only disk, a missing right, too many open files, and a network that is gone
    are no faults of the program.
    """
    if not isinstance(error, OSError):
        problem = disk_problem(error) if isinstance(error, Exception) else ""
        return f"{problem}: {first_line(str(error))}" if problem else ""
    if error.errno in PROGRAM_ERRORS:
        return ""
    reason = error.strerror or str(error) or type(error).__name__
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if is_name(name)]
    return f"{' -> '.join(files)}: {reason}" if files else reason


def is_name(name: object) -> bool:
    return isinstance(name, str | bytes | os.PathLike)


def backend_problem(error: BaseException) -> str:
    """Return why JAX has no devices, "" for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.endswith(BACKENDS):
        return ""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return f"JAX_PLATFORMS={platforms}: {first_line(str(error)) or 'there are no such devices'}"


def place_of(error: BaseException) -> str:
    """Return " at FILE:LINE" of the innermost line of this package that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in frames if frame.filename.startswith(str(PACKAGE))]
    if not frames:
        return ""
    frame = (own_frames or frames)[-1]
    path = Path(frame.filename)
    name = path.relative_to(PACKAGE.parent) if own_frames else path.name
    return f" at {name}:{frame.lineno}"


# ------------------------------------------------------------------------------- tracebacks


@contextlib.contextmanager
def tracebacks_in(directory: Path) -> Iterator[None]:
    """Have the tracebacks of errors of the body written to a directory, which must be ours."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, DIRECTORY):
            setattr(error, DIRECTORY, directory)
        raise


def traceback_note(error: BaseException) -> str:
    """Write the traceback of an error, unless it is written, and return what to print of it."""
    note = getattr(error, TRACEBACK, "")
    if not note:
        note = write_traceback(error)
        with contextlib.suppress(AttributeError):
            setattr(error, TRACEBACK, note)
    return note


def write_traceback(error: BaseException) -> str:
    """Write the traceback to a new file; return a text that names it, or why there is none.

    The file is in the work directory that the error belongs to, or else among the temporary files.
    """
    text = traceback_text(error)
    directory = getattr(error, DIRECTORY, None)
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    if directory is not None:
        # What fails here, such as a full disk, may be the error itself.
        with contextlib.suppress(Exception):
            return f"the traceback is in {write_new(directory / name, text)}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="alignjax-error-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as problem:
        return f"the traceback cannot be written: {problem.strerror}"
    return f"the traceback is in {path}"


def write_new(path: Path, text: str) -> Path:
    """Write a file that does not exist yet."""
    if not workdirs.is_local(path):
        path.write_text(text)
        return path
    with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    return path


def traceback_text(error: BaseException) -> str:
    """Return what a report of a fault needs: the command, the versions and the traceback."""
    lines = [
        f"command: {shlex.join(sys.orig_argv)}",
        f"directory: {working_directory()}",
        f"python: {platform.python_version()} on {platform.platform()}",
        *(f"{name}: {version}" for name, version in versions().items()),
        "",
        "".join(traceback.format_exception(error)),
    ]
    return "\n".join(lines)


def working_directory() -> str:
    """Return the current directory, which may have been deleted."""
    try:
        return os.getcwd()
    except OSError as error:
        return f"unknown: {error.strerror}"


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed, among those that matter."""
    installed = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
