"""The keys and values that attention reads."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class KeyValues(NamedTuple):
    """Keys and values of the same tokens, each [... kv_heads tokens head_size]."""

    keys: Float[Array, "*stack kv_heads tokens head_size"]
    values: Float[Array, "*stack kv_heads tokens head_size"]


class SharedKeys(NamedTuple):
    """The keys and values of a prefix that all rows share; `real` is False on its pads."""

    keys: Float[Array, "prefix_tokens kv_heads head_size"]
    values: Float[Array, "prefix_tokens kv_heads head_size"]
    real: Bool[Array, " prefix_tokens"]


class Window(NamedTuple):
    """Queries see their own token and the `size` - 1 tokens before it in their sequence."""

    size: int
    positions: Int[Array, "batch tokens"]  # of tokens in their sequences
    # Whether it holds in this layer: True, or a flag of layers that are scanned.
    applies: bool | Bool[Array, ""]
