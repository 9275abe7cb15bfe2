"""A config.json as a stranger wrote it: checked fields, with the defaults of transformers."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignjax.config import Refuse, UserError, refuse

LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 100_000
SHOWN_CHARACTERS = 80  # of a value in an error

# What these fields hold where they are present. We read none of them, and transformers refuses
# other types, because then the file is not what it seems to be.
UNREAD_FIELDS: Mapping[str, tuple[type, ...]] = {
    "architectures": (list,),
    "attention_dropout": (int, float),
    "bos_token_id": (int,),
    "dtype": (str,),
    "eos_token_id": (int, list),
    "id2label": (dict,),
    "initializer_range": (float,),
    "label2id": (dict,),
    "max_window_layers": (int,),
    "num_labels": (int,),
    "pad_token_id": (int,),
    "pretraining_tp": (int,),
    "sliding_window": (int,),
    "torch_dtype": (str,),
    "use_cache": (bool,),
}
NEVER_NULL = ("initializer_range", "max_window_layers", "use_cache")
# Fields that change what is computed, or where weights are, in any family.
REFUSED_UNLESS: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "per_layer_config": (None,),
    "quantization_config": (None,),
    "text_config": (None,),
    "transformers_weights": (None,),
    "vision_config": (None,),
}


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """The content of a config.json, or of an object in it.

    values: the fields by name.
    where: the file, in errors.
    prefix: comes before the names of fields in errors, such as "rope_parameters.".
    defaults: what transformers takes for a field that is absent. An explicit null is not absent.
    refuse: is called with what we can't compute; by default it raises UserError.
    """

    values: Mapping[str, Any]
    where: str
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refuse: Refuse = refuse

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or the default if it is absent or null."""
        value = self.values.get(name, self.defaults.get(name))
        return default if value is None else value

    def require(self, name: str) -> Any:
        """Return a field or transformers' default; UserError if it is absent or null."""
        if name in self.values:
            value = self.values[name]
        elif name in self.defaults:
            value = self.defaults[name]
        else:
            raise UserError(f"{self.where}: {self.prefix}{name} is missing")
        if value is None:
            raise UserError(f"{self.where}: {self.prefix}{name}=null is not a value for it")
        return value

    def allow(self, name: str, *supported: Any) -> None:
        """Refuse a field that is present with a value other than these."""
        if name not in self.values:
            return
        value = self.values[name]
        # In Python 1 == True, but not in JSON.
        if not any(value == other and is_bool(value) == is_bool(other) for other in supported):
            self.refuse(
                f"{self.where}: {self.prefix}{name}={shown(value)} is not supported, "
                f"only {shown(supported[0])}"
            )

    def size(self, name: str, most: int = LARGEST_SIZE) -> int:
        """Return a whole number from 1 to `most`; UserError if the field is anything else."""
        value = self.require(name)
        is_size = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        self.expect(name, is_size, f"a whole number from 1 to {most}")
        return value

    def size_or(self, name: str, default: int) -> int:
        """Return a whole number above 0, or `default` if the field is null or without default."""
        if self.get(name) is None:
            return default
        return self.size(name)

    def size_or_zero(self, name: str) -> int:
        """Return a whole number from 0 on."""
        return 0 if self.require(name) == 0 else self.size(name)

    def number(self, name: str, least: float = 0.0) -> float:
        """Return a finite number that is not below `least`."""
        value = self.require(name)
        is_number = is_real(value) and math.isfinite(value) and value >= least
        self.expect(name, is_number, f"a finite number, and at least {least:g}")
        return float(value)

    def positive(self, name: str) -> float:
        """Return a finite number above 0."""
        value = self.require(name)
        is_positive = is_real(value) and 0 < value < math.inf
        self.expect(name, is_positive, "a finite number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self.require(name)
        self.expect(name, isinstance(value, bool), "true or false")
        return value

    def object(self, name: str) -> "HFConfig":
        """Return an object in the file; an absent one, or null, is empty."""
        value = self.values.get(name)
        self.expect(name, isinstance(value, dict | None), "an object or null")
        return HFConfig(
            values=value or {},
            where=self.where,
            prefix=f"{self.prefix}{name}.",
            refuse=self.refuse,
        )

    def expect(self, name: str, holds: bool, wanted: str) -> None:
        """Raise UserError unless a condition holds for a field; `wanted` says what it may be."""
        if not holds:
            raise UserError(self.unexpected(name, wanted))

    def unexpected(self, name: str, wanted: str) -> str:
        """Return the message that a field must be what is wanted, with its value."""
        value = self.values.get(name, self.defaults.get(name))
        return f"{self.where}: {self.prefix}{name}={shown(value)} must be {wanted}"


def check_any_family(config: HFConfig) -> None:
    """Refuse what no family computes, and fields of wrong types that none of them reads."""
    for name, supported in REFUSED_UNLESS.items():
        config.allow(name, *supported)
    for name, types in UNREAD_FIELDS.items():
        if name not in config.values:
            continue
        value = config.values[name]
        of_type = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        wanted = [JSON_TYPES[one] for one in types]
        if name not in NEVER_NULL:
            of_type = of_type or value is None
            wanted.append("null")
        if not of_type:
            config.refuse(config.unexpected(name, " or ".join(wanted)))


JSON_TYPES = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "a text",
}


def is_bool(value: Any) -> bool:
    """Return whether a value is true or false."""
    return isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Return whether a value is a number of a size that a float can have."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1000
    return isinstance(value, float)


def shown(value: Any) -> str:
    """Return a value as a text, cut off if it is long."""
    text = json.dumps(value) if isinstance(value, bool | None) else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
