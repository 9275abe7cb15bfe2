"""adapter_config.json of PEFT: which modules have adapters, of which rank and scale.

peft 0.21 decides what a field means. Whatever changes the result in a way that we do not compute is
refused with the file, the field and its value.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignjax.config import UserError
from alignjax.machine import jsonl
from alignjax.models.families.hf_config import HFConfig, shown

CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"
CLASSIFIER_TASK = "SEQ_CLS"
# The head of a sequence classifier, whole. peft adds both names; our families have "score".
SAVED_MODULES = ("score", "classifier")
# Ways to begin that leave the base as it is. Others, such as PiSSA's, change its weights too.
INITIAL_WEIGHTS = (True, False, "gaussian", "eva", "orthogonal")
SUPPORTED = {
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": INITIAL_WEIGHTS,
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", CLASSIFIER_TASK),
}
# Fields that say nothing about the result, or that are read below.
KNOWN = {
    *SUPPORTED,
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "use_rslora",
}
# What peft takes for a field that is absent.
DEFAULTS = {"r": 8, "lora_alpha": 8, "use_rslora": False}
LARGEST_RANK = 2**16
# The first number between dots in a module's name is that of its layer.
FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<number>\d+)\.")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The content of an adapter_config.json that we can compute."""

    fields: HFConfig
    base: str  # how the file names its base model; "" if it does not
    revision: str  # of the base on the hub; "" is the newest
    is_classifier: bool

    @property
    def targets_all_linear(self) -> bool:
        """Return whether all products of the layers have adapters."""
        targets = self.fields.values.get("target_modules")
        return isinstance(targets, str) and targets.lower() == ALL_LINEAR

    def targets(self, module: str) -> bool:
        """Return whether a module, such as model.layers.0.mlp.up_proj, has an adapter."""
        if self.listed("exclude_modules", module):
            return False
        if self.targets_all_linear:
            return True
        if not self.listed("target_modules", module):
            return False
        is_pattern = isinstance(self.fields.values.get("target_modules"), str)
        return is_pattern or self.is_in_layer(module)

    def listed(self, field: str, module: str) -> bool:
        """Return whether a field, a pattern or a list of ends of names, has a module."""
        names = self.fields.values.get(field)
        if not names:
            return False
        if isinstance(names, str):
            return self.pattern(field, names).fullmatch(module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def is_in_layer(self, module: str) -> bool:
        """Return whether a module is in one of the layers that have adapters: all by default."""
        layers = as_list(self.fields.values.get("layers_to_transform"))
        if not layers:
            return True
        patterns = as_list(self.fields.values.get("layers_pattern"))
        match = None if patterns else FIRST_NUMBER.match(module)
        for pattern in patterns:
            text = rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\."
            match = match or self.pattern("layers_pattern", text).match(module)
        return match is not None and int(match["number"]) in layers

    def rank(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return int(self.by_module("rank_pattern", module, self.fields.values.get("r", 8)))

    def scale(self, module: str) -> float:
        """Return the factor of a module's adapter: alpha / rank, or with RS-LoRA alpha / root."""
        alpha = float(self.by_module("alpha_pattern", module, self.fields.require("lora_alpha")))
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.fields.get("use_rslora") else alpha / rank

    def by_module(self, field: str, module: str, default: float) -> float:
        """Return the value of the first pattern of a field that a module's name ends with."""
        for pattern, value in self.fields.object(field).values.items():
            if self.pattern(field, rf"(.*\.)?({pattern})$").match(module):
                return value
        return default

    def pattern(self, field: str, text: str) -> re.Pattern[str]:
        """Return a pattern of a field, compiled; UserError if it is none."""
        try:
            return compiled(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"{self.fields.where}: {field}={shown(text)} is not a regular expression ({error})"
            ) from None


@functools.lru_cache
def compiled(text: str) -> re.Pattern[str]:
    """Return a compiled pattern; thousands of modules are matched with few patterns."""
    return re.compile(text)


def as_list(value: Any) -> list[Any]:
    """Return the values of a field that has one, several or none."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read the adapter_config.json of a directory.

    Raises:
      UserError: for a file that is missing or no JSON object, and for a field whose value changes
        the result in a way that we do not compute; it names file, field and value.
    """
    path = directory / CONFIG
    try:
        values = jsonl.read_object(path)
    except FileNotFoundError:
        raise UserError(f"{directory}: there is no file {CONFIG}") from None
    fields = HFConfig(values=values, where=str(path), defaults=DEFAULTS)
    for name, supported in SUPPORTED.items():
        fields.allow(name, *supported)
    fields.require("peft_type")
    for name in sorted(fields.values.keys() - KNOWN):
        fields.allow(name, None, False, [], {}, "")
    check_forms(fields)
    targets = fields.values.get("target_modules")
    fields.expect("target_modules", bool(targets), "a list of names or a text")
    for name in as_list(fields.values.get("modules_to_save")):
        if name not in SAVED_MODULES:
            raise UserError(
                f"{path}: modules_to_save={shown(name)} is not supported, only "
                f"{shown(SAVED_MODULES[0])}"
            )
    return AdapterConfig(
        fields=fields,
        base=fields.get("base_model_name_or_path", ""),
        revision=fields.get("revision", ""),
        is_classifier=fields.get("task_type") == CLASSIFIER_TASK
        or SAVED_MODULES[0] in as_list(fields.get("modules_to_save")),
    )


def check_forms(fields: HFConfig) -> None:
    """Raise UserError for a field of another form than peft writes."""
    fields.size("r", LARGEST_RANK)
    fields.positive("lora_alpha")
    fields.flag("use_rslora")
    for name in ("base_model_name_or_path", "revision"):
        value = fields.get(name, "")
        fields.expect(name, isinstance(value, str) and value.isprintable(), "a text or null")
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = fields.get(name)
        fields.expect(
            name,
            value is None or isinstance(value, str) or is_list_of(value, str),
            "a list of texts, a text or null",
        )
    layers = as_list(fields.get("layers_to_transform"))
    fields.expect("layers_to_transform", is_list_of(layers, int), "a list of whole numbers or null")
    for name in fields.object("rank_pattern").values:
        fields.object("rank_pattern").size(name, LARGEST_RANK)
    for name in fields.object("alpha_pattern").values:
        fields.object("alpha_pattern").positive(name)


def is_list_of(values: Any, kind: type) -> bool:
    """Return whether a value is a list of values of a type."""
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def config_content(
    *,
    base: str,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    is_classifier: bool,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of adapter_config.json for an export.

    Args:
      base: what peft loads the base model from: a name on the hub or a directory.
      rank: of all adapters whose module `rank_pattern` does not name.
      alpha: numerator of their scale; `alpha_pattern` has those of modules with another.
      targets: ends of the names of the modules that have adapters.
      is_classifier: whether the head of a sequence classifier is in the file.
      rank_pattern: end of a module's name -> its rank.
      alpha_pattern: end of a module's name -> its alpha.
    """
    return {
        "peft_type": "LORA",
        "task_type": CLASSIFIER_TASK if is_classifier else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "rank_pattern": dict(rank_pattern),
        "alpha_pattern": dict(alpha_pattern),
        "modules_to_save": [SAVED_MODULES[0]] if is_classifier else None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
