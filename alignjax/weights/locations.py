"""Model directories: runs, Hugging Face checkpoints, and models named on the hub."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import huggingface_hub

from alignjax.config import Model, UserError, model_from_json
from alignjax.machine import workdir as workdirs
from alignjax.models import families

# Fields of Model that say how to compute, not what: a child run may choose its own.
RUNTIME_FIELDS = ("dtype", "remat", "attention", "max_length")
# The files to download from the hub: no pickles, no code, no second copy of the weights in
# another format.
HUB_FILES = (
    "config.json",
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
)
HUB_NAME = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?")


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


def read_config(directory: Path) -> dict:
    """Read the config.json of a run or of a Hugging Face checkpoint."""
    path = directory / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"parent {directory}: no config.json there, so neither a run nor a checkpoint"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def is_run(directory: Path) -> bool:
    """Return whether a directory holds a training run and not a Hugging Face checkpoint."""
    return "stage" in read_config(directory)


def architecture(directory: Path) -> Model:
    """Return the architecture of the model in a run or a Hugging Face checkpoint."""
    values = read_config(directory)
    if "stage" in values:
        return model_from_json(values, str(directory / "config.json"))
    return families.model_from_hf(values, str(directory / "config.json"))


def check_architecture(model: Model, directory: Path) -> None:
    """Raise UserError unless the parent in `directory` has the architecture `model`."""
    parent_values = dataclasses.asdict(architecture(directory))
    for field, value in dataclasses.asdict(model).items():
        if field not in RUNTIME_FIELDS and parent_values[field] != value:
            raise UserError(
                f"model.{field}={value!r}, but the parent {directory} has {parent_values[field]!r}"
            )
