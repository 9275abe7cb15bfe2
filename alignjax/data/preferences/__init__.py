"""Public sets of comparisons, one TFDS builder for each family: names, options, and reading what is prepared.

A set is named by a spec: NAME, or NAME:OPTION=VALUE,OPTION=VALUE. Each family's Options say which there are.
"""

import json
import math
import os
import typing
from dataclasses import asdict, replace
from pathlib import Path

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


def find(spec: str) -> tuple[type[Comparisons], Config]:
    """The builder of a set and its config; UserError at a name, an option or a value that doesn't exist."""
    name, colon, given = spec.partition(":")
    if name not in FAMILIES:
        raise UserError(f"{spec}: there is no set {name!r}{nearest(name, SETS)}")
    builder = FAMILIES[name]
    default = builder.Options()
    options, types = default, typing.get_type_hints(builder.Options)
    for part in given.split(",") if colon else []:
        key, equals, text = part.partition("=")
        if key not in types:
            raise UserError(f"{spec}: {name} has no option {key!r}{nearest(key, list(types))}")
        options = replace(options, **{key: value(text, types[key], f"{spec}: {key}")})
    spelt = [
        f"{key}_{text}".lower()
        for key, text in asdict(options).items()
        if text != getattr(default, key)
    ]
    base = name.removeprefix("hh_") if builder is HH else ""
    full = "-".join(filter(None, [base, *spelt])) or "default"
    return builder, builder.builder_configs.get(full) or Config(
        name=full, dataset=name, options=options
    )


def value(text: str, kind, where: str):
    """An option's value: one of its choices, a whole number, a number, or true and false."""
    choices = typing.get_args(kind)
    if choices:
        if text not in choices:
            raise UserError(f"{where}={text}: there is no such choice{nearest(text, choices)}")
        return text
    found = parse_value(text, kind, where)
    if not 0 <= found < math.inf:
        raise UserError(f"{where}={text}: it must be finite and not below 0")
    return found


def directory(spec: str, data_dir: str = "") -> Path:
    """Where a set is prepared, or will be: below `data_dir`, $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    builder, config = find(spec)
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(root).expanduser() / builder.name / config.name / str(builder.VERSION)


def report(spec: str, data_dir: str = "") -> dict | None:
    """What was counted when a set was prepared; None if it isn't.

    {"files": {name: [sha256, the published one or ""]}, "splits": {split: {"rows", "pairs", "dropped": {reason: rows}}}}.
    """
    path = directory(spec, data_dir) / "metadata.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read(spec: str, split: str, data_dir: str = "", limit: int = 0) -> list[dict]:
    """At most `limit` rows (0: all) of a prepared set, in the order on disk, which is that of a hash of their ids.

    As of `files.read`: prompt (messages), chosen, rejected, margin, where; and id, dataset, ratio. The split is
    "train", "heldout" (the set's test), or one of the set's own. Each of several processes reads its share.
    """
    counted = report(spec, data_dir)
    if counted is None:
        more = f" --data_dir {data_dir}" if data_dir else ""
        raise UserError(
            f"{spec}: not prepared in {directory(spec, data_dir)}; "
            f"python -m alignjax.data.prepare {spec}{more} does it"
        )
    name = SPLITS.get(split, split)
    if name not in counted["splits"]:
        raise UserError(
            f"{spec}: there is no split {split!r}{nearest(split, list(counted['splits']))}"
        )
    source = tfds.builder_from_directory(directory(spec, data_dir)).as_data_source(name)
    count = min(limit or len(source), len(source))
    numbers = shares.mine(range(count))
    examples = (
        x
        for at in range(0, len(numbers), 1024)
        for x in source.__getitems__(numbers[at : at + 1024])
    )
    return shares.whole(
        shares.exchange([from_disk(example, f"{spec}/{name}") for example in examples])
    )


def from_disk(example: dict, where: str) -> dict:
    """A row as written: text is bytes on disk, and a sequence of dicts is a dict of lists."""
    out = {key: example[key].decode() for key in ("id", "dataset", "chosen", "rejected")}
    prompt = zip(example["prompt"]["role"], example["prompt"]["content"], strict=True)
    out["prompt"] = [
        {"role": role.decode(), "content": content.decode()} for role, content in prompt
    ]
    return out | {
        "margin": float(example["margin"]),
        "ratio": float(example["ratio"]),
        "where": f"{where} {out['id']}",
    }
