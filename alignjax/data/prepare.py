"""Fetch a public set of comparisons and write it for training.

python -m alignjax.data.prepare hh_helpful_base
"""

import argparse
import contextlib
import fcntl
import functools
import io
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import NoReturn

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tensorflow_datasets.core.download import downloader

from alignjax.config import UserError
from alignjax.data import preferences
from alignjax.data.preferences.base import Comparisons, instructions
from alignjax.machine.arguments import Parser
from alignjax.machine.console import print_error, run_command

RETRIES = 3  # of a download; TFDS's 10 take minutes to find that there is no network
# Names that TFDS gives to the directories that it fills, of a set and of a download.
LEFTOVER = re.compile(r"incomplete\.[A-Z0-9]{6}_.+|.+\.tmp\.[0-9a-f]{32}")
SECOND_TRY = 1.0  # seconds until an interrupt that was lost is raised again


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or one of `machine.failures`."""
    return run_command(functools.partial(prepare_and_report, argv))


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="python -m alignjax.data.prepare",
        description=__doc__,
        epilog=options(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME[:OPTION=VALUE,...]", help="the set")
    parser.add_argument(
        "--manual_dir",
        default="",
        help="a directory with the set's files, in place of a download; "
        "default: downloads/manual below DATA_DIR, if they are there",
    )
    parser.add_argument(
        "--data_dir", default="", help="default: $TFDS_DATA_DIR, or ~/tensorflow_datasets"
    )
    return parser


def options() -> str:
    """Return every set with its options and their defaults."""
    lines = [
        "sets, and their options with the defaults (alignjax/data/preferences says what they mean):"
    ]
    for name, builder in preferences.FAMILIES.items():
        defaults = [f"{key}={value}".lower() for key, value in asdict(builder.Options()).items()]
        lines.append(f"  {name:30}{','.join(defaults)}")
    return "\n".join(lines)


def prepare_and_report(argv: Sequence[str] | None) -> None:
    """Prepare a set, unless it is prepared, and print its report."""
    arguments = argument_parser().parse_args(argv)
    prepare(arguments.name, arguments.manual_dir, arguments.data_dir)
    print(table(arguments.name, arguments.data_dir), flush=True)


def prepare(spec: str, manual_dir: str = "", data_dir: str = "") -> None:
    """Write a set below `data_dir`, unless it is there: all of it or nothing.

    Raises:
      UserError: files are missing or cannot be fetched, a row is malformed, or another process is
        preparing a set of the family.
    """
    builder, config = preferences.find(spec)
    target = preferences.directory(spec, data_dir)
    family = target.parent.parent
    if preferences.report(spec, data_dir) is not None:
        return
    with only_process(family, spec):
        remove_leftovers(target, family)
        # TFDS warns of options that aren't the default.
        absl_logging.set_verbosity(absl_logging.ERROR)
        made = builder(config=config, data_dir=family.parent)
        if manual_dir:
            check_manual_dir(spec, manual_dir, made)
        tfds.enable_progress_bar()
        downloader.MAX_RETRIES = RETRIES
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        # TFDS would print in bold that the sizes are unknown.
        with contextlib.redirect_stdout(io.StringIO()):
            made.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None),
            )


@contextlib.contextmanager
def only_process(directory: Path, spec: str) -> Iterator[None]:
    """Let no other process prepare a set of a family meanwhile; UserError if one does.

    Whatever is half made there then belongs to nobody.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock_file = open(directory / ".lock", "a")
    except OSError as error:
        raise UserError(f"{spec}: cannot write to {directory}: {error.strerror}") from None
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{spec}: another process is preparing a set in {directory}") from None
        yield


def remove_leftovers(target: Path, family: Path) -> None:
    """Remove what a process that was killed left half made."""
    downloads = family.parent / "downloads" / family.name
    for path in (*target.parent.glob("incomplete.*"), *downloads.glob("*.tmp.*")):
        if LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def check_manual_dir(spec: str, manual_dir: str, builder: Comparisons) -> None:
    """Raise UserError if a manual directory lacks files of the set."""
    directory = Path(manual_dir).expanduser()
    sources = builder.files()
    absent = {name: source for name, source in sources.items() if not (directory / name).is_file()}
    if absent:
        raise UserError(
            f"{spec}: {manual_dir} lacks {len(absent)} of {len(sources)} files; "
            f"{instructions(absent)}"
        )


def table(spec: str, data_dir: str = "") -> str:
    """Return the report of a prepared set, as a user reads it."""
    counted = preferences.report(spec, data_dir)
    lines = [f"{spec}: prepared in {preferences.directory(spec, data_dir)}"]
    lines.append(f"  {'split':12}{'rows read':>12}{'dropped':>12}{'pairs kept':>12}")
    for split, counts in counted["splits"].items():
        dropped = sum(counts["dropped"].values())
        lines.append(f"  {split:12}{counts['rows']:12,}{dropped:12,}{counts['pairs']:12,}")
        for reason, number in counts["dropped"].items():
            lines.append(f"  {'':24}{number:12,}  {reason}")
    for name, (sha256, published) in counted["files"].items():
        if sha256 == published:
            verdict = "as published"
        else:
            verdict = f"published: {published or 'no checksum'}"
        lines.append(f"  sha256 {sha256}  {name} ({verdict})")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ interrupts


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt for a signal, and again if the first one is lost.

    Python drops an exception that is raised within a destructor or a callback of the garbage
    collector, of which JAX has one; a signal may arrive there.
    """
    signal.signal(signal.SIGALRM, functools.partial(interrupt_again, number))
    signal.setitimer(signal.ITIMER_REAL, SECOND_TRY)
    raise KeyboardInterrupt(number)


def interrupt_again(number: int, alarm: int, frame: FrameType | None) -> None:
    """Raise the interrupt again, unless it is being handled: then files are being removed."""
    if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
        interrupt(number, frame)


def report_lost(lost: "sys.UnraisableHookArgs") -> None:
    """Report an exception that Python drops, unless it is an interrupt, which is raised again."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)


def run() -> int:
    """Run the command until it ends or a signal stops it; after a signal, exit at once."""
    sys.unraisablehook = report_lost
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    return run_command(prepare_or_exit)


def prepare_or_exit() -> None:
    """Run the command on the arguments of this process; exit at once after a signal."""
    try:
        prepare_and_report(None)
    except KeyboardInterrupt as stopped:
        print_error("stopped, and nothing is half made; the same command starts again")
        # A plain exit would wait for the threads of a download.
        os._exit(128 + stopped.args[0])


if __name__ == "__main__":
    sys.exit(run())
