"""Several processes as one run: how they start, hand each other host data, and all end when one of them can't go on.

An error is told to all through the key-value store of jax's coordination service, which process 0 holds. Process 0
decides what the run ends of, says so, and every process leaves at once, whatever collective or barrier it waits in. A
process that is gone is missed by its beats, which each writes to the store, and at last by jax's own heartbeats. Where
process 0 itself is gone the store is too, and jax ends the others at once ("the leader task", it says).
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax.config import UserError

BEAT = 1.0  # seconds between two signs of life of a process
SILENT = 5.0  # seconds without one, after which a process is called gone, where there is an error already
PATIENCE = 10.0  # seconds from the first error on in which the others may close what they hold
HEARTBEAT = 30  # seconds without a sign of life, or at exit without the others, after which jax ends a process
CHUNK = 1 << 24  # bytes of each process that are gathered at a time
BEATS, ERRORS, CLOSED, LEFT, END = (
    f"alignjax/{name}" for name in ("beats/", "errors/", "closed/", "left/", "end")
)


class Stopped(Exception):
    """A signal, of this number, ended the run after a save."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.number = number


def service():
    """(client of the key-value store that all processes share, this process's number, how many there are).

    The client is None in a process that is alone. It is private: jax has no public way to it.
    """
    state = distributed.global_state
    return state.client, state.process_id, state.num_processes


def start(value: str) -> None:
    """Join the others: "auto", what the cluster says of itself, or HOST:PORT,PROCESSES,INDEX."""
    known = {}
    if value != "auto":
        try:
            address, count, index = value.split(",")
            known = {
                "coordinator_address": address,
                "num_processes": int(count),
                "process_id": int(index),
            }
        except ValueError:
            raise UserError(f"--distributed={value}: HOST:PORT,PROCESSES,INDEX wanted") from None
    try:
        jax.distributed.initialize(
            **known, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed={value}: {first_line(error)}") from None
    leaving, works = threading.Event(), (beat, judge if service()[1] == 0 else listen)
    threads = [threading.Thread(target=work, args=(leaving,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    atexit.register(leave, leaving, threads)


def leave(leaving, threads) -> None:
    """Disconnect at exit, when all do. A thread that were still in a call as Python ends would bring the process down."""
    leaving.set()
    for thread in threads:
        thread.join(2 * BEAT)  # `listen` ends as it is disconnected
    jax.distributed.shutdown()
    threads[-1].join()


@contextlib.contextmanager
def one_run(value: str | None):
    """What is inside, as one of several processes if `value` (see `start`) says so: an error inside ends all of them."""
    if value:
        start(value)
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        client, index, _ = service()
        if client is None:
            raise
        report_error(error)
        if not isinstance(error, UserError):
            traceback.print_exc()
        client.key_value_set(f"{CLOSED}{index}", "")
        time.sleep(PATIENCE + HEARTBEAT)  # `judge` or `listen` ends this process meanwhile
        os._exit(1)


@contextlib.contextmanager
def reporting_errors():
    """Tell the other processes of an error inside at once: what is closed after it may wait for them."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        report_error(error)
        raise


def report_error(error: BaseException) -> None:
    client, index, _ = service()
    if client is None:
        return
    mine = isinstance(error, UserError)
    text = str(error) if mine else f"{type(error).__name__}: {first_line(error)}"
    code = 2 if mine else 130 if isinstance(error, KeyboardInterrupt) else 1
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # told already: the first stays
        client.key_value_set(f"{ERRORS}{index}", json.dumps([text, code]))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:500]


def beat(leaving) -> None:
    """Write signs of life, until this process leaves or the service is gone."""
    (client, index, _), number = service(), 0
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        while not leaving.wait(BEAT if number else 0):
            number += 1
            client.key_value_set(
                f"{BEATS}{index}", json.dumps([number, socket.gethostname()]), allow_overwrite=True
            )


def judge(leaving) -> None:
    """In process 0: end all processes once one has told of an error, when all have closed or PATIENCE is over."""
    client, _, count = service()
    read = lambda prefix: {
        int(key.removeprefix(prefix)): value for key, value in client.key_value_dir_get(prefix)
    }
    signs, seen, errors, first, missed = (
        {},
        dict.fromkeys(range(count), time.monotonic()),
        {},
        None,
        set(),
    )
    while not leaving.wait(BEAT / 2):
        new, closed = read(BEATS), read(CLOSED)
        errors |= {i: json.loads(told) for i, told in read(ERRORS).items() if i not in errors}
        now = time.monotonic()
        seen |= {i: now for i, sign in new.items() if signs.get(i) != sign}
        signs |= new
        named = {i: f"process {i} on {json.loads(sign)[1]}" for i, sign in signs.items()}
        for i in named.keys() - missed:
            if (
                now - seen[i] > HEARTBEAT / 2
            ):  # busy or gone: jax's heartbeats, of another thread, decide
                missed.add(i)
                print(
                    f"\nalignjax: nothing heard of {named[i]} for {HEARTBEAT // 2} s; if it is gone, jax ends the run in "
                    f"{HEARTBEAT // 2} s more, and the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
        first = first or (now if errors else None)
        if first and (len(closed) == count or now - first > PATIENCE):
            break
    else:
        return
    gone = [i for i in named if i not in errors and now - seen[i] > SILENT]
    (culprit, (text, code)), *others = errors.items()
    lines = [f"{named[i]} is gone; the same command goes on from the last checkpoint" for i in gone]
    same = len(errors) == count and all(told[0] == text for _, told in others)
    lines.append(text if same else f"{named[culprit]}: {text}")
    bar = "" if 0 in closed else "\n"  # while it stands, its line has no end
    print(bar + "\n".join(f"alignjax: {line}" for line in lines), file=sys.stderr, flush=True)
    client.key_value_set(END, str(1 if gone else code))
    for _ in range(50):  # until all have heard it, for the service goes with this process
        if len(read(LEFT)) >= count - 1 - len(gone):
            break
        time.sleep(0.1)
    os._exit(1 if gone else code)


def listen(leaving) -> None:
    """In the other processes: end when process 0 says so."""
    client, index, _ = service()
    try:
        code = int(client.blocking_key_value_get(END, 10**10))
        client.key_value_set(f"{LEFT}{index}", "")
    except (
        jax.errors.JaxRuntimeError
    ):  # this process leaves; or process 0 is gone, and jax ends this one, saying so
        return
    os._exit(code)


def gather(data: bytes) -> list[bytes]:
    """What each process gives, in the order of their numbers, in every process. All must call it, as any collective."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.array(divmod(len(data), CHUNK), np.int32))
    sizes = [int(many) * CHUNK + int(rest) for many, rest in sizes]
    parts, rest = [[] for _ in sizes], np.frombuffer(data, np.uint8)
    for at in range(0, max(sizes), CHUNK):
        left = max(sizes) - at
        chunk = np.zeros(
            min(CHUNK, 1 << max(10, (left - 1).bit_length())), np.uint8
        )  # of few shapes
        mine = rest[at : at + len(chunk)]
        chunk[: len(mine)] = mine
        for part, size, found in zip(
            parts, sizes, multihost_utils.process_allgather(chunk), strict=True
        ):
            part.append(found[: max(0, min(size - at, len(chunk)))].tobytes())
    return [b"".join(part) for part in parts]


def wait_for_all(name: str) -> None:
    """Wait until every process has come to the point of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def largest_of_all(number: int) -> jax.Array:
    """The largest number of all processes, which need not be there yet: all call this, and none waits."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    mine = np.full(jax.local_device_count(), number, np.int32)
    with jax.set_mesh(mesh):
        numbers = jax.make_array_from_process_local_data(NamedSharding(mesh, P("devices")), mine)
        return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))(numbers)
