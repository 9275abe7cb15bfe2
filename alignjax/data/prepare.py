"""Fetch a public set of comparisons and write it for training: python -m alignjax.data.prepare hh_helpful_base"""

import argparse
import contextlib
import fcntl
import io
import os
import shutil
import signal
import sys
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.download import downloader

from alignjax.config import UserError
from alignjax.data import preferences
from alignjax.data.preferences.base import instructions


def main(argv=None) -> int:
    """The exit code: 0, 2 after a mistake of the user's, 128 + the signal after one that stopped it."""
    parser = argparse.ArgumentParser(prog="python -m alignjax.data.prepare", description=__doc__, allow_abbrev=False,
                                     epilog=f"sets: {', '.join(preferences.SETS)}; their options are in "
                                            "alignjax/data/preferences/")  # fmt: skip
    parser.add_argument("name", metavar="NAME[:OPTION=VALUE,...]", help="the set")
    parser.add_argument("--manual_dir", default="", help="a directory with the set's files, in place of a download")
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, or ~/tensorflow_datasets")
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.name, arguments.manual_dir, arguments.data_dir)
        say(table(arguments.name, arguments.data_dir))
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    return 0


def say(text: str) -> None:
    print(text, flush=True)


def prepare(spec: str, manual_dir: str = "", data_dir: str = "") -> None:
    """Write a set below `data_dir`, unless it is there: whole or not at all.

    Raises UserError if files are missing or can't be fetched, at a malformed row, or if another process is at it.
    """
    builder, config = preferences.find(spec)
    target = preferences.directory(spec, data_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{spec}: another process is preparing {target}") from None
        if preferences.report(spec, data_dir) is not None:
            return
        for path in target.parent.glob(f"incomplete.*_{target.name}"):  # of a process that was killed
            shutil.rmtree(path)
        logging.set_verbosity(logging.ERROR)
        tfds.enable_progress_bar()
        downloader.MAX_RETRIES = 3  # TFDS's 10 take minutes to find that there is no network
        made = builder(config=config, data_dir=target.parent.parent.parent)
        if manual_dir:
            sources = {name: source for split in made.sources().values() for name, source in split.items()}
            absent = {name: x for name, x in sources.items() if not (Path(manual_dir).expanduser() / name).is_file()}
            if absent:
                raise UserError(f"{spec}: {manual_dir} lacks {len(absent)} of {len(sources)} files; "
                                f"{instructions(absent)}")  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS would say in bold that the sizes are unknown
            made.download_and_prepare(file_format="array_record",
                                      download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None))  # fmt: skip


def table(spec: str, data_dir: str = "") -> str:
    """The report of a prepared set, as a user reads it."""
    counted = preferences.report(spec, data_dir)
    lines = [f"{spec}: prepared in {preferences.directory(spec, data_dir)}"]
    lines += [f"  {'split':12}{'rows read':>12}{'dropped':>12}{'pairs kept':>12}"]
    for split, counts in counted["splits"].items():
        lines += [f"  {split:12}{counts['rows']:12,}{sum(counts['dropped'].values()):12,}{counts['pairs']:12,}"]
        lines += [f"  {'':24}{number:12,}  {reason}" for reason, number in counts["dropped"].items()]
    builder, config = preferences.find(spec)
    published = {name: source.sha256 for split in builder(config=config, data_dir=data_dir or None).sources().values()
                 for name, source in split.items()}  # fmt: skip
    verdict = lambda name, found: ("as published" if found == published[name] else "not the published file"
                                   if published[name] else "none published")  # fmt: skip
    lines += [f"  sha256 {found}  {name} ({verdict(name, found)})" for name, found in counted["files"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main()
    except KeyboardInterrupt:
        print("alignjax: stopped; nothing is left half made, the same command starts again", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # a plain exit would wait for the threads of a download
    sys.exit(code)
