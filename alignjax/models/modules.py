"""The decoder's NNX modules: what each layer computes, and how its parameters start.

RMSNorm, RoPE, gated feed-forward and grouped queries; the config says where there are norms and
biases. The names of the attributes are the parameters' paths, such as `layers/attention/q/kernel`:
`sharding.TABLE` and `models.families` refer to them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from alignjax.config import Model
from alignjax.machine.sharding import constrain
from alignjax.models import lora
from alignjax.models.attention import KeyValues
from alignjax.models.experts import Experts, Routing
from alignjax.models.rope import Rotation, rotate

# attend(queries, keys, values) -> (the attention's result, the keys and values that are kept)
Attend = Callable[[Array, Array, Array], tuple[Array, KeyValues | None]]
# jax.nn.gelu is the approximation by a hyperbolic tangent.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


def rms_norm(
    x: Float[Array, "*rows size"], scale: Float[Array, " size"], eps: float, plus_one: bool = False
) -> Float[Array, "*rows size"]:
    """Divide x by its root mean square along the last axis; computed in float32.

    The result is multiplied by `scale`, or with `plus_one` by 1 + scale.
    """
    if plus_one:
        scale = 1.0 + scale
    y = x.astype(jnp.float32)
    mean_square = jnp.mean(y * y, axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


class Linear(nnx.Module):
    """A product over the last axes of its input, [... inputs] -> [... outputs].

    The kernel is normal with variance 1 / fan-in. With adapters, see `models.lora`, the product
    of those is added.
    """

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, rngs: nnx.Rngs
    ):
        self.input_axes = len(inputs)
        kernel = jax.random.normal(rngs.params(), (*inputs, *outputs))
        self.kernel = nnx.Param(kernel * math.prod(inputs) ** -0.5)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.has_adapters = False

    def add_adapters(self) -> None:
        """Give the product adapters, whose values and rank the parameters bring."""
        self.has_adapters = True
        self.lora_a = nnx.Param(jnp.zeros(1))
        self.lora_b = nnx.Param(jnp.zeros(1))
        self.lora_scale = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.kernel[...].astype(x.dtype)
        rows = x.shape[: x.ndim - self.input_axes]
        outputs = kernel.shape[self.input_axes :]
        # One product of two matrices: with batch and tokens as separate axes, XLA's CPU backend
        # takes twice as long for the gradient.
        flat = x.reshape(math.prod(rows), -1)
        y = flat @ kernel.reshape(-1, math.prod(outputs))
        if self.has_adapters:
            y += lora.apply(flat, self.lora_a[...], self.lora_b[...], self.lora_scale[...])
        y = y.reshape(*rows, *outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """An RMSNorm with a learnt scale."""

    def __init__(self, size: int, model: Model):
        self.eps = model.norm_eps
        self.plus_one = model.norm_plus_one
        self.scale = nnx.Param(jnp.zeros(size) if self.plus_one else jnp.ones(size))

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        return rms_norm(x, self.scale[...], self.eps, self.plus_one)


def norm_if(exists: bool, size: int, model: Model) -> Norm | None:
    """Return a norm of this size, or None."""
    return Norm(size, model) if exists else None


class Attention(nnx.Module):
    """Projections, RoPE and the output projection around an `attend` function."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        self.score_multiplier = model.attention_multiplier * model.head_size**0.5 or 1.0
        self.norms_width = model.qk_norm_over == "width"
        width = (model.d_model,)
        queries = (model.heads, model.head_size)
        keys = (model.kv_heads, model.head_size)
        self.q = Linear(width, queries, model.qkv_bias, rngs)
        self.k = Linear(width, keys, model.qkv_bias, rngs)
        self.v = Linear(width, keys, model.qkv_bias, rngs)
        self.out = Linear(queries, width, model.out_bias, rngs)
        query_size = math.prod(queries) if self.norms_width else model.head_size
        key_size = math.prod(keys) if self.norms_width else model.head_size
        self.q_norm = norm_if(model.qk_norm, query_size, model)
        self.k_norm = norm_if(model.qk_norm, key_size, model)

    def project(
        self, x: Float[Array, "batch tokens d_model"]
    ) -> tuple[Float[Array, "batch tokens heads head_size"], KeyValues]:
        """Return the queries, and the keys and values with the token axis before the heads."""
        return self.q(x), KeyValues(keys=self.k(x), values=self.v(x))

    def normalise(
        self, norm: Norm, x: Float[Array, "batch tokens heads head_size"]
    ) -> Float[Array, "batch tokens heads head_size"]:
        """Apply a norm to each head, or to all heads of a token as one."""
        if not self.norms_width:
            return norm(x)
        return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)

    def __call__(
        self, x: Float[Array, "batch tokens d_model"], rotation: Rotation | None, attend: Attend
    ) -> tuple[Float[Array, "batch tokens d_model"], KeyValues | None]:
        queries, (keys, values) = self.project(x)
        if self.q_norm is not None:
            queries = self.normalise(self.q_norm, queries)
            keys = self.normalise(self.k_norm, keys)
        # Every kernel divides scores by the square root of the head size. Queries take whatever
        # else multiplies them where they are in float32 anyway.
        queries = rotate(queries, rotation, self.score_multiplier)
        y, kept = attend(queries, rotate(keys, rotation), values)
        return self.out(y), kept


class JoinedAttention(Attention):
    """Attention whose queries, keys and values are one product, for decoding (see `joined`).

    The kernel [d_model kv_heads group + 2 head_size] has for each of the key heads the queries that
    share it, its key and its value: devices along the mesh axis tensor have whole groups.
    """

    def __init__(self, model: Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        del self.q, self.k, self.v
        outputs = (model.kv_heads, model.heads // model.kv_heads + 2, model.head_size)
        self.qkv = Linear((model.d_model,), outputs, model.qkv_bias, rngs)

    def project(
        self, x: Float[Array, "batch tokens d_model"]
    ) -> tuple[Float[Array, "batch tokens heads head_size"], KeyValues]:
        y = self.qkv(x)
        queries = y[..., :-2, :]
        heads = (math.prod(queries.shape[-3:-1]), queries.shape[-1])
        key_values = KeyValues(keys=y[..., -2, :], values=y[..., -1, :])
        return queries.reshape(*x.shape[:-1], *heads), key_values


class MLP(nnx.Module):
    """The feed-forward network, gated by SiLU or GELU."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[model.activation]
        self.gate = Linear((model.d_model,), (model.d_ff,), model.mlp_bias, rngs)
        self.up = Linear((model.d_model,), (model.d_ff,), model.mlp_bias, rngs)
        self.down = Linear((model.d_ff,), (model.d_model,), model.mlp_bias, rngs)

    def __call__(
        self, x: Float[Array, "batch tokens d_model"]
    ) -> Float[Array, "batch tokens d_model"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class JoinedMLP(MLP):
    """The feed-forward network with gate and up as one product, for decoding (see `joined`).

    The kernel [d_model d_ff 2] has each gate beside its up, so that devices along the mesh axis
    tensor have both.
    """

    def __init__(self, model: Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        del self.gate, self.up
        self.gate_up = Linear((model.d_model,), (model.d_ff, 2), model.mlp_bias, rngs)

    def __call__(
        self, x: Float[Array, "batch tokens d_model"]
    ) -> Float[Array, "batch tokens d_model"]:
        y = self.gate_up(x)
        return self.down(self.activation(y[..., 0]) * y[..., 1])


class LayerOutput(NamedTuple):
    """What a layer returns."""

    hidden: Float[Array, "batch tokens d_model"]
    key_values: KeyValues | None  # what `attend` keeps
    routing: Routing | None  # if the layer has experts


class Layer(nnx.Module):
    """One layer: attention and feed-forward, each with a norm and added to its input.

    The feed-forward network is `mlp`, or a mixture of `experts`.

    `norm1` and `norm2` come before the two, `post_norm1` and `post_norm2` after them.
    """

    attention_type = Attention
    mlp_type = MLP

    def __init__(self, model: Model, rngs: nnx.Rngs):
        before = model.norms in ("before", "both")
        after = model.norms in ("after", "both")
        self.norm1 = norm_if(before, model.d_model, model)
        self.norm2 = norm_if(before, model.d_model, model)
        self.attention = self.attention_type(model, rngs)
        self.mlp = None if model.experts else self.mlp_type(model, rngs)
        activation = ACTIVATIONS[model.activation]
        self.experts = Experts(model, activation, rngs) if model.experts else None
        self.post_norm1 = norm_if(after, model.d_model, model)
        self.post_norm2 = norm_if(after, model.d_model, model)
        self.residual_multiplier = model.residual_multiplier

    def __call__(
        self,
        x: Float[Array, "batch tokens d_model"],
        rotation: Rotation | None,
        attend: Attend,
        real: Bool[Array, "batch tokens"] | None = None,
    ) -> LayerOutput:
        """Return x after the layer, what `attend` keeps, and how tokens were routed.

        Tokens that are not `real` are given to no expert.
        """
        y, kept = self.attention(normed(self.norm1, x), rotation, attend)
        x = self.add(x, normed(self.post_norm1, y))
        y = normed(self.norm2, x)
        routing = None
        if self.experts is None:
            y = self.mlp(y)
        else:
            y, routing = self.experts(y, real)
        return LayerOutput(self.add(x, normed(self.post_norm2, y)), kept, routing)

    def add(
        self, x: Float[Array, "batch tokens d_model"], y: Float[Array, "batch tokens d_model"]
    ) -> Float[Array, "batch tokens d_model"]:
        """Add the result of attention or feed-forward to their input."""
        if self.residual_multiplier != 1.0:
            y = y * self.residual_multiplier
        return constrain(x + y)


def normed(
    norm: Norm | None, x: Float[Array, "batch tokens d_model"]
) -> Float[Array, "batch tokens d_model"]:
    """Return x behind a norm, or x itself where there is none."""
    return x if norm is None else norm(x)


class JoinedLayer(Layer):
    """A layer with fewer and larger products, for decoding on a GPU (see `joined`)."""

    attention_type = JoinedAttention
    mlp_type = JoinedMLP


def joined(model: Model, layer: dict) -> dict:
    """Return a layer's parameters as a `JoinedLayer` takes them.

    A decode step multiplies few rows by each matrix: what it costs is the reading of the matrix
    and, on a GPU, the launch of the product. The result is the same up to rounding.
    """
    attention = layer["attention"]
    others = {name: part for name, part in attention.items() if name not in ("q", "k", "v")}
    qkv = {
        part: join_heads(model, *(attention[name][part] for name in "qkv"))
        for part in attention["q"]  # the kernel, and the bias if there is one
    }
    result = layer | {"attention": others | {"qkv": qkv}}
    if "mlp" in layer:
        mlp = layer["mlp"]
        gate_up = {
            part: jnp.stack([mlp["gate"][part], mlp["up"][part]], axis=-1) for part in mlp["gate"]
        }
        result["mlp"] = {"gate_up": gate_up, "down": mlp["down"]}
    return result


def join_heads(
    model: Model,
    queries: Float[Array, "*inputs heads head_size"],
    keys: Float[Array, "*inputs kv_heads head_size"],
    values: Float[Array, "*inputs kv_heads head_size"],
) -> Float[Array, "*inputs kv_heads group_and_two head_size"]:
    """Put the kernels, or biases, of each key head behind those of its queries."""
    inputs = queries.shape[:-2]
    grouped = queries.reshape(*inputs, model.kv_heads, -1, model.head_size)
    return jnp.concatenate([grouped, keys[..., None, :], values[..., None, :]], axis=-2)


class Head(nnx.Module):
    """The output kernel of a role.

    "lm" has a kernel [d_model vocab] over the vocabulary. "scalar" has a kernel [d_model 1] with
    standard deviation 1 / (d_model + 1), and a bias [1] that holds a reward model's shift.
    """

    def __init__(self, model: Model, head: str, rngs: nnx.Rngs):
        scalar = head == "scalar"
        deviation = 1 / (model.d_model + 1) if scalar else model.d_model**-0.5
        shape = (model.d_model, 1 if scalar else model.vocab_size)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * deviation)
        self.bias = nnx.Param(jnp.zeros(1)) if scalar else None


class Embed(nnx.Module):
    """The embedding [vocab d_model] of tokens."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        # A tied embedding is also the output kernel, whose scale follows its fan-in.
        deviation = model.d_model**-0.5 if model.tied else 1.0
        shape = (model.vocab_size, model.d_model)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape) * deviation)


class Transformer(nnx.Module):
    """All parameters of a role, with the layers stacked along a first axis.

    Each layer has its own key, so its values do not depend on devices or layout.
    """

    def __init__(self, model: Model, head: str, rngs: nnx.Rngs):
        self.embed = Embed(model, rngs)
        keys = jax.random.split(rngs.params(), model.layers)
        self.layers = nnx.vmap(lambda key: Layer(model, nnx.Rngs(params=key)))(keys)
        self.norm = Norm(model.d_model, model)
        self.head = None if head == "lm" and model.tied else Head(model, head, rngs)
