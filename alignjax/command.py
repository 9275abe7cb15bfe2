"""What a command line and the machine tell a run: arguments, the cache, signals, that the machine is about to go."""

import argparse
import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from alignjax import workdir as workdirs
from alignjax.config import UserError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


def parse(argv):
    """(arguments, {dotted field: text}) of a command line."""
    parser = argparse.ArgumentParser(prog="python -m alignjax.train", allow_abbrev=False, description="Run a config, after its parents.",
                                     epilog="any field of the config: --config.FIELD=VALUE")  # fmt: skip
    parser.add_argument("--config", required=True, help="NAME.py[:variant], a path or a file of configs/")
    parser.add_argument("--workdir", help="default: runs/NAME; parents that have to be run go beside it")
    parser.add_argument("--distributed", nargs="?", const="auto", metavar="HOST:PORT,PROCESSES,INDEX",
                        help="one process of several; without a value, what the cluster says of itself")  # fmt: skip
    parser.add_argument("--profile", action="store_true",
                        help="say where each step's time goes; a trace of a few steps goes to WORKDIR/profile")  # fmt: skip
    parser.add_argument("--wandb", default="", metavar="PROJECT",
                        help="write to a project of Weights & Biases too; its own variables, as WANDB_MODE=offline, hold")  # fmt: skip
    arguments, rest = parser.parse_known_args(argv)
    return arguments, fields(rest)


def fields(rest: list[str]) -> dict[str, str]:
    """{dotted field: text} of arguments --config.FIELD=VALUE; UserError for others."""
    overrides = {}
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(f"{name}: no such argument; a field of the config is set by --config.FIELD=VALUE")
        if not equals:
            if not rest:
                raise UserError(f"{name}: a value is missing")
            value = rest.pop(0)
        overrides[name.removeprefix("--config.")] = value
    return overrides


def keep_programs() -> None:
    """Keep compiled programs from run to run in $XDG_CACHE_HOME/alignjax, or ~/.cache/alignjax; before the first compile.

    The persistent cache of jax: what took half a second to compile or longer is written there, and nothing is ever
    deleted. JAX_COMPILATION_CACHE_DIR names another directory, or none if it is empty;
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS another time. A directory that can't be written is done without.
    """
    untouched = jax.config.jax_persistent_cache_min_compile_time_secs == 1.0  # the default of jax
    if untouched and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignjax"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # its files are run: for nobody else to write
        tempfile.TemporaryFile(dir=directory).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        say(f"compiled programs are not kept: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))


@contextlib.contextmanager
def at_work(workdir: Path):
    """A run works on `workdir`, which is made, and nobody else does; UserError at once if another process is at it.

    The kernel ends the lock with the process, however that ends. Where there are none (object stores, some network file
    systems) it goes without, as it does for a finished run, which is only read. A disk that is full, or not to be
    written, is a UserError too.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0 and workdirs.is_local(workdir) and not (workdir / "summary.json").exists():
            with contextlib.suppress(OSError):
                lock(workdir, stack)
        try:
            yield
        except Exception as error:
            if unwritable(error):
                told = f"{workdir}: {unwritable(error)}; the same command goes on once that is put right"
                raise UserError(told) from error
            raise


def unwritable(error: Exception) -> str:
    """What the system says of a disk that is full or not to be written, if that is the error, in Python or in a library."""
    found = re.search(r"\(os error (\d+)\)|os_error_code='(\d+)'", str(error))  # of Rust, and of TensorStore
    code = getattr(error, "errno", None) or (found and int(found[1] or found[2]))
    return os.strerror(code) if code in UNWRITABLE else ""


def lock(workdir: Path, stack: contextlib.ExitStack) -> None:
    """Hold workdir/lock until the stack is left; it goes then, with the directory if that is all there is."""
    path = workdir / "lock"
    workdir.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(path.open("ab+", buffering=0))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError  # it went in between
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{workdir}: in use by {file.read().decode()}; wait for it, or stop it") from None

    def leave():
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            workdir.rmdir()

    stack.callback(leave)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


class Signals:
    """Remembers SIGTERM or the first SIGINT, so that the loop can save before it stops; a second SIGINT interrupts.

    As a context it does so inside alone. In a thread that isn't the main one Python hears of no signals, nor does this.
    """

    def __init__(self):
        self.received = 0
        self.asked = None  # what all had received when it was asked last: an array, on its way
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number, frame=None):
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number

    def anywhere(self) -> bool:
        """Whether any process has got one: all must save together.

        With several processes it is one that had come by the call before, so that nobody waits for the steps in flight.
        """
        if jax.process_count() == 1:
            return self.received > 0
        before, self.asked = self.asked, largest(self.received)
        number = 0 if before is None else int(before)
        self.received = number or self.received
        return number > 0


def notices(tell) -> None:
    """On a cloud TPU, see to it that tell() is called once its machine is to be taken away; elsewhere nothing happens.

    That is when the metadata server of Google Cloud says so; $GCE_METADATA_HOST names another server, on any machine.
    """
    host = os.environ.get("GCE_METADATA_HOST")
    if host or jax.default_backend() == "tpu":
        threading.Thread(target=watch, args=(host or "metadata.google.internal", tell), daemon=True).start()


def watch(host: str, tell, every: float = 5.0) -> None:
    """Ask a metadata server every few seconds, until it says that this machine is preempted or must be stopped."""
    instance = f"http://{host}/computeMetadata/v1/instance"
    signs = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
    while True:
        for name, sign in signs.items():
            asked = urllib.request.Request(f"{instance}/{name}", headers={"Metadata-Flavor": "Google"})
            try:
                with urllib.request.urlopen(asked, timeout=every) as answer:
                    if answer.read().decode().strip() == sign:
                        tell()
                        return
            except OSError:  # of URLError too: no such server, or no answer this time
                pass
        time.sleep(every)


def largest(number: int) -> jax.Array:
    """The largest number of all processes, which need not be there yet: all call this, and none waits."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    mine = np.full(jax.local_device_count(), number, np.int32)
    with jax.set_mesh(mesh):
        numbers = jax.make_array_from_process_local_data(NamedSharding(mesh, P("devices")), mine)
        return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))(numbers)


def say(text: str) -> None:
    """Print a line, in the first process alone."""
    if jax.process_index() == 0:
        (tqdm.write if sys.stderr.isatty() else print)(text)  # where there is a bar to be seen, it isn't torn
        sys.stdout.flush()
