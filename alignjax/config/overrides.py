"""Fields of a config that a command line sets."""

import ast
import dataclasses
import functools
import json
import typing
import warnings
from collections.abc import Sequence
from typing import Any

from alignjax.config.checks import is_dictionary_of_texts
from alignjax.config.errors import UserError, nearest, short
from alignjax.config.fields import TABLES, Config, flatten


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Return {dotted field: text} of arguments --config.FIELD=VALUE or --config.FIELD VALUE.

    Raises:
      UserError: for any other argument.
    """
    overrides = {}
    remaining = list(arguments)
    while remaining:
        name, equals, value = remaining.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(
                f"{name}: no such argument; a field of the config is set by --config.FIELD=VALUE"
            )
        if not equals:
            if not remaining:
                raise UserError(f"{name}: a value is missing")
            value = remaining.pop(0)
        if value.startswith("--config."):
            raise UserError(f"{name}: a value is missing before {value}")
        key = name.removeprefix("--config.")
        if overrides.get(key, value) != value:
            raise UserError(f"{name}={value}: it is also given as {overrides[key]}")
        overrides[key] = value
    return overrides


def override(config: Config, key: str, text: str) -> None:
    """Set one field, given by its dotted name, from text of the field's type."""
    for table in TABLES:
        if key == table or key.startswith(f"{table}."):
            override_entry(config, table, key, text)
            return
    *groups, last = key.split(".")
    target = config
    for depth, name in enumerate((*groups, last)):
        if isinstance(target, dict) and depth == len(groups):
            target[last] = text
            return
        is_group = dataclasses.is_dataclass(target)
        known = [f.name for f in dataclasses.fields(target)] if is_group else []
        if name not in known:
            all_fields = [field_name for field_name, _ in flatten(config)]
            raise UserError(f"--config.{key}: there is no such field{nearest(key, all_fields)}")
        if depth < len(groups):
            target = getattr(target, name)
    kind = typing.get_type_hints(type(target))[last]
    if typing.get_origin(kind) is dict:
        hint = f"; this is a group, and --config.{key}.FIELD=VALUE sets one of its fields"
        setattr(target, last, parse_names(text, f"--config.{key}", hint))
        return
    if dataclasses.is_dataclass(kind):
        raise UserError(f"--config.{key}: this is a group; set one of its fields")
    setattr(target, last, parse_value(text, kind, f"--config.{key}"))


def override_entry(config: Config, table: str, key: str, text: str) -> None:
    """Set a field of an entry of a table: TABLE.NAME.FIELD; a new name makes a new entry."""
    name, _, field = key.removeprefix(table).removeprefix(".").partition(".")
    kinds = typing.get_type_hints(TABLES[table])
    if not name or not field:
        raise UserError(
            f"--config.{key}: this is no field; the fields of an entry are set by "
            f"--config.{table}.NAME.FIELD=VALUE, with a FIELD among {', '.join(kinds)}"
        )
    if field not in kinds:
        raise UserError(f"--config.{key}: there is no such field{nearest(field, list(kinds))}")
    value = parse_value(text, kinds[field], f"--config.{key}")
    entries = functools.reduce(getattr, table.split("."), config)
    setattr(entries.setdefault(name, TABLES[table]()), field, value)


def parse_value(text: str, kind: type, name: str) -> Any:
    """Return `text` as a value of type `kind`; a float may be written as an integer."""
    if kind is str:
        return text
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in the text
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        if kind is float and type(value) is int:
            value = float(value)
    except (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):
        value = text
    if type(value) is not kind:
        kind_given = type(value).__name__
        raise UserError(f"{name}={short(text)}: {kind.__name__} wanted, {kind_given} given")
    return value


def parse_names(text: str, name: str, hint: str = "") -> dict[str, str]:
    """Return a dictionary of texts, written as a JSON object: {"prompt": "question"}."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not is_dictionary_of_texts(value):
        raise UserError(
            f"{name}={text}: expected a JSON object of texts, "
            f'such as {{"prompt": "question"}}{hint}'
        )
    return value
