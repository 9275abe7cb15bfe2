"""PEFT adapters as parameters: a tree like that of `models.lora`, on the mesh."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignjax.config import LORA_TARGETS, Lora, Model
from alignjax.machine import sharding
from alignjax.weights.hf import nest
from alignjax.weights.hf_layout import kernel_tensors, layout_of
from alignjax.weights.peft_adapter import ParameterAdapter, PeftAdapter
from alignjax.weights.peft_config import read_adapter_config

Params = dict[str, Any]  # nested dicts of arrays


def settings_of(directory: Path, model: Model) -> Lora | None:
    """Return the settings of a run that would train the adapters of a PEFT directory.

    None if there are none: a run's adapters have one rank and one scale, in all layers. Only the
    directory's adapter_config.json is read.
    """
    config = read_adapter_config(directory)
    layout = layout_of(model, "lm")
    modules = kernel_tensors(layout)
    adapted = [tensor for tensor in modules if config.targets(tensor.module)]
    paths = {path for tensor in adapted for path in tensor.paths}
    in_all_layers = [tensor for tensor in modules if paths.intersection(tensor.paths)]
    ranks = {config.rank(tensor.module) for tensor in adapted}
    scales = {config.scale(tensor.module) for tensor in adapted}
    if len(adapted) != len(in_all_layers) or len(ranks) != 1 or len(scales) != 1:
        return None
    names = {path.split("/")[-2] for path in paths}
    targets = ",".join(name for name in LORA_TARGETS if name in names)
    rank = ranks.pop()
    return Lora(rank=rank, alpha=scales.pop() * rank, targets=targets)


def factor_tree(adapter: PeftAdapter, mesh: jax.sharding.Mesh) -> Params:
    """Return the adapters as parameters on the mesh, and the scalar head if there is one."""
    flat = {}
    for path, parameter in adapter.parameters.items():
        factors = parameter.read()
        flat[path.replace("kernel", "lora_a")] = factors.lora_a
        flat[path.replace("kernel", "lora_b")] = factors.lora_b
    tree = nest(flat)
    head = adapter.read_head()
    if head is not None:
        tree["head"] = head
    return place(tree, mesh)


def scale_tree(adapter: PeftAdapter, mesh: jax.sharding.Mesh) -> Params:
    """Return the scales of the adapters, `lora_scale` [layers] of each product, on the mesh."""
    flat = {
        path.replace("kernel", "lora_scale"): layer_scales(parameter)
        for path, parameter in adapter.parameters.items()
    }
    return place(nest(flat), mesh)


def layer_scales(parameter: ParameterAdapter) -> np.ndarray:
    """Return the scale of a parameter's adapter in each layer; 0 where there is none."""
    return np.float32([0.0 if part is None else part.scale for part in parameter.layers])


def place(tree: Params, mesh: jax.sharding.Mesh) -> Params:
    """Put host arrays, which all processes have, on the mesh as parameters are laid out."""

    def place_one(x: np.ndarray, layout: jax.sharding.NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])

    return jax.tree.map(place_one, tree, sharding.param_shardings(tree, mesh))
