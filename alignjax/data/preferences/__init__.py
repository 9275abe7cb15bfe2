"""Public sets of comparisons, one TFDS builder for each family: names, options, and reading what is prepared.

A set is named by a spec: NAME, or NAME:OPTION=VALUE,OPTION=VALUE. Each family's Options say which there are.
"""

import json
import math
import os
import typing
from dataclasses import asdict, fields, replace
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from alignjax.config import UserError, nearest, parse
from alignjax.data.preferences import hh, prm800k, shp, summarize
from alignjax.data.preferences.base import Comparisons, Config

FAMILIES = dict.fromkeys(hh.SUBSETS, (hh.HH, hh.Options)) | {
    "summarize": (summarize.Summarize, summarize.Options),
    "shp": (shp.SHP, shp.Options),
    "prm800k": (prm800k.PRM800K, prm800k.Options),
}
SETS = tuple(FAMILIES)
SPLITS = {"train": "train", "heldout": "test"}


def find(spec: str) -> tuple[type[Comparisons], Config]:
    """The builder of a set and its config; UserError at a name, an option or a value that doesn't exist."""
    name, colon, given = spec.partition(":")
    if name not in FAMILIES:
        raise UserError(f"{spec}: there is no set {name!r}{nearest(name, SETS)}")
    builder, kind = FAMILIES[name]
    options, types = kind(), typing.get_type_hints(kind)
    for part in given.split(",") if colon else []:
        key, equals, text = part.partition("=")
        if key not in types:
            raise UserError(f"{spec}: {name} has no option {key!r}{nearest(key, list(types))}")
        options = replace(options, **{key: value(text, types[key], f"{spec}: {key}")})
    default = asdict(kind())
    spelt = [f"{key}_{text}" for key, text in asdict(options).items() if text != default[key]]
    base = name.removeprefix("hh_") if name in hh.SUBSETS else ""
    full = "-".join(filter(None, [base, *spelt])) or "default"
    return builder, builder.builder_configs.get(full) or Config(name=full, dataset=name, options=options)


def value(text: str, kind, where: str):
    """An option's value: one of its choices, a whole number, a number, or true and false."""
    choices = typing.get_args(kind)
    if choices:
        if text not in choices:
            raise UserError(f"{where}={text}: there is no such choice{nearest(text, choices)}")
        return text
    found = parse(text, kind, where)
    if not 0 <= found < math.inf:
        raise UserError(f"{where}={text}: it must be finite and not below 0")
    return found


def directory(spec: str, data_dir: str = "") -> Path:
    """Where a set is prepared, or will be: below `data_dir`, $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    builder, config = find(spec)
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(root).expanduser() / builder.name / config.name / str(builder.VERSION)


def report(spec: str, data_dir: str = "") -> dict | None:
    """What was counted when a set was prepared: {"files": {name: sha256}, "splits": {split: {"rows", "pairs",
    "dropped": {reason: rows}}}}. None if it isn't prepared."""
    path = directory(spec, data_dir) / "metadata.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read(spec: str, split: str, data_dir: str = "", limit: int = 0) -> list[dict]:
    """At most `limit` rows (0: all) of a prepared set, in the order on disk, which is that of a hash of their ids.

    As of `files.read`: prompt (messages), chosen, rejected, margin, where; and id, dataset, ratio. The split is
    "train", "heldout" (the set's test), or one of the set's own.
    """
    counted = report(spec, data_dir)
    if counted is None:
        more = f" --data_dir {data_dir}" if data_dir else ""
        raise UserError(f"{spec}: not prepared in {directory(spec, data_dir)}; "
                        f"python -m alignjax.data.prepare {spec}{more} does it")  # fmt: skip
    name = SPLITS.get(split, split)
    if name not in counted["splits"]:
        raise UserError(f"{spec}: there is no split {split!r}{nearest(split, list(counted['splits']))}")
    logging.set_verbosity(logging.ERROR)
    source = tfds.builder_from_directory(directory(spec, data_dir)).as_data_source(name)
    count = min(limit or len(source), len(source))
    return [from_disk(source[i], f"{spec}/{name}") for i in range(count)]


def from_disk(example: dict, where: str) -> dict:
    """A row as written: text is bytes on disk, and a sequence of dicts is a dict of lists."""
    out = {key: example[key].decode() for key in ("id", "dataset", "chosen", "rejected")}
    prompt = zip(example["prompt"]["role"], example["prompt"]["content"], strict=True)
    out["prompt"] = [{"role": role.decode(), "content": content.decode()} for role, content in prompt]
    return out | {"margin": float(example["margin"]), "ratio": float(example["ratio"]), "where": f"{where} {out['id']}"}
