"""How the layers of a model differ, whether they are written out one by one or scanned."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from alignjax.config import Model
from alignjax.models.rope import Rotation, Rotations


class LayerKind(NamedTuple):
    """What sets a layer apart.

    A field is True or False. Where layers are scanned it is an array if layers differ in it; None
    stands for a field in which they don't.
    """

    windowed: bool | Bool[Array, ""] | None  # whether it sees the last `model.window` tokens only
    rotated: bool | Bool[Array, ""] | None  # whether queries and keys have rotary positions

    def or_constant(self, constant: "LayerKind") -> "LayerKind":
        """Return the kind with the fields of `constant` where it has None."""
        return LayerKind(
            *(theirs if own is None else own for own, theirs in zip(self, constant, strict=True))
        )

    def rotation(self, rotations: Rotations) -> Rotation | None:
        """Return the rotation of this layer, None for none."""
        rotation = rotations.full
        if rotations.window is not None:
            rotation = select(self.windowed, rotations.window, rotation)
        if isinstance(self.rotated, bool):
            return rotation if self.rotated else None
        cos = jnp.where(self.rotated, rotation.cos, 1.0)
        return Rotation(cos, jnp.where(self.rotated, rotation.sin, 0.0))


def select(condition: bool | Bool[Array, ""], yes: Any, no: Any) -> Any:
    """Return one of two trees of arrays, by a flag that may be an array."""
    if isinstance(condition, bool):
        return yes if condition else no
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)


FULL = LayerKind(windowed=False, rotated=True)


def of(model: Model) -> list[LayerKind]:
    """Return the kind of each layer, as `model.layer_types` names them."""
    return [
        LayerKind(windowed=name.startswith("window"), rotated=not name.endswith("_nope"))
        for name in names(model)
    ]


def names(model: Model) -> list[str]:
    """Return the name of each layer's kind."""
    pattern = model.layer_types.split(",")
    return [pattern[layer % len(pattern)] for layer in range(model.layers)]


def pattern_of(names: list[str]) -> str:
    """Return the shortest `model.layer_types` that gives the layers these kinds."""
    for length in range(1, len(names) + 1):
        pattern = names[:length]
        if all(name == pattern[layer % length] for layer, name in enumerate(names)):
            return ",".join(pattern)
    return "full"


def varying(kinds: list[LayerKind]) -> LayerKind:
    """Return arrays [layers] to scan, and None for what all layers have in common."""
    columns = zip(*kinds, strict=True)
    return LayerKind(*(np.array(column) if len(set(column)) > 1 else None for column in columns))
