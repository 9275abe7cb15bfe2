"""Adapters of low rank (LoRA, Hu et al. 2021): x W becomes x W + alpha / rank (x A) B.

Adapters are a tree with the paths of the parameters: a product `layers/attention/q` has `lora_a`
[layers *inputs rank] and `lora_b` [layers rank *outputs]. The scale alpha / rank is an array of the
frozen base, `lora_scale` [layers], so that base and adapters together are all that a layer needs.

`trained` are the parameters that a role trains: adapters, and the head of a scalar role. A role
that trains all of its parameters has the base None.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignjax.config import LORA_TARGETS, Lora

Params = dict[str, Any]  # nested dicts of arrays, or of their shapes

# Axes of a kernel, behind the axis of layers, that its product sums over: out takes all heads.
INPUT_AXES = {"out": 2}


def targets_of(settings: Lora) -> list[str]:
    """Return the names of the products that have adapters, in the order of LORA_TARGETS."""
    wanted = {target.strip() for target in settings.targets.split(",")}
    return [name for name in LORA_TARGETS if name in wanted]


def init(settings: Lora, layers: Params, key: Array) -> Params:
    """Draw new adapters: `lora_a` uniformly within 1 / sqrt(fan-in), `lora_b` zero, in float32.

    They change nothing yet. `layers` are the parameters of the layers, or their shapes. A key gives
    the same values on any devices, and each product's whatever other products have adapters.
    """
    adapters: Params = {}
    for number, (name, part) in enumerate(LORA_TARGETS.items()):
        if name not in targets_of(settings):
            continue
        layer_count, *sizes = layers[part][name]["kernel"].shape
        inputs = sizes[: INPUT_AXES.get(name, 1)]
        outputs = sizes[len(inputs) :]
        bound = math.prod(inputs) ** -0.5
        shape = (layer_count, *inputs, settings.rank)
        lora_a = jax.random.uniform(
            jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound
        )
        lora_b = jnp.zeros((layer_count, settings.rank, *outputs))
        adapters.setdefault(part, {})[name] = {"lora_a": lora_a, "lora_b": lora_b}
    return {"layers": adapters}


def scales(settings: Lora, layer_count: int) -> Params:
    """Return the part of a base that holds the scales of the adapters."""
    scale = jnp.full(layer_count, settings.alpha / settings.rank, jnp.float32)
    parts: Params = {}
    for name in targets_of(settings):
        parts.setdefault(LORA_TARGETS[name], {})[name] = {"lora_scale": scale}
    return {"layers": parts}


def combine(base: Params | None, trained: Params) -> Params:
    """Return all parameters of a role: those that it trains, in the base.

    Nothing is computed: the result has the arrays of both. Of a path that is in both, such as the
    head of a language model beneath a scalar role, it has the one that is trained.
    """
    if base is None:
        return trained
    return {
        name: combined_entry(base.get(name), trained.get(name)) for name in base.keys() | trained
    }


def combined_entry(base: Any, trained: Any) -> Any:
    """Return an entry of `combine`, of which either may be None."""
    if isinstance(base, dict) and isinstance(trained, dict):
        return combine(base, trained)
    return base if trained is None else trained


def select(params: Params, like: Params) -> Params:
    """Return the entries of a tree that another one has too, such as what a role trains."""
    return {
        name: select(params[name], part) if isinstance(part, dict) else params[name]
        for name, part in like.items()
    }


def without_head(params: Params) -> Params:
    """Return parameters without their head: what scalar roles share of a base."""
    return {name: part for name, part in params.items() if name != "head"}


def count(params: Params) -> int:
    """Return the number of parameters; the scales of adapters are none."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(x.size for path, x in leaves if path[-1].key != "lora_scale")


def adapted_products(layer: Params) -> tuple[tuple[str, str], ...]:
    """Return the part and the name of each product of a layer that has adapters."""
    return tuple(
        (part, name)
        for name, part in LORA_TARGETS.items()
        if "lora_a" in layer.get(part, {}).get(name, {})
    )


def merge(params: Params) -> Params:
    """Add the adapters to the kernels of their products; the result has none.

    Sums are in float32 and are rounded to the type of the kernel. Layers that are stacked are
    merged one after the other, so that no array of sums is as large as the stack.
    """
    layers = params["layers"]
    merged = dict(layers)
    for part, name in adapted_products(layers):
        product = jax.lax.map(merge_product, layers[part][name])
        merged[part] = merged[part] | {name: product}
    return params | {"layers": merged}


def merge_layer(layer: Params) -> Params:
    """Add the adapters of one layer to its kernels; the parameters have no axis of layers."""
    merged = dict(layer)
    for part, name in adapted_products(layer):
        merged[part] = merged[part] | {name: merge_product(layer[part][name])}
    return merged


def merge_product(product: dict[str, Array]) -> dict[str, Array]:
    """Return the kernel of a product with its adapters added, and the bias if there is one."""
    kernel = product["kernel"]
    lora_a = product["lora_a"]
    rank = lora_a.shape[-1]
    # A TPU would otherwise round the factors to bfloat16, even for a kernel in float32.
    change = jnp.matmul(
        lora_a.reshape(-1, rank),
        product["lora_b"].reshape(rank, -1),
        precision=jax.lax.Precision.HIGHEST,
    )
    scaled = change.reshape(kernel.shape) * product["lora_scale"]
    summed = kernel.astype(jnp.float32) + scaled
    others = {name: x for name, x in product.items() if not name.startswith("lora_")}
    return others | {"kernel": summed.astype(kernel.dtype)}


def apply(
    x: Float[Array, "tokens inputs"],
    lora_a: Float[Array, "*input_axes rank"],
    lora_b: Float[Array, " rank *output_axes"],
    scale: Float[Array, ""],
) -> Float[Array, "tokens outputs"]:
    """Return scale (x A) B, computed in the type of x."""
    rank = lora_a.shape[-1]
    narrow = x @ lora_a.reshape(-1, rank).astype(x.dtype)
    return (narrow * scale.astype(x.dtype)) @ lora_b.reshape(rank, -1).astype(x.dtype)
