"""Read and write Hugging Face checkpoints: safetensors and config.json, never pickle.

Both ways are exact to the bit in float32 and bfloat16, and both stream. Reading holds a device's
part of one parameter; writing holds the parameters that share a tensor of the file.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignjax.config import Model, Refuse, UserError, refuse
from alignjax.machine.sharding import path_name
from alignjax.models import families
from alignjax.weights import locations
from alignjax.weights.hf_layout import FileTensor, Layout, join_parts, layout_of
from alignjax.weights.hf_views import ParameterView, Readable, Zeros, views_of
from alignjax.weights.peft_config import read_adapter_config
from alignjax.weights.safetensors import (
    INDEX,
    SINGLE_FILE,
    StoredTensor,
    TensorSpec,
    open_tensors,
    write_tensors,
)

# Computed, but stored by old versions of transformers.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # the config's name of a type -> the file's
SHARD_BYTES = 5 * 10**9  # most bytes of a file, unless one tensor has more
SCORE = "score.weight"
LM_HEAD = "lm_head.weight"
HEADS = (SCORE, "score.bias", LM_HEAD)
CLASSIFIER = "ForSequenceClassification"  # the end of such a class's name
COMPARED_ROWS = 1024  # rows of two tensors that are compared at a time

ReadParameter = Callable[[str], np.ndarray]  # path -> the whole parameter
Params = dict[str, Any]  # nested dicts of arrays


def open_hf(
    directory: str | Path, head: str, refuse: Refuse = refuse, *, reads: bool = True
) -> tuple[Model, dict[str, ParameterView]]:
    """Map a checkpoint; return its model, and views of its parameters by path.

    Nothing is read until a view is read. head="scalar" takes `score.weight` and `score.bias` (0 if
    it is absent); a checkpoint without `score.weight` has no views of a head. Raises UserError for
    a model that we can't run, and for a missing, extra or misshapen tensor.

    Args:
      directory: of the checkpoint.
      head: "lm" or "scalar".
      refuse: is called with each of these problems. If it does not raise, views of missing and
        misshapen tensors are zeros.
      reads: a stored copy of a tied head is read, because it may differ from the embeddings.
    """
    directory = Path(directory)
    config = locations.read_config(directory)
    model = families.model_from_hf(config, str(directory / locations.CONFIG), refuse)
    files = CheckpointFiles(
        directory=directory,
        tensors=with_prefix(open_tensors(directory, refuse), model),
        defaulted=families.defaulted_sizes(config),
        refuse=refuse,
    )
    layout = layout_of(model, head)
    if head == "scalar" and SCORE in files.tensors:
        check_labels(config, directory, refuse)
    stored: dict[FileTensor, Readable] = {}
    for tensor in layout.tensors:
        is_score = tensor.name.startswith("score.")
        if is_score and SCORE not in files.tensors:
            continue
        shape = layout.file_shape(tensor)
        if is_score and tensor.name not in files.tensors:
            stored[tensor] = Zeros(shape)
            continue
        stored[tensor] = checked_tensor(files, tensor.name, shape)
    known = {tensor.name for tensor in layout.tensors}
    check_extra(files, known, model, head)
    if reads:
        check_tied_copy(files, model, head)
    return model, views_of(layout, stored)


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """The mapped tensors of a checkpoint, and what its errors name."""

    directory: Path
    tensors: Mapping[str, StoredTensor]
    defaulted: Mapping[str, int]  # sizes that config.json lacks, by field
    refuse: Refuse


def head_of(directory: Path) -> str:
    """Return the head of a Hugging Face checkpoint: "scalar" for a sequence classifier, or "lm".

    `architectures` says it or, where that is absent, whether there is a tensor score.weight.
    Raises UserError if `architectures` is not a list of texts. An adapter says it itself.
    """
    adapted = locations.adapted_model(directory)
    if adapted is not None and read_adapter_config(adapted.adapter).is_classifier:
        return "scalar"
    directory = locations.base_directory(directory)
    kinds = locations.read_config(directory).get("architectures")
    if not kinds and kinds in (None, []):
        return "scalar" if SCORE in open_tensors(directory) else "lm"
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(
            f"{directory / locations.CONFIG}: architectures={kinds!r} must be a list of texts"
        )
    return "scalar" if kinds[0].endswith(CLASSIFIER) else "lm"


def with_prefix(tensors: Mapping[str, StoredTensor], model: Model) -> Mapping[str, StoredTensor]:
    """Return the tensors by the names that a model with a head gives them.

    A model without a head is saved without the prefix of its parameters, "model." for most.
    """
    embedding = families.weight_names(model, "lm")["embed/embedding"]
    prefix = embedding.partition(".")[0] + "."
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    return {name if name in HEADS else prefix + name: tensor for name, tensor in tensors.items()}


def check_labels(config: Mapping[str, Any], directory: Path, refuse: Refuse) -> None:
    """Refuse a classifier that says to have another number of labels than one."""
    where = directory / locations.CONFIG
    labels = config.get("id2label")
    if labels is None:
        count = config.get("num_labels", 1)
        if count != 1:
            refuse(f"{where}: num_labels={count!r}, but a reward model has 1 label")
    elif len(labels) != 1:
        refuse(f"{where}: id2label has {len(labels)} labels, but a reward model has 1 label")


def checked_tensor(files: CheckpointFiles, name: str, shape: tuple[int, ...]) -> Readable:
    """Return a tensor of the files, which is refused if it is missing or has another shape."""
    if name not in files.tensors:
        note = ""
        if name == LM_HEAD and SCORE in files.tensors:
            note = f", but {SCORE}: this is a sequence classifier"
        files.refuse(f"{files.directory}: there is no tensor {name} {list(shape)}{note}")
        return Zeros(shape)
    tensor = files.tensors[name]
    if tensor.shape != shape:
        note = ""
        if files.defaulted:
            absent = ", ".join(f"{field}={size}" for field, size in files.defaulted.items())
            note = f" (config.json lacks fields, whose defaults are {absent})"
        files.refuse(
            f"{files.directory}: tensor {name} is {list(tensor.shape)}, {list(shape)} wanted{note}"
        )
        return Zeros(shape)
    return tensor


def check_extra(files: CheckpointFiles, known: set[str], model: Model, head: str) -> None:
    """Refuse tensors that we would leave unread; a stored copy of a tied head is allowed."""
    for name, tensor in files.tensors.items():
        if name in known or HARMLESS.search(name):
            continue
        if name == LM_HEAD and (model.tied or head == "scalar"):
            continue
        files.refuse(
            f"{files.directory}: tensor {name} {list(tensor.shape)} has no place in "
            f"{model.family!r}, head {head!r}"
        )


def has_tied_copy(tensors: Mapping[str, StoredTensor], model: Model, head: str) -> bool:
    """Return whether the files have a head beside the embeddings that it is tied to."""
    return head == "lm" and model.tied and LM_HEAD in tensors


def check_tied_copy(files: CheckpointFiles, model: Model, head: str) -> None:
    """Refuse a stored head that is tied to the embeddings, unless it is a copy of them."""
    if not has_tied_copy(files.tensors, model, head):
        return
    embedding = families.weight_names(model, head)["embed/embedding"]
    copied = files.tensors.get(embedding)
    if copied is not None and not equal_tensors(files.tensors[LM_HEAD], copied):
        files.refuse(
            f"{files.directory}: {LM_HEAD} differs from {embedding}, but tie_word_embeddings=True"
        )


def equal_tensors(first: StoredTensor, second: StoredTensor) -> bool:
    """Compare two tensors, a part at a time because they may be large."""
    if first.shape != second.shape:
        return False
    count = first.shape[0]
    for row in range(0, count, COMPARED_ROWS):
        rows = (slice(row, min(row + COMPARED_ROWS, count)),)
        if not np.array_equal(first.read(rows), second.read(rows)):
            return False
    return True


def load_hf(directory: str | Path, head: str) -> tuple[Model, Params]:
    """Read a whole checkpoint; return its model and nested dicts of float32 numpy arrays."""
    model, views = open_hf(directory, head)
    return model, nest({path: view.read() for path, view in views.items()})


def save_hf(
    model: Model,
    params: Params,
    directory: str | Path,
    dtype: str = "float32",
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write nested dicts of arrays that this process can read, with `write_hf`.

    The parameters themselves tell which head they have.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    flat = {path_name(path): leaf for path, leaf in leaves}
    head = "scalar" if "head/bias" in flat else "lm"
    shapes = layout_of(model, head).shapes
    odd = sorted({*shapes} ^ {*flat})
    if odd:
        problem = "absent" if odd[0] in shapes else "one too many"
        raise UserError(f"{directory}: parameter {odd[0]} is {problem}")

    def read(path: str) -> np.ndarray:
        return np.asarray(flat[path])

    write_hf(model, head, read, directory, dtype, max_shard_bytes)


def write_hf(
    model: Model,
    head: str,
    read: ReadParameter,
    directory: str | Path,
    dtype: str = "float32",
    max_shard_bytes: int = SHARD_BYTES,
    config: Mapping[str, Any] | None = None,
) -> int:
    """Write safetensors files, then config.json; return the bytes of all tensors.

    There is one file, or several with an index if they would have more than `max_shard_bytes`.
    `read` is asked for the parameters that share a tensor, and they are let go before the next are
    asked for. `dtype` is the files' type, "float32" or "bfloat16". `config` is the content of
    config.json; None is what the family writes for the model.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if config is None:
        config = families.hf_from_model(model, head, dtype)
    layout = layout_of(model, head)
    specs = [
        TensorSpec(tensor.name, DTYPES[dtype], layout.file_shape(tensor))
        for tensor in layout.tensors
    ]
    shards = split_into_shards(specs, max_shard_bytes)
    tensors = joined_tensors(read, layout, directory)
    weight_map = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_tensors(directory / file, shard, tensors)
        weight_map |= {spec.name: file for spec in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return total


def split_into_shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Cut the tensors, in order, into files of at most `max_bytes`; a larger tensor has its own."""
    shards: list[list[TensorSpec]] = [[]]
    free = max_bytes
    for spec in specs:
        if shards[-1] and spec.nbytes > free:
            shards.append([])
            free = max_bytes
        shards[-1].append(spec)
        free -= spec.nbytes
    return shards


def joined_tensors(read: ReadParameter, layout: Layout, directory: Path) -> Iterator[np.ndarray]:
    """Yield the tensors of a layout as the files have them, made of what `read` returns.

    Raises UserError for a parameter of another shape than the model's.
    """
    for paths, tensors in itertools.groupby(layout.tensors, lambda tensor: tensor.paths):
        params = [read(path) for path in paths]
        for path, shape in zip(paths, map(np.shape, params), strict=True):
            if shape != layout.shapes[path]:
                raise UserError(
                    f"{directory}: parameter {path} is {list(shape)}, "
                    f"{list(layout.shapes[path])} wanted"
                )
        for tensor in tensors:
            yield join_parts(paths, [param[tensor.place] for param in params])
        del params  # let them go before the next are read


def nest(flat: Mapping[str, Any]) -> Params:
    """Return {"a": {"b": x}} for {"a/b": x}."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
