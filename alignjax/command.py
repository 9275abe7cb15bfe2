"""What a command line and the operating system tell a run: arguments, several processes, signals."""

import argparse
import signal

import jax
from jax.experimental import multihost_utils

from alignjax.config import UserError


def parse(argv):
    """(arguments, {dotted field: text}) of a command line."""
    parser = argparse.ArgumentParser(prog="python -m alignjax.train", allow_abbrev=False, description="Run a config, after its parents.",
                                     epilog="any field of the config: --config.FIELD=VALUE")  # fmt: skip
    parser.add_argument("--config", required=True, help="NAME.py[:variant], a path or a file of configs/")
    parser.add_argument("--workdir", help="default: runs/NAME; parents that have to be run go beside it")
    parser.add_argument("--distributed", nargs="?", const="auto", metavar="HOST:PORT,PROCESSES,INDEX",
                        help="one process of several; without a value, what the cluster says of itself")  # fmt: skip
    arguments, rest = parser.parse_known_args(argv)
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
    return arguments, overrides


def start_distributed(value: str | None) -> None:
    if value == "auto":
        jax.distributed.initialize()
    elif value:
        try:
            address, count, index = value.split(",")
            jax.distributed.initialize(address, int(count), int(index))
        except ValueError:
            raise UserError(f"--distributed={value}: HOST:PORT,PROCESSES,INDEX wanted") from None


class Stopped(Exception):
    """A signal ended the run after a save."""


class Signals:
    """Remembers SIGTERM or the first SIGINT, so that the loop can save before it stops; a second SIGINT interrupts."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number

    def anywhere(self) -> bool:
        """Whether any process has got one: all must save together."""
        if jax.process_count() == 1:
            return self.received > 0
        self.received = int(multihost_utils.process_allgather(self.received).max())
        return self.received > 0


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
