"""A role's parameters: drawn from a key, or loaded from a run or a Hugging Face checkpoint."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.config import Lora, Model, Refuse, UserError, refuse
from alignjax.machine import sharding
from alignjax.machine import workdir as workdirs
from alignjax.models import lora, transformer
from alignjax.weights import bases, hf, locations, peft_adapter, peft_parameters
from alignjax.weights.checkpoint import restore_role

# (stage, role of a run) -> the head of the role's model.
HEADS = {
    ("lm", "model"): "lm",
    ("ranking", "model"): "scalar",
    ("dpo", "policy"): "lm",
    ("dpo", "reference"): "lm",
    ("ppo", "policy"): "lm",
    ("ppo", "reference"): "lm",
    ("ppo", "value"): "scalar",
    ("ppo", "reward"): "scalar",
}
FROZEN_ROLES = ("reference", "reward")
LANGUAGE_MODELS = ("lm", "dpo")  # stages whose runs have no scalar head
Params = dict[str, Any]  # a tree of arrays, or of their shapes


def trained_heads(stage: str) -> dict[str, str]:
    """Return the heads of the roles that a stage trains."""
    return {
        role: head
        for (its_stage, role), head in HEADS.items()
        if its_stage == stage and role not in FROZEN_ROLES
    }


def abstract_params(model: Model, head: str, mesh: jax.sharding.Mesh) -> Params:
    """Return the shapes, types and shardings of a role's parameters.

    `head` is "lm" or "scalar".
    """
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), head))
    return sharding.abstract(shapes, mesh)


def abstract_trained(model: Model, head: str, mesh: jax.sharding.Mesh, settings: Lora) -> Params:
    """Return the shapes of what a role trains: adapters, or all parameters if `rank` is 0."""
    if settings.rank:
        return abstract_adapters(model, head, mesh, settings)
    return abstract_params(model, head, mesh)


def abstract_base(
    model: Model, head: str, mesh: jax.sharding.Mesh, settings: Lora
) -> Params | None:
    """Return the shapes of the frozen base beneath a role's adapters; None without adapters."""
    if not settings.rank:
        return None
    params = abstract_params(model, head, mesh)
    if head == "scalar":
        params = lora.without_head(params)
    params = abstract_frozen(model, params, model.dtype, "device")
    scales = jax.eval_shape(lambda: lora.scales(settings, model.layers))
    return lora.combine(params, sharding.abstract(scales, mesh))


def init_params(
    model: Model, head: str, mesh: jax.sharding.Mesh, key: jax.Array, part: str | None = None
) -> Params:
    """Draw new parameters, or only their top-level `part`, onto the mesh.

    A key gives the same parameters on any number of devices.
    """
    # A copy, because a config's model may change.
    return drawing(dataclasses.replace(model), head, mesh, part)(key)


@functools.cache
def drawing(
    model: Model, head: str, mesh: jax.sharding.Mesh, part: str | None
) -> Callable[[jax.Array], Params]:
    """Return the function that `init_params` compiles, once for all roles of one architecture."""
    draw = functools.partial(draw_params, model, head, part)
    layout = sharding.param_shardings(jax.eval_shape(draw, jax.random.key(0)), mesh)
    return jax.jit(draw, out_shardings=layout)


def draw_params(model: Model, head: str, part: str | None, key: jax.Array) -> Params:
    """Draw new parameters, or only their top-level `part`."""
    params = transformer.init(model, key, head)
    return params if part is None else {part: params[part]}


def load(
    model: Model, head: str, mesh: jax.sharding.Mesh, key: jax.Array, directory: Path | None
) -> Params:
    """Load a role's parameters onto the mesh; without a `directory`, draw them from `key`.

    A scalar role that starts from a language model gets a new head, drawn from `key`.
    """
    if directory is None:
        return init_params(model, head, mesh, key)
    params = read(model, head, mesh, directory)
    if head == "scalar" and "head" not in params:
        params |= init_params(model, head, mesh, key, "head")
    return params


def load_trained(model: Model, head: str, mesh: jax.sharding.Mesh, directory: Path) -> Params:
    """Load the parameters of a model that is used as it is.

    Raises UserError for a language model if a scalar head is wanted: its scores would be those of
    a head that nothing has trained.
    """
    params = read(model, head, mesh, directory)
    if head == "scalar" and "head" not in params:
        raise no_scores(directory)
    return params


def no_scores(directory: Path) -> UserError:
    """Return the error for a language model in the place of a reward model."""
    return UserError(
        f"{directory}: a reward model is wanted, but this is a language model: it has no head "
        f"for scores ({hf.SCORE} in a Hugging Face checkpoint)"
    )


def read(model: Model, head: str, mesh: jax.sharding.Mesh, directory: Path) -> Params:
    """Read a role's parameters; without `head` if a scalar one is wanted and there is none."""
    locations.check_architecture(model, directory)
    if locations.is_run(directory):
        return read_run(model, head, mesh, directory)
    return read_hf(model, head, mesh, directory)


def read_run(model: Model, head: str, mesh: jax.sharding.Mesh, directory: Path) -> Params:
    """Read a role's parameters from a run's newest checkpoint.

    The result has no `head` if a scalar head is wanted and the run is a language model.
    """
    item = bases.item_of(directory, head)
    saved_head = saved_head_of(directory, head)
    settings = bases.adapters_of(directory)
    if settings is not None:
        return read_merged(model, head, mesh, directory, settings)
    params = restore_role(directory, item, abstract_params(model, saved_head, mesh))
    if saved_head != head:
        params.pop("head", None)  # A language model with tied embeddings has no head.
    return params


def saved_head_of(run: Path, head: str) -> str:
    """Return the head that a run has saved of the role that becomes one with `head`.

    A PEFT adapter has its own.
    """
    if locations.adapted_model(run) is not None:
        return hf.head_of(run)
    return "lm" if locations.read_config(run)["stage"] in LANGUAGE_MODELS else head


def read_merged(
    model: Model, head: str, mesh: jax.sharding.Mesh, run: Path, settings: Lora
) -> Params:
    """Read a role of a run with adapters, and add them to their base."""
    base = bases.base_of(run, head)
    params = read(model, head, mesh, bases.directory_of(run, base.place))
    trained = read_adapters(model, head, mesh, run, settings)
    if "head" in trained:
        params.pop("head", None)
    return merge(params, lora.combine(lora.scales(settings, model.layers), trained), mesh)


def merge(base: Params, adapters: Params, mesh: jax.sharding.Mesh) -> Params:
    """Return a base, whose arrays are donated, with adapters and their scales added to it."""
    layout = sharding.param_shardings(jax.eval_shape(merge_combined, base, adapters), mesh)
    return jax.jit(merge_combined, out_shardings=layout, donate_argnums=0)(base, adapters)


def merge_combined(base: Params, adapters: Params) -> Params:
    """Return a base with adapters and their scales added to it."""
    return lora.merge(lora.combine(base, adapters))


def read_adapters(
    model: Model, head: str, mesh: jax.sharding.Mesh, run: Path, settings: Lora
) -> Params:
    """Read the adapters of a run or a PEFT directory, and the scalar head if there is one."""
    adapted = locations.adapted_model(run)
    if adapted is not None:
        adapter = peft_adapter.open_adapter(adapted.adapter, model)
        return peft_parameters.factor_tree(adapter, mesh)
    shapes = abstract_adapters(model, saved_head_of(run, head), mesh, settings)
    return restore_role(run, bases.item_of(run, head), shapes)


def draw_adapters(model: Model, head: str, key: jax.Array, settings: Lora) -> Params:
    """Draw what a role with adapters trains: new adapters, and a scalar head if it has one."""
    shapes = jax.eval_shape(lambda: transformer.init(model, key, head))
    adapters = lora.init(settings, shapes["layers"], key)
    if head == "scalar":
        adapters["head"] = transformer.init(model, key, head)["head"]
    return adapters


def abstract_adapters(model: Model, head: str, mesh: jax.sharding.Mesh, settings: Lora) -> Params:
    """Return the shapes, types and shardings of what a role with adapters trains."""
    shapes = jax.eval_shape(lambda: draw_adapters(model, head, jax.random.key(0), settings))
    return sharding.abstract(shapes, mesh)


def read_hf(model: Model, head: str, mesh: jax.sharding.Mesh, directory: Path) -> Params:
    """Read the parameters of a Hugging Face checkpoint onto the mesh, with its adapter merged.

    The result has no `head` if a scalar head is wanted and the checkpoint has none. A process
    reads only the parts of the files that its own devices hold, one parameter at a time.
    """
    views = open_views(directory, head)
    wanted = abstract_params(model, head, mesh)
    if "head" in wanted and "head/kernel" not in views:
        del wanted["head"]

    def read_one(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return place_view(views[sharding.path_name(path)], shape)

    params = jax.tree_util.tree_map_with_path(read_one, wanted)
    adapted = locations.adapted_model(directory)
    if adapted is None:
        return params
    adapter = peft_adapter.open_adapter(adapted.adapter, model)
    factors = peft_parameters.factor_tree(adapter, mesh)
    if head == "scalar" and "head" in factors:
        params.pop("head", None)
    return merge(params, lora.combine(peft_parameters.scale_tree(adapter, mesh), factors), mesh)


def open_views(
    directory: Path, head: str, refuse: Refuse = refuse, *, reads: bool = True
) -> dict[str, Any]:
    """Return the parameters of a Hugging Face checkpoint as views of its files, by path.

    With an adapter they are those of its base; the files of both are checked. `hf.open_hf` has
    the arguments.
    """
    if not workdirs.is_local(directory):
        raise UserError(
            f"{directory}: a Hugging Face checkpoint must be in a local directory, or be named "
            "hf://ORG/NAME"
        )
    base = locations.base_directory(directory)
    model, views = hf.open_hf(base, head, refuse, reads=reads)
    adapted = locations.adapted_model(directory)
    if adapted is not None:
        adapter = peft_adapter.open_adapter(adapted.adapter, model)
        if head == "lm" and adapter.score is not None:
            refuse(
                f"{directory}: a language model is wanted, but the adapter is one of a sequence "
                f"classifier: there is {peft_adapter.SCORE}"
            )
    return views


def place_view(view: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Make a global array of `shape` from a view of checkpoint files (see `hf.open_hf`)."""
    parts: dict[str, np.ndarray] = {}  # Devices that hold the same part share one read.

    def read_part(index: tuple[slice, ...]) -> np.ndarray:
        name = str(index)
        if name not in parts:
            parts[name] = view.read(index)
        return parts[name]

    array = jax.make_array_from_callback(shape.shape, shape.sharding, read_part)
    # Wait, so that its parts leave the host's memory before the next parameter is read.
    return array.block_until_ready()


def freeze(model: Model, params: Params, dtype: str, memory: str) -> Params:
    """Prepare parameters that are only read.

    Args:
      model: their architecture.
      params: as they were loaded.
      dtype: the type that their matrices are rounded to, by the function that also rounds the
        policy's (`transformer.rounded`); "" leaves them as they are.
      memory: "device", or "host" for pinned memory of the host.
    """
    if dtype:
        params = transformer.rounded(dataclasses.replace(model, dtype=dtype), params)
    if memory == "host":
        return jax.tree.map(
            lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), params
        )
    return params


def abstract_frozen(model: Model, params: Params, dtype: str, memory: str) -> Params:
    """Return the shapes that `freeze` makes of shapes with shardings."""
    kept = dataclasses.replace(model, dtype=dtype or "float32")

    def freeze_one(x: jax.ShapeDtypeStruct, kept_type: jnp.dtype) -> jax.ShapeDtypeStruct:
        layout = x.sharding
        if memory == "host":
            layout = layout.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(x.shape, kept_type, sharding=layout)

    return jax.tree.map(freeze_one, params, transformer.computed_types(kept, params))


def copy_to_device(params: Params) -> Params:
    """Copy parameters that may be in the host's memory to the devices."""

    def copy_one(x: jax.Array) -> jax.Array:
        return jax.device_put(x, x.sharding.with_memory_kind("device"))

    return jax.tree.map(copy_one, params)


def on_device(params: Params) -> Params:
    """Fetch parameters from the host's memory if they are there; for use inside jit."""
    return jax.device_put(params, jax.memory.Space.Device)
