"""Model directories: runs, Hugging Face checkpoints, and models named on the hub."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from alignjax.config import Model, UserError, model_from_json, stored_config
from alignjax.machine import workdir as workdirs
from alignjax.models import families

# Fields of Model that say how to compute, not what: a child run may choose its own.
RUNTIME_FIELDS = ("dtype", "remat", "attention", "max_length")
# The files to download from the hub: no pickles, no code, no second copy of the weights in
# another format.
HUB_FILES = (
    "config.json",
    "adapter_config.json",
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
ADAPTER_CONFIG = "adapter_config.json"
HUB_NAME = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?")


def is_config(spec: str) -> bool:
    """Return whether a parent is named by a config, rather than by a directory or hub name."""
    return spec.partition(":")[0].endswith(".py")


@functools.cache
def local_directory(spec: str, weights: bool = True) -> Path:
    """Return the directory that `spec` names, after downloading it if it is on the hub.

    hf://ORG/NAME[@REVISION] is downloaded once, into the hub's usual cache. Pass
    `weights=False` to download only what a tokenizer needs. Every other `spec` is a local
    directory or gs://BUCKET/... and is returned as it is.
    """
    if not spec.startswith("hf://"):
        return workdirs.resolve(spec)
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


def read_config(directory: Path) -> dict[str, Any]:
    """Read the config.json of a run or of a Hugging Face checkpoint.

    Raises UserError if it is absent or not an object, and for an adapter, which is neither.
    """
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
    """Raise UserError for a PEFT adapter, which transformers would add to a model elsewhere."""
    if (directory / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{directory}: a PEFT adapter ({ADAPTER_CONFIG}), which cannot be read yet; merge it "
            "into its base model with peft: merge_and_unload(), then save_pretrained(DIR)"
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
    if is_run_config(values):
        return model_from_json(values, str(directory / CONFIG))
    return families.model_from_hf(values, str(directory / CONFIG))


def check_architecture(model: Model, directory: Path) -> None:
    """Raise UserError unless the parent in `directory` has the architecture `model`."""
    parent_values = dataclasses.asdict(architecture(directory))
    for field, value in dataclasses.asdict(model).items():
        if field not in RUNTIME_FIELDS and parent_values[field] != value:
            raise UserError(
                f"model.{field}={value!r}, but the parent {directory} has {parent_values[field]!r}"
            )
