"""What a run keeps of the Hugging Face checkpoint that its model came from.

The checkpoint's config.json and generation_config.json hold facts that training does not change
and for which a run's own config has no place: the tokens that end a response, defaults for
sampling, the number of positions. A run has both in `imported.json`. Its children inherit them,
and an export writes them again.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignjax.config import Model, UserError
from alignjax.data.ends import as_list, declared_ids, end_tokens
from alignjax.machine import jsonl
from alignjax.models import families
from alignjax.weights import locations

IMPORTED_FILE = "imported.json"  # of a run
GENERATION_FILE = "generation_config.json"
# Fields of an imported config.json that an export writes anew or leaves out: they describe the
# imported weights, or name code that we neither run nor copy.
REWRITTEN = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "quantization_config",
    "torch_dtype",
)
# Fields of an export's config.json in which the family says what the new weights are.
WRITTEN = ("architectures", "torch_dtype", "id2label", "label2id")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """The contents of two files; both are empty for a model that was trained from scratch."""

    config: Mapping[str, Any] = field(default_factory=dict)  # of config.json
    generation: Mapping[str, Any] = field(default_factory=dict)  # of generation_config.json
    source: str = ""  # the checkpoint's name on the hub, or of its directory
    config_file: str = ""  # where each of the files is, for errors
    generation_file: str = ""

    @property
    def declared_ends(self) -> dict[str, Any]:
        """Return file and field -> value of each field that names the ends of a response."""
        return {
            f"{self.generation_file}: eos_token_id": self.generation.get("eos_token_id"),
            f"{self.config_file}: eos_token_id": self.config.get("eos_token_id"),
        }

    def check_ends(self, vocab_size: int) -> None:
        """Raise UserError for a declared end that is not a token of the model.

        Whatever samples from the run or exports it would refuse it, after hours of training.
        """
        for where, value in self.declared_ends.items():
            declared_ids(where, value, vocab_size)

    def to_json(self) -> str:
        """Return the content of `imported.json`."""
        content = {
            "source": self.source,
            "config": self.config,
            "generation_config": self.generation,
        }
        return json.dumps(content, indent=1)


def read_imported(directory: Path) -> Imported:
    """Return what a run has kept, or what a Hugging Face checkpoint says.

    Raises:
      UserError: for a file that does not hold a JSON object.
    """
    if not locations.is_run(directory):
        base = locations.base_directory(directory)
        return Imported(
            config=locations.read_config(base),
            generation=read_object(base / GENERATION_FILE),
            source=name_of(base),
            config_file=str(base / "config.json"),
            generation_file=str(base / GENERATION_FILE),
        )
    path = directory / IMPORTED_FILE
    content = {"config": {}, "generation_config": {}, "source": ""} | read_object(path)
    for name in ("config", "generation_config"):
        if not isinstance(content[name], dict):
            raise UserError(f"{path}: {name} must be an object, not {content[name]!r}")
    return Imported(
        config=content["config"],
        generation=content["generation_config"],
        source=str(content["source"]),
        config_file=f"{path}: config",
        generation_file=f"{path}: generation_config",
    )


def name_of(directory: Path) -> str:
    """Return the name of a checkpoint: on the hub if it is in the hub's cache, else its own.

    The cache has ORG/NAME in models--ORG--NAME/snapshots/REVISION.
    """
    for part in directory.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return directory.name or directory.absolute().name


def ends_of(
    directory: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[int, ...]:
    """Return the tokens that end a response of a run or a Hugging Face checkpoint."""
    stored = locations.read_config(directory)
    return end_tokens(
        tokenizer,
        read_imported(directory).declared_ends,
        vocab_size,
        plain_text=stored.get("data.kind") == "text",
    )


def inherit(workdir: Path, parents: Mapping[str, Path]) -> Imported:
    """Return what a run has kept if it has begun, else what it takes from its parent.

    A PPO run takes it from its policy.
    """
    if (workdir / "config.json").exists():
        return read_imported(workdir)
    parent = parents.get("policy", parents.get("model"))
    return Imported() if parent is None else read_imported(parent)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if there is no file, UserError for anything else."""
    try:
        return jsonl.read_object(path)
    except FileNotFoundError:
        return {}


def exported_config(model: Model, head: str, dtype: str, imported: Imported) -> dict[str, Any]:
    """Return the content of config.json for an export: the imported one where it holds.

    It holds if it describes this model. `model.max_length` may differ: it says how much a run
    reads, while the file says how many positions the model knows, and the larger number is
    written.
    """
    ours = families.hf_from_model(model, head, dtype)
    at_import = imported_model(imported, model)
    if at_import is None:
        return ours
    kept = {name: value for name, value in imported.config.items() if name not in REWRITTEN}
    written = {name: ours[name] for name in WRITTEN if name in ours}
    if model.max_length > at_import.max_length:
        shorter = dataclasses.replace(model, max_length=at_import.max_length)
        before = families.hf_from_model(shorter, head, dtype)
        written |= {name: value for name, value in ours.items() if before[name] != value}
    return kept | written


def exported_generation(
    imported: Imported, tokens: Mapping[str, Any], ends: Sequence[int]
) -> dict[str, Any]:
    """Return the content of generation_config.json for an export: the imported one.

    Ends that it lacks are added, such as the template's end for a base model that was trained on
    conversations. Without an imported one, there are the ends and the ids of special tokens.
    """
    if not imported.generation:
        return {**tokens, "eos_token_id": list(ends)}
    declared = as_list(imported.generation.get("eos_token_id"))
    missing = [token for token in ends if token not in declared]
    if not missing:
        return dict(imported.generation)
    kept = dict(imported.generation)
    # It would let transformers take the ends from config.json.
    kept.pop("_from_model_config", None)
    return kept | {"eos_token_id": [*declared, *missing]}


def imported_model(imported: Imported, model: Model) -> Model | None:
    """Return the model that the imported config.json describes, or None if it is another one."""
    if imported.config.get("model_type") != model.family:
        return None
    try:
        at_import = families.model_from_hf(imported.config, imported.config_file)
    except UserError:
        return None
    runtime = {name: getattr(model, name) for name in locations.CHILDS_OWN}
    return at_import if dataclasses.replace(at_import, **runtime) == model else None
