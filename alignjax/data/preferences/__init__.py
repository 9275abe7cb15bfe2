"""Public sets of comparisons: their names and options, and reading the prepared ones.

A TFDS builder prepares each family. A set is named by a spec: NAME, or
NAME:OPTION=VALUE,OPTION=VALUE. The Options of a family are its options.
"""

import json
import math
import os
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from alignjax.config import UserError, nearest, parse_value
from alignjax.data import shares
from alignjax.data.preferences.base import Comparisons, Config
from alignjax.data.preferences.hh import HH, SUBSETS
from alignjax.data.preferences.prm800k import PRM800K
from alignjax.data.preferences.shp import SHP
from alignjax.data.preferences.summarize import Summarize

FAMILIES = dict.fromkeys(SUBSETS, HH) | {"summarize": Summarize, "shp": SHP, "prm800k": PRM800K}
SETS = tuple(FAMILIES)
SPLITS = {"train": "train", "heldout": "test"}
CHUNK = 1024  # examples that are read at a time


def find(spec: str) -> tuple[type[Comparisons], Config]:
    """Return the builder of a set and its config.

    Raises:
      UserError: there is no such name, option or value.
    """
    name = spec.partition(":")[0]
    if name not in FAMILIES:
        raise UserError(f"{spec}: there is no set {name!r}{nearest(name, SETS)}")
    builder = FAMILIES[name]
    options = parse_options(spec, builder)
    config_name = name_of_config(name, builder, options)
    known_config = builder.builder_configs.get(config_name)
    return builder, known_config or Config(name=config_name, dataset=name, options=options)


def parse_options(spec: str, builder: type[Comparisons]) -> Any:
    """Return a builder's options, those of the spec in place of the defaults."""
    name = spec.partition(":")[0]
    options = builder.Options()
    if ":" not in spec:
        return options
    types = typing.get_type_hints(builder.Options)
    for part in spec.partition(":")[2].split(","):
        key, text = part.partition("=")[::2]
        if key not in types:
            raise UserError(f"{spec}: {name} has no option {key!r}{nearest(key, list(types))}")
        value = parse_option(text, types[key], f"{spec}: {key}")
        options = replace(options, **{key: value})
    return options


def parse_option(text: str, kind: Any, where: str) -> str | int | float | bool:
    """Return an option's value: one of its choices, a number, or true or false."""
    choices = typing.get_args(kind)
    if choices:
        if text not in choices:
            raise UserError(f"{where}={text}: there is no such choice{nearest(text, choices)}")
        return text
    value = parse_value(text, kind, where)
    if not 0 <= value < math.inf:
        raise UserError(f"{where}={text}: it must be finite and not below 0")
    return value


def name_of_config(name: str, builder: type[Comparisons], options: Any) -> str:
    """Return the directory's name for a set, which spells the options that aren't the default."""
    default = builder.Options()
    parts = [name.removeprefix("hh_")] if builder is HH else []
    for key, value in asdict(options).items():
        if value != getattr(default, key):
            parts.append(f"{key}_{value}".lower())
    return "-".join(parts) or "default"


def directory(spec: str, data_dir: str = "") -> Path:
    """Return where a set is or will be prepared.

    It is below `data_dir`, by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    builder, config = find(spec)
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(root).expanduser() / builder.name / config.name / str(builder.VERSION)


def report(spec: str, data_dir: str = "") -> dict | None:
    """Return what was counted when a set was prepared; None if it is not prepared.

    {"files": {name: [sha256, the published one or ""]},
     "splits": {split: {"rows": number, "pairs": number, "dropped": {reason: rows}}}}
    """
    path = directory(spec, data_dir) / "metadata.json"
    if not path.is_file():
        return None
    try:
        counted = json.loads(path.read_text())
        names = sorted(counted["splits"])
        is_complete = all(
            {"rows", "pairs", "dropped"} <= set(counted["splits"][name]) for name in names
        )
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        is_complete = False
    if not is_complete:
        raise UserError(f"{path}: damaged; {repair(spec, data_dir)}")
    return counted


def repair(spec: str, data_dir: str) -> str:
    """Return what a user does if the files of a prepared set are damaged."""
    return f"remove {directory(spec, data_dir)} and prepare {spec} again"


def read(spec: str, split: str, data_dir: str = "", limit: int = 0) -> list[dict]:
    """Return at most `limit` rows (0: all) of a prepared set.

    They are in the order on disk, which is that of a hash of their ids. Each has what a comparison
    of `files.read` has, and id, dataset and ratio. Each of several processes reads its share.

    Args:
      spec: the set.
      split: "train", "heldout" (the set's test), or one of the set's own.
      data_dir: see `directory`.
      limit: rows at most.
    """
    check_prepared(spec, split, data_dir)
    name = SPLITS.get(split, split)
    try:
        source = tfds.builder_from_directory(directory(spec, data_dir)).as_data_source(name)
        count = min(limit or len(source), len(source))
        local_numbers = shares.local(range(count))
        local_rows = [
            from_disk(example, f"{spec}/{name}") for example in examples_at(source, local_numbers)
        ]
    except Exception as error:  # TFDS and its readers raise all kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{spec}: its prepared files cannot be read ({reason}); {repair(spec, data_dir)}"
        ) from None
    return shares.whole(shares.exchange(local_rows))


def check_prepared(spec: str, split: str, data_dir: str) -> None:
    """Raise UserError unless a set is prepared and has the split."""
    counted = report(spec, data_dir)
    if counted is None:
        more = f" --data_dir {data_dir}" if data_dir else ""
        raise UserError(
            f"{spec}: not prepared in {directory(spec, data_dir)}; "
            f"python -m alignjax.data.prepare {spec}{more} prepares it"
        )
    if SPLITS.get(split, split) not in counted["splits"]:
        raise UserError(
            f"{spec}: there is no split {split!r}{nearest(split, list(counted['splits']))}"
        )


def examples_at(source: Any, numbers: Sequence[int]) -> Iterator[dict]:
    """Yield the examples of a TFDS data source with these numbers, CHUNK at a time."""
    for start in range(0, len(numbers), CHUNK):
        yield from source.__getitems__(numbers[start : start + CHUNK])


def from_disk(example: dict, where: str) -> dict:
    """Return a row as it was written.

    On disk text is bytes, and a sequence of dicts is a dict of lists.
    """
    row = {key: example[key].decode() for key in ("id", "dataset", "chosen", "rejected")}
    roles = example["prompt"]["role"]
    contents = example["prompt"]["content"]
    row["prompt"] = [
        {"role": role.decode(), "content": content.decode()}
        for role, content in zip(roles, contents, strict=True)
    ]
    row["margin"] = float(example["margin"])
    row["ratio"] = float(example["ratio"])
    row["where"] = f"{where} {row['id']}"
    return row
