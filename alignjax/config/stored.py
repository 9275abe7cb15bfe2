"""Configs as runs store them: {dotted field: value}."""

import json
from typing import Any

from alignjax.config.checks import check_fields, check_type, check_types
from alignjax.config.errors import UserError
from alignjax.config.fields import ROLES, Config, Lora, Model, field_types, flatten


def difference(config: Config, stored: dict, ignore: tuple[str, ...] = ()) -> list[str]:
    """Return a line `field: stored -> new` for each field that differs from a stored config.

    A field that the stored config lacks, because an earlier version wrote it, counts as its
    default.

    Args:
      config: the new config.
      stored: what `to_json` wrote.
      ignore: beginnings of the names of fields that may differ.
    """
    new = dict(flatten(config))
    old = dict(flatten(Config())) | stored
    return [
        f"{name}: {old[name]!r} -> {new.get(name, 'absent')!r}"
        for name in sorted({*old, *new})
        if not name.startswith(ignore or ("\0",)) and old[name] != new.get(name, "absent")
    ]


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
            check_type(name, values[name], kinds[name])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return dict(flatten(Config())) | values


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
