"""Where a role's parameters come from: a key, another run's checkpoint, or a Hugging Face checkpoint."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from alignjax import convert, sharding
from alignjax.checkpoint import restore_role
from alignjax.config import Model, UserError, model_from_json
from alignjax.models import families, transformer

# Fields of Model that say how to compute, not what: a child may set them as it likes.
RUNTIME = ("dtype", "remat", "attention", "max_length")
ITEMS = {("lm", "lm"): "model", ("lm", "scalar"): "model", ("ranking", "scalar"): "model", ("ppo", "lm"): "policy",
         ("ppo", "scalar"): "value"}  # fmt: skip


def stored(directory: Path) -> dict:
    """config.json of a run or of a Hugging Face checkpoint."""
    path = Path(directory) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"parent {directory}: no config.json there, so neither a run nor a checkpoint") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def is_run(directory: Path) -> bool:
    return "stage" in stored(directory)


def architecture(directory: Path) -> Model:
    """The model that a run or a Hugging Face checkpoint holds."""
    values = stored(directory)
    if "stage" in values:
        return model_from_json(values)
    return families.model_from_hf(values, str(Path(directory) / "config.json"))


def check_model(model: Model, directory: Path) -> None:
    """UserError unless the parent's architecture is `model`'s."""
    theirs = dataclasses.asdict(architecture(directory))
    for name, mine in dataclasses.asdict(model).items():
        if name not in RUNTIME and theirs[name] != mine:
            raise UserError(f"model.{name}={mine!r}, but the parent {directory} has {theirs[name]!r}")


def shapes(model: Model, head: str, mesh):
    """Shapes, types and shardings of a role's parameters; `head` is "lm" or "scalar"."""
    return sharding.abstract(jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), head)), mesh)


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
        _, params = convert.load_hf(directory, head, key)
        layout = sharding.param_shardings(params, mesh)
        return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, functools.partial(part_of, x)),
                            params, layout)  # fmt: skip
    stage = stored(directory)["stage"]
    if (stage, head) not in ITEMS:
        raise UserError(f"parent {directory}: a language model is wanted, this run's stage is {stage!r}")
    has = "lm" if stage == "lm" else head
    params = restore_role(directory, ITEMS[stage, head], shapes(model, has, mesh))
    if has == head:
        return params
    params.pop("head", None)
    return params | fresh(model, head, mesh, key, "head")


def frozen(params, dtype: str, memory: str):
    """Parameters that are only read: in another type, if `dtype` names one, and on the device or in pinned host memory."""

    def keep(x):
        x = x.astype(dtype or x.dtype)
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host")) if memory == "host" else x

    return jax.tree.map(keep, params)


def fetched(params):
    """A copy on the device of what may be in the host's memory."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), params)


def on_device(params):
    """Inside jit: parameters where they can be computed with, fetched from the host's memory if they are there."""
    return jax.device_put(params, jax.memory.Space.Device)


def part_of(x, index):
    return jnp.asarray(x[index])
