"""Where a role's parameters come from: a key, another run's checkpoint, or a Hugging Face checkpoint."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import huggingface_hub
import jax

from alignjax.config import Model, UserError, model_from_json
from alignjax.machine import sharding
from alignjax.machine import workdir as workdirs
from alignjax.models import families, transformer
from alignjax.weights import hf
from alignjax.weights.checkpoint import restore_role

# Fields of Model that say how to compute, not what: a child may set them as it likes.
RUNTIME = ("dtype", "remat", "attention", "max_length")
ITEMS = {
    ("lm", "lm"): "model",
    ("lm", "scalar"): "model",
    ("ranking", "scalar"): "model",
    ("ppo", "lm"): "policy",
    ("ppo", "scalar"): "value",
}
# What is taken from the hub: no pickles, no code, and no second copy of the weights in another format.
FILES = (
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


@functools.cache
def local(spec: str, weights: bool = True) -> Path:
    """The directory that a spec names; hf://ORG/NAME[@REVISION] is brought to the hub's usual cache, once.

    Without `weights`, what a tokenizer needs is enough.
    """
    if not spec.startswith("hf://"):
        return workdirs.place(spec)
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@(\S+))?", spec)
    if not found:
        raise UserError(f"{spec}: hf://ORG/NAME or hf://ORG/NAME@REVISION wanted")
    name, revision = found.groups()
    files = [file for file in FILES if weights or "safetensors" not in file]
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)
        )
    except Exception as error:  # whatever the hub, its client or the network below it raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{spec}: neither in the hub's cache nor to be had from it ({type(error).__name__}: {reason}); see to "
            "its name, your access (hf auth login) and the network, or name a directory that holds it"
        ) from error


def stored(directory: Path) -> dict:
    """config.json of a run or of a Hugging Face checkpoint."""
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
    return "stage" in stored(directory)


def architecture(directory: Path) -> Model:
    """The model that a run or a Hugging Face checkpoint holds."""
    values = stored(directory)
    if "stage" in values:
        return model_from_json(values)
    return families.model_from_hf(values, str(directory / "config.json"))


def check_model(model: Model, directory: Path) -> None:
    """UserError unless the parent's architecture is `model`'s."""
    theirs = dataclasses.asdict(architecture(directory))
    for name, mine in dataclasses.asdict(model).items():
        if name not in RUNTIME and theirs[name] != mine:
            raise UserError(
                f"model.{name}={mine!r}, but the parent {directory} has {theirs[name]!r}"
            )


def shapes(model: Model, head: str, mesh):
    """Shapes, types and shardings of a role's parameters; `head` is "lm" or "scalar"."""
    return sharding.abstract(
        jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), head)), mesh
    )


def fresh(model: Model, head: str, mesh, key, part=None):
    """Newly drawn parameters on the mesh, or one part of them; the same for a key on any devices."""

    def draw(key):
        params = transformer.init(model, key, head)
        return params if part is None else {part: params[part]}

    layout = sharding.param_shardings(jax.eval_shape(draw, key), mesh)
    return jax.jit(draw, out_shardings=layout)(key)


def load(model: Model, head: str, mesh, key, directory: Path | None):
    """A role's parameters on the mesh. A scalar role of a language model gets a fresh head, drawn from `key`."""
    if directory is None:
        return fresh(model, head, mesh, key)
    check_model(model, directory)
    if not is_run(directory):
        params = read_hf(model, head, mesh, directory)
        return (
            params
            if head == "lm" or "head" in params
            else params | fresh(model, head, mesh, key, "head")
        )
    stage = stored(directory)["stage"]
    if (stage, head) not in ITEMS:
        raise UserError(
            f"parent {directory}: a language model is wanted, this run's stage is {stage!r}"
        )
    has = "lm" if stage == "lm" else head
    params = restore_role(directory, ITEMS[stage, head], shapes(model, has, mesh))
    if has == head:
        return params
    params.pop("head", None)
    return params | fresh(model, head, mesh, key, "head")


def read_hf(model: Model, head: str, mesh, directory: Path):
    """A Hugging Face checkpoint's parameters on the mesh, without a `head` where a scalar one is wanted and not there.

    A process reads of the files what its devices hold, one parameter after the other.
    """
    if not workdirs.is_local(directory):
        raise UserError(
            f"{directory}: a Hugging Face checkpoint is read from a local directory, or by hf://ORG/NAME"
        )
    _, views = hf.open_hf(directory, head)
    wanted = shapes(model, head, mesh)
    if "head" in wanted and "head/kernel" not in views:
        del wanted["head"]

    def place(path, x):
        parts = {}  # devices that hold the same part share it

        def part(index):
            if str(index) not in parts:
                parts[str(index)] = hf.cut(views[sharding.path_name(path)], index)
            return parts[str(index)]

        placed = jax.make_array_from_callback(x.shape, x.sharding, part)
        return placed.block_until_ready()  # its parts on the host go before the next are read

    return jax.tree_util.tree_map_with_path(place, wanted)


def frozen(params, dtype: str, memory: str):
    """Parameters that are only read: in another type, if `dtype` names one, and on the device or in pinned host memory."""

    def keep(x):
        x = x.astype(dtype or x.dtype)
        return (
            jax.device_put(x, x.sharding.with_memory_kind("pinned_host")) if memory == "host" else x
        )

    return jax.tree.map(keep, params)


def abstract_frozen(params, dtype: str, memory: str):
    """Return what `frozen` makes of shapes."""

    def keep(x):
        layout = x.sharding.with_memory_kind("pinned_host") if memory == "host" else x.sharding
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=layout)

    return jax.tree.map(keep, params)


def fetched(params):
    """A copy on the device of what may be in the host's memory."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), params)


def on_device(params):
    """Inside jit: parameters where they can be computed with, fetched from the host's memory if they are there."""
    return jax.device_put(params, jax.memory.Space.Device)
