"""Model directories: runs, and Hugging Face checkpoints, adapted or not, here or on the hub.

A model with a PEFT adapter is a path BASE+ADAPTER, of two directories. `local_directory` makes it,
also of an adapter alone, whose adapter_config.json names its base.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from alignjax.config import RUNTIME_FIELDS, Model, UserError, model_from_json, stored_config
from alignjax.machine import workdir as workdirs
from alignjax.models import families
from alignjax.weights import peft_config

# The fields of Model in which a child run may differ from its parent.
CHILDS_OWN = (*RUNTIME_FIELDS, "max_length")
# The files to download from the hub: no pickles, no code, no second copy of the weights in
# another format.
HUB_FILES = (
    "config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
CONFIG = "config.json"
HUB_PREFIX = "hf://"
HUB_NAME = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?")
PLAIN_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # as adapter_config.json has it
TOKENIZER_CONFIG = "tokenizer_config.json"
JOINT = "+"  # between a base and its adapter


@dataclass(frozen=True, kw_only=True)
class AdaptedModel:
    """A Hugging Face checkpoint and a PEFT adapter of it, in two directories."""

    base: Path
    adapter: Path


def local_directory(spec: str, weights: bool = True) -> Path:
    """Return the directory that `spec` names, after downloading it if it is on the hub.

    hf://ORG/NAME[@REVISION] is downloaded once, into the hub's usual cache. Pass
    `weights=False` to download only what a tokenizer needs. Every other `spec` is a local
    directory or gs://BUCKET/... and is returned as it is. A PEFT adapter, alone or as
    BASE+ADAPTER, becomes the path BASE+ADAPTER of two local directories, see `adapted_model`.
    """
    for base, adapter in splits(spec):
        if names_model(base) or (adapter and names_model(adapter)):
            return joint_directory(
                plain_directory(base, weights), plain_directory(adapter, weights)
            )
    directory = plain_directory(spec, weights)
    if is_adapter(directory):
        base = base_of(directory)
        return joint_directory(plain_directory(base, weights), directory)
    return directory


def splits(spec: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to read a spec as base and adapter; none if it names a directory itself."""
    if JOINT not in spec or (not spec.startswith(HUB_PREFIX) and Path(spec).is_dir()):
        return
    for place in re.finditer(re.escape(JOINT), spec):
        yield spec[: place.start()], spec[place.end() :]


def base_spec(spec: str) -> str:
    """Return how the spec of a model with an adapter names its base; itself without an adapter."""
    for base, adapter in splits(spec):
        if names_model(base) or (adapter and names_model(adapter)):
            return base
    directory = plain_directory(spec, weights=False)
    return base_of(directory) if is_adapter(directory) else spec


def names_model(spec: str) -> bool:
    """Return whether a spec names a model on the hub, or a local directory that exists."""
    return spec.startswith(HUB_PREFIX) or ("://" not in spec and Path(spec).is_dir())


def plain_directory(spec: str, weights: bool) -> Path:
    """Return the directory of a model without an adapter, or of an adapter alone."""
    return download(spec, weights) if spec.startswith(HUB_PREFIX) else workdirs.resolve(spec)


@functools.cache
def download(spec: str, weights: bool) -> Path:
    """Return the directory of hf://ORG/NAME[@REVISION] in the hub's cache."""
    match = HUB_NAME.fullmatch(spec)
    if not match:
        raise UserError(f"{spec}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    patterns = [name for name in HUB_FILES if weights or "safetensors" not in name]
    try:
        snapshot = huggingface_hub.snapshot_download(
            match["name"], revision=match["revision"], allow_patterns=patterns
        )
    except Exception as error:  # The hub, its client and the network raise many types.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{spec}: not in the hub's cache, and it cannot be downloaded "
            f"({type(error).__name__}: {reason}); check the name, your access (hf auth login) "
            "and the network, or name a directory that holds the model"
        ) from error
    return Path(snapshot)


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter; transformers looks for the same file."""
    return workdirs.is_local(directory) and (directory / peft_config.CONFIG).is_file()


def base_of(adapter: Path) -> str:
    """Return where the base of an adapter is, by its adapter_config.json: a directory or hf://."""
    config = peft_config.read_adapter_config(adapter)
    where = f"{adapter / peft_config.CONFIG}: base_model_name_or_path={config.base!r}"
    advice = f"name the base too: BASE{JOINT}{adapter}"
    if not config.base:
        raise UserError(f"{where} names no base; {advice}")
    for directory in (Path(config.base), adapter / config.base):
        if directory.is_dir():
            return str(directory)
    if not PLAIN_HUB_NAME.fullmatch(config.base):
        raise UserError(f"{where} is no directory here, and no name on the hub; {advice}")
    revision = f"@{config.revision}" if config.revision else ""
    return f"{HUB_PREFIX}{config.base}{revision}"


def joint_directory(base: Path, adapter: Path) -> Path:
    """Return the path BASE+ADAPTER; UserError unless these are a checkpoint and an adapter."""
    joint = f"{base}{JOINT}{adapter}"
    for directory in (base, adapter):
        if not workdirs.is_local(directory):
            raise UserError(f"{joint}: {directory} must be a local directory, or hf://ORG/NAME")
    if not is_adapter(adapter):
        raise UserError(f"{joint}: no {peft_config.CONFIG} in {adapter}, so no PEFT adapter")
    if is_adapter(base):
        raise UserError(
            f"{joint}: {base} is an adapter itself; merge it into its base with peft's "
            "merge_and_unload first"
        )
    if is_run(base):
        raise UserError(
            f"{joint}: the base of an adapter must be a Hugging Face checkpoint, and {base} is a "
            "run; write it as one with alignjax.convert first"
        )
    # Absolute, because a path of two parts has no directory that it could be relative to.
    return Path(f"{base.absolute()}{JOINT}{adapter.absolute()}")


def adapted_model(directory: Path) -> AdaptedModel | None:
    """Return base and adapter of a path that `local_directory` made; None for any other."""
    if not workdirs.is_local(directory):
        return None
    for base, adapter in splits(str(directory)):
        if Path(base).is_dir() and is_adapter(Path(adapter)):
            return AdaptedModel(base=Path(base), adapter=Path(adapter))
    return None


def base_directory(directory: Path) -> Path:
    """Return the base of a model with an adapter; the directory itself of any other model."""
    adapted = adapted_model(directory)
    return directory if adapted is None else adapted.base


def tokenizer_source(directory: Path) -> Path:
    """Return the directory that has the tokenizer of a checkpoint, with or without an adapter.

    Many adapters have their own, because a chat template came with their training.
    """
    adapted = adapted_model(directory)
    if adapted is None:
        return directory
    has_own = (adapted.adapter / TOKENIZER_CONFIG).is_file()
    return adapted.adapter if has_own else adapted.base


def read_config(directory: Path) -> dict[str, Any]:
    """Read the config.json of a run or of a Hugging Face checkpoint, if adapted, of its base.

    Raises UserError if it is absent or not an object, and for an adapter without its base.
    """
    directory = base_directory(directory)
    path = directory / CONFIG
    workdirs.check_files(directory)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        check_not_adapter(directory)
        raise UserError(
            f"{directory}: no {CONFIG} there, so neither a run nor a checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is wanted, not {type(values).__name__}")
    if is_run_config(values):
        return stored_config(values, str(path))
    check_not_adapter(directory)
    return values


def check_not_adapter(directory: Path) -> None:
    """Raise UserError for an adapter without its base: `local_directory` finds the base."""
    if is_adapter(directory):
        raise UserError(
            f"{directory}: a PEFT adapter ({peft_config.CONFIG}), whose base must be named here: "
            f"BASE{JOINT}{directory}"
        )


def is_run_config(values: Mapping[str, Any]) -> bool:
    """Return whether this content of a config.json is a run's."""
    return "stage" in values


def is_run(directory: Path) -> bool:
    """Return whether a directory holds a training run and not a Hugging Face checkpoint."""
    return is_run_config(read_config(directory))


def architecture(directory: Path) -> Model:
    """Return the architecture of the model in a run or a Hugging Face checkpoint."""
    values = read_config(directory)
    where = str(base_directory(directory) / CONFIG)
    if is_run_config(values):
        return model_from_json(values, where)
    return families.model_from_hf(values, where)


def check_architecture(model: Model, directory: Path) -> None:
    """Raise UserError unless the parent in `directory` has the architecture `model`."""
    parent_values = dataclasses.asdict(architecture(directory))
    for field, value in dataclasses.asdict(model).items():
        if field not in CHILDS_OWN and parent_values[field] != value:
            raise UserError(
                f"model.{field}={value!r}, but the parent {directory} has {parent_values[field]!r}"
            )
