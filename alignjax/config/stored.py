"""Configs as runs store them: {dotted field: value}."""

import dataclasses
import json
from typing import Any

from alignjax.config.checks import check_fields, check_type, check_types
from alignjax.config.errors import UserError
from alignjax.config.fields import ROLES, TABLES, Config, Lora, Model, field_types, flatten


def difference(config: Config, stored: dict, ignore: tuple[str, ...] = ()) -> list[str]:
    """Return a line `field: stored -> new` for each field that differs from a stored config.

    A field that the stored config lacks, because an earlier version wrote it, counts as its
    default.

    Args:
      config: the new config.
      stored: what `to_json` wrote.
      ignore: beginnings of the names of fields that may differ.
    """
    new = with_entries_apart(dict(flatten(config)))
    old = with_entries_apart(dict(flatten(Config())) | stored)
    lines = []
    for name in sorted({*old, *new}):
        before = old.get(name, "absent")
        after = new.get(name, "absent")
        if before != after and not name.startswith(ignore or ("\0",)):
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines


def with_entries_apart(values: dict[str, Any]) -> dict[str, Any]:
    """Return {dotted field: value} with the fields of each table's entries by themselves.

    A field that an entry lacks, because an earlier version wrote it, gets its default.
    """
    apart = dict(values)
    for name, entry_kind in TABLES.items():
        for key, entry in apart.pop(name, {}).items():
            fields = dict(flatten(entry_kind())) | entry
            apart |= {f"{name}.{key}.{field}": value for field, value in fields.items()}
    return apart


def to_json(config: Config) -> str:
    """Return a config as JSON: {dotted field: value}."""
    return json.dumps(dict(flatten(config)), indent=1)


def stored_config(values: Any, where: str) -> dict[str, Any]:
    """Return a config that `to_json` wrote, as {dotted field: value}; check its types.

    Fields that this version does not know stay; fields that it lacks get their defaults.

    Args:
      values: what the file holds.
      where: the file, with which errors begin.

    Raises:
      UserError: if this is no run's config, or a value does not have the type of its field.
    """
    if not isinstance(values, dict) or values.get("stage") not in tuple(ROLES):
        raise UserError(
            f"{where}: this is not the config of a run; its stage is not one of {', '.join(ROLES)}"
        )
    kinds = dict(field_types(Config))
    for name in kinds.keys() & values.keys():
        try:
            check_type(name, as_entries(name, values[name]), kinds[name])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return dict(flatten(Config())) | values


def as_entries(name: str, value: Any) -> Any:
    """Return a stored value as its field's type has it: a table's entries as dataclasses.

    Fields of an entry that this version does not know are left out.
    """
    if name not in TABLES or not isinstance(value, dict):
        return value
    known = {field.name for field in dataclasses.fields(TABLES[name])}
    return {
        key: TABLES[name](**{field: entry[field] for field in known & entry.keys()})
        if isinstance(entry, dict)
        else entry
        for key, entry in value.items()
    }


def model_from_json(stored: dict, where: str = "config.json") -> Model:
    """Return the model of a config that `to_json` wrote.

    Args:
      stored: {dotted field: value}.
      where: the file, with which errors begin.

    Raises:
      UserError: for a field that does not exist, and for a value that cannot be right.
    """
    model = Model()
    for key, value in stored.items():
        if key.startswith("model."):
            setattr(model, key.removeprefix("model."), value)
    try:
        check_types(model, Model, "model.")
        check_fields(Config(model=model))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return model


def lora_from_json(stored: dict) -> Lora:
    """Return the adapters' settings of a config that `stored_config` has read."""
    return Lora(**{name: stored[f"lora.{name}"] for name in vars(Lora())})
