"""Fetch a public set of comparisons and write it for training: python -m alignjax.data.prepare hh_helpful_base"""

import argparse
import contextlib
import fcntl
import io
import logging
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tensorflow_datasets.core.download import downloader

from alignjax.config import UserError
from alignjax.data import preferences
from alignjax.data.preferences.base import instructions


def main(argv=None) -> int:
    """The exit code: 0, 2 after a mistake of the user's, 128 + the signal after one that stopped it."""
    parser = argparse.ArgumentParser(
        prog="python -m alignjax.data.prepare",
        description=__doc__,
        allow_abbrev=False,
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
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.name, arguments.manual_dir, arguments.data_dir)
        say(table(arguments.name, arguments.data_dir))
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    return 0


def options() -> str:
    """Every set with its options and their defaults; alignjax/data/preferences says what they mean."""
    lines = [
        "sets, and their options with the defaults (alignjax/data/preferences says what they mean):"
    ]
    for name, builder in preferences.FAMILIES.items():
        lines += [
            f"  {name:30}{','.join(f'{k}={v}'.lower() for k, v in asdict(builder.Options()).items())}"
        ]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def prepare(spec: str, manual_dir: str = "", data_dir: str = "") -> None:
    """Write a set below `data_dir`, unless it is there: whole or not at all.

    Raises UserError if files are missing or can't be fetched, at a malformed row, or if another process is at it.
    """
    builder, config = preferences.find(spec)
    target = preferences.directory(spec, data_dir)
    family = target.parent.parent
    if preferences.report(spec, data_dir) is not None:
        return
    with alone(family, spec):
        downloads = family.parent / "downloads" / family.name
        for path in (
            *target.parent.glob("incomplete.*"),
            *downloads.glob("*.tmp.*"),
        ):  # of a process that was killed
            shutil.rmtree(path)
        absl_logging.set_verbosity(
            absl_logging.ERROR
        )  # TFDS warns of options that aren't the default
        made = builder(config=config, data_dir=family.parent)
        if manual_dir:
            sources = made.files()
            absent = {
                name: x
                for name, x in sources.items()
                if not (Path(manual_dir).expanduser() / name).is_file()
            }
            if absent:
                raise UserError(
                    f"{spec}: {manual_dir} lacks {len(absent)} of {len(sources)} files; {instructions(absent)}"
                )
        tfds.enable_progress_bar()
        downloader.MAX_RETRIES = 3  # TFDS's 10 take minutes to find that there is no network
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # TFDS would say in bold that the sizes are unknown
            made.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None),
            )


@contextlib.contextmanager
def alone(directory: Path, spec: str):
    """Nobody else prepares a set of this family meanwhile, so that what lies about half made is nobody's."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{spec}: another process is preparing a set in {directory}") from None
        yield


def table(spec: str, data_dir: str = "") -> str:
    """The report of a prepared set, as a user reads it."""
    counted = preferences.report(spec, data_dir)
    lines = [f"{spec}: prepared in {preferences.directory(spec, data_dir)}"]
    lines += [f"  {'split':12}{'rows read':>12}{'dropped':>12}{'pairs kept':>12}"]
    for split, counts in counted["splits"].items():
        lines += [
            f"  {split:12}{counts['rows']:12,}{sum(counts['dropped'].values()):12,}{counts['pairs']:12,}"
        ]
        lines += [
            f"  {'':24}{number:12,}  {reason}" for reason, number in counts["dropped"].items()
        ]
    for name, (found, published) in counted["files"].items():
        verdict = (
            "as published" if found == published else f"published: {published or 'no checksum'}"
        )
        lines += [f"  sha256 {found}  {name} ({verdict})"]
    return "\n".join(lines)


def stop(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        code = main()
    except KeyboardInterrupt as stopped:
        print(
            "alignjax: stopped, and nothing is half made; the same command starts again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + stopped.args[0])  # a plain exit would wait for the threads of a download
    sys.exit(code)
