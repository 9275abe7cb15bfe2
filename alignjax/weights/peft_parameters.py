"""PEFT adapters as parameters: a tree like that of `models.lora`, on the mesh."""

from typing import Any

import jax
import numpy as np

from alignjax.config import LORA_TARGETS, Lora
from alignjax.machine import sharding
from alignjax.weights.hf import nest
from alignjax.weights.peft_adapter import ParameterAdapter, PeftAdapter

Params = dict[str, Any]  # nested dicts of arrays


def settings_of(adapter: PeftAdapter) -> Lora | None:
    """Return the settings of a run that would train these adapters; None if there are none.

    A run's adapters have one rank and one scale, in all layers.
    """
    ranks = set()
    scales = set()
    for parameter in adapter.parameters.values():
        for part in parameter.layers:
            if part is None:
                return None
            ranks.add(part.rank)
            scales.add(part.scale)
    if len(ranks) > 1 or len(scales) > 1:
        return None
    names = {path.split("/")[-2] for path in adapter.parameters}
    targets = ",".join(name for name in LORA_TARGETS if name in names)
    return Lora(rank=ranks.pop(), alpha=scales.pop() * parameter.rank, targets=targets)


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
