"""The keys and values that attention reads."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class KeyValues(NamedTuple):
    """Keys and values of the same tokens, each [... kv_heads tokens head_size]."""

    keys: Float[Array, "*stack kv_heads tokens head_size"]
    values: Float[Array, "*stack kv_heads tokens head_size"]


class SharedKeys(NamedTuple):
    """The keys and values of a prefix that all rows share; `real` is False on its pads."""

    keys: Float[Array, "prefix_tokens kv_heads head_size"]
    values: Float[Array, "prefix_tokens kv_heads head_size"]
    real: Bool[Array, " prefix_tokens"]
