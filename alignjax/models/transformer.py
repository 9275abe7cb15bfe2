"""The decoder of all four roles, as pure functions of a plain dict of parameters.

The NNX modules of `models.modules` say what a layer computes; only `init` and `run_layer` here
build them. A role's `head` is "lm" (logits over the vocabulary) or "scalar" (a number at each
position: the value, and at the end token the reward).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from alignjax.config import Model
from alignjax.machine.sharding import constrain
from alignjax.models import experts, layer_kinds, lora
from alignjax.models.attention import (
    KeyValues,
    SharedKeys,
    Window,
    platform,
    self_attention,
    soft_cap,
)
from alignjax.models.modules import (
    Attend,
    JoinedLayer,
    Layer,
    LayerOutput,
    Transformer,
    joined,
    rms_norm,
)
from alignjax.models.rope import Rotation, rotations_of

UNROLLED = 16  # most layers that are written out one by one on a CPU
REMAT = {
    "everything": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
Params = dict[str, Any]  # nested dicts of arrays
# attend(cache, layer, queries [batch heads head_size], keys [batch kv_heads head_size], values,
# the layer's kind) -> (what the queries see [batch heads head_size], what is kept of this token or
# of its rows)
AttendCache = Callable[..., tuple[Array, KeyValues]]


class Activations(NamedTuple):
    """What a pass of the decoder returns.

    `key_values` are those of the tokens read. From `apply` they are [layers batch kv_heads tokens
    head_size], or None unless they are to be kept. From `decode` they are what `attend` keeps, and
    where the layers are a list they are a list with one entry a layer.

    `load_balancing` is the mean of `experts.load_balancing` over the layers, or None unless `apply`
    reads whole sequences with a `model.load_balancing_coef`.
    """

    hidden: Float[Array, "batch *tokens d_model"]  # after the last norm
    key_values: KeyValues | list[KeyValues] | None
    load_balancing: Float[Array, "batch tokens"] | None = None


class PrefixCache(NamedTuple):
    """The keys and values of tokens that come before every row; `real` is False on their pads."""

    key_values: KeyValues  # each [layers 1 kv_heads prefix_tokens head_size]
    real: Bool[Array, " prefix_tokens"]


def init(model: Model, key: Array, head: str) -> Params:
    """Draw float32 parameters; a key gives the same values on any devices."""
    module = Transformer(model, head, nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@functools.lru_cache
def layer_graph(
    layer_type: type[Layer], values: tuple, adapted: tuple[tuple[str, str], ...]
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the static half of a layer and the shapes of its state, for a config's values.

    The values are the key of the cache, because a Model is mutable. `adapted` are the products
    with adapters.
    """

    def make() -> Layer:
        layer = layer_type(Model(*values), nnx.Rngs(params=0))
        for part, name in adapted:
            getattr(getattr(layer, part), name).add_adapters()
        return layer

    return nnx.split(nnx.eval_shape(make))


def run_layer(
    model: Model,
    params: Params,
    x: Float[Array, "batch tokens d_model"],
    rotation: Rotation | None,
    attend: Attend,
    real: Bool[Array, "batch tokens"] | None = None,
) -> LayerOutput:
    """Run one layer with its own parameters, which have no layer axis and may be joined."""
    layer_type = JoinedLayer if "qkv" in params["attention"] else Layer
    adapted = lora.adapted_products(params)
    graph, state = layer_graph(layer_type, dataclasses.astuple(model), adapted)
    state = jax.tree.map(lambda shape: shape, state)  # a copy: the cached state must not change
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(x, rotation, attend, real)


def embed(
    model: Model, params: Params, tokens: Int[Array, "batch tokens"]
) -> Float[Array, "batch tokens d_model"]:
    """Return the tokens' embeddings in the type of the computation."""
    embedding = jnp.asarray(params["embed"]["embedding"])
    x = embedding[tokens].astype(model.dtype)
    if model.embedding_multiplier != 1.0:
        x = x * model.embedding_multiplier
    return constrain(x)


def final_norm(
    model: Model, params: Params, x: Float[Array, "*rows d_model"]
) -> Float[Array, "*rows d_model"]:
    """Return hidden states behind the norm that follows the last layer."""
    return rms_norm(x, params["norm"]["scale"], model.norm_eps, model.norm_plus_one)


def apply(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch tokens"],
    positions: Int[Array, "batch tokens"],
    segments: Int[Array, "batch tokens *second"],
    keep: bool = False,
    prefix: PrefixCache | None = None,
) -> Activations:
    """Read whole rows of tokens; with `keep`, return the keys and values of all layers too.

    A token sees the tokens of its segment up to itself; segment 0 is padding. Segments may have
    another axis of size 2, [batch tokens 2]: a token then also sees the second segment it names.
    Every token sees the real tokens of `prefix`. Positions matter to RoPE and to windows.
    """
    is_whole = not keep and prefix is None and segments.ndim == 2
    rotations = rotations_of(model, positions, segments if is_whole else None)
    kinds = layer_kinds.of(model)
    real = (segments if segments.ndim == 2 else segments[..., 0]) > 0
    same = None
    if model.experts and model.load_balancing_coef and is_whole:
        same = segments[:, :, None] == segments[:, None, :]

    def step(kind, x, layer):
        layer_params, layer_prefix = layer

        def attend(queries, keys, values):
            kept = KeyValues(keys.swapaxes(1, 2), values.swapaxes(1, 2)) if keep else None
            shared = None
            if prefix is not None:
                shared = shared_keys(layer_prefix, prefix.real)
            window = None
            if kind.windowed is not False:
                window = Window(model.window, positions, kind.windowed)
            y = self_attention(
                queries,
                keys,
                values,
                segments,
                model.attention,
                shared,
                window,
                model.attention_cap,
            )
            return y, kept

        output = run_layer(model, layer_params, x, kind.rotation(rotations), attend, real)
        balance = None if same is None else experts.load_balancing(output.routing, same)
        return output.hidden, (output.key_values, balance)

    def scan_step(x, layer):
        varying, layer = layer
        return step(varying.or_constant(kinds[0]), x, layer)

    layers = params["layers"]
    prefixes = None if prefix is None else prefix.key_values
    x = embed(model, params, tokens)
    if isinstance(layers, list):
        kept_by_layer = []
        for number, layer in enumerate(layers):
            layer_step = with_remat(model, functools.partial(step, kinds[number]))
            x, kept = layer_step(x, (layer, layer_of(prefixes, number)))
            kept_by_layer.append(kept)
        by_layer = jax.tree.map(stack, *kept_by_layer)
    else:
        unroll = model.layers if unrolled(model) else 1
        to_scan = (layer_kinds.varying(kinds), (layers, prefixes))
        x, by_layer = jax.lax.scan(with_remat(model, scan_step), x, to_scan, unroll=unroll)
    key_values, balance = by_layer
    return Activations(
        final_norm(model, params, x), key_values, None if balance is None else balance.mean(axis=0)
    )


def with_remat(model: Model, step: Callable) -> Callable:
    """Return a layer's step whose backward pass recomputes what the config says."""
    if model.remat == "nothing":
        return step
    return jax.checkpoint(step, policy=REMAT[model.remat])


def stack(*arrays: Array) -> Array:
    """Stack arrays along a new first axis."""
    return jnp.stack(arrays)


def shared_keys(key_values: KeyValues, real: Bool[Array, " prefix_tokens"]) -> SharedKeys:
    """Return one layer's part of a prefix, [1 kv_heads prefix_tokens head_size], for attention."""
    keys = key_values.keys[0].swapaxes(0, 1)
    values = key_values.values[0].swapaxes(0, 1)
    return SharedKeys(keys, values, real)


def unrolled(model: Model) -> bool:
    """Return whether layers are written out one by one rather than scanned.

    XLA's CPU backend copies a layer out of a stacked array before it multiplies by it, and copies
    what the gradient needs into one. Without those copies a gradient takes 0.4 to 0.9 of the time
    and a step of decoding half. Elsewhere a scan keeps the program small at any depth.
    """
    return platform() == "cpu" and model.layers <= UNROLLED


def joins_products() -> bool:
    """Return whether decoding joins the products of a layer, which are written out one by one.

    On a GPU a step of decoding is bound by its launches, unless the model is large: a scan slices
    every parameter out of its stack, and copies it.
    """
    return platform() == "gpu"


def for_decoding(model: Model, params: Params) -> Params | list[Params]:
    """Return the layers' parameters as `decode` takes them."""
    layers = params["layers"]
    if isinstance(layers, list):
        return layers
    if joins_products() and not lora.adapted_products(layers):
        return joined_layers(model, layers)
    return layers_of(model, layers) if unrolled(model) else layers


def joined_layers(model: Model, layers: Params) -> list[Params]:
    """Return the layers one by one, with their adapters added and their products joined."""
    return [joined(model, lora.merge_layer(layer)) for layer in layers_of(model, layers)]


def layers_of(model: Model, layers: Params) -> list[Params]:
    """Return stacked layers one by one."""
    return [layer_of(layers, layer) for layer in range(model.layers)]


def for_sampling(model: Model, params: Params) -> Params:
    """Return parameters as sampling reads them best: rounded, and laid out for decoding.

    Adapters are added to their kernels. The result serves `apply` and `decode` as the parameters
    themselves do.
    """
    if isinstance(params["layers"], list):
        return rounded(model, params)
    if not joins_products():
        return rounded(model, lora.merge(params))
    # Joined before they are rounded: XLA would round the whole stack to take one layer of it.
    return rounded(model, params | {"layers": joined_layers(model, params["layers"])})


def rounded(model: Model, params: Params) -> Params:
    """Cast matrices to the type that they are computed in; this changes no result.

    Decoding then reads half of the bytes for a token if the type has 16 bits, and a role that is
    only read takes half of the memory.
    """
    return jax.tree.map(lambda x, dtype: x.astype(dtype), params, computed_types(model, params))


def computed_types(model: Model, params: Params) -> dict[str, Any]:
    """Return for each parameter, or its shape, the type that it can be kept in without a loss.

    Matrices are cast to `model.dtype` wherever they are used. Norms and a scalar head, with a
    reward model's shift in its bias, are computed in float32.
    """
    has_scalar_head = "bias" in params.get("head", {})

    def type_of(path, parameter):
        is_matrix = path[-1].key in ("kernel", "embedding")
        is_in_scalar_head = has_scalar_head and path[0].key == "head"
        return jnp.dtype(model.dtype) if is_matrix and not is_in_scalar_head else parameter.dtype

    return jax.tree_util.tree_map_with_path(type_of, params)


def layer_of(stack: Any, layer: int | Int[Array, ""]) -> Any:
    """Return one layer of a tree of arrays that are stacked along their first axis."""
    return jax.tree.map(lambda x: x[layer], stack)


def decode(
    model: Model,
    params: Params,
    layers: Params | list[Params],
    tokens: Int[Array, " batch"],
    positions: Int[Array, " batch"],
    cache: list,
    attend: AttendCache,
) -> Activations:
    """Read one more token in each row.

    `layers` are the parameters as `for_decoding` returns them. `cache` is what `attend` reads.
    Where the layers are a list, `cache` is one too, attend gets its layer's entry, and the number
    of its layer is None; elsewhere attend gets the cache of all layers and that number.
    """
    rotations = rotations_of(model, positions[:, None], None)
    kinds = layer_kinds.of(model)

    def step(kind, x, layer_cache, layer, layer_params):
        def attend_one(queries, keys, values):
            y, kept = attend(layer_cache, layer, queries[:, 0], keys[:, 0], values[:, 0], kind)
            return y[:, None], kept

        output = run_layer(model, layer_params, x, kind.rotation(rotations), attend_one)
        return output.hidden, output.key_values

    def scan_step(x, numbered):
        varying, (layer, layer_params) = numbered
        return step(varying.or_constant(kinds[0]), x, cache, layer, layer_params)

    x = embed(model, params, tokens[:, None])
    if isinstance(layers, list):
        key_values = []
        for kind, layer_params, layer_cache in zip(kinds, layers, cache, strict=True):
            x, kept = step(kind, x, layer_cache, None, layer_params)
            key_values.append(kept)
    else:
        numbered = (layer_kinds.varying(kinds), (jnp.arange(model.layers), layers))
        x, key_values = jax.lax.scan(scan_step, x, numbered)
    return Activations(final_norm(model, params, x[:, 0]), key_values)


def output_kernel(model: Model, params: Params) -> Float[Array, "d_model vocab"]:
    """Return the head's kernel, or the embedding's transpose where they are tied."""
    return params["embed"]["embedding"].T if model.tied else params["head"]["kernel"]


def logits(
    model: Model, params: Params, hidden: Float[Array, "*rows d_model"]
) -> Float[Array, "*rows vocab"]:
    """Return logits over the vocabulary, summed in float32."""
    kernel = output_kernel(model, params).astype(hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    z = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
    if model.logits_divisor != 1.0:
        z = z / model.logits_divisor
    if model.logits_cap:
        z = soft_cap(z, model.logits_cap)
    return z.reshape(*hidden.shape[:-1], -1)


def scalar(params: Params, hidden: Float[Array, "*rows d_model"]) -> Float[Array, "*rows"]:
    """Apply the scalar head in float32."""
    head = params["head"]
    return (hidden.astype(jnp.float32) @ head["kernel"])[..., 0] + head["bias"][0]
