"""The decoder of all four roles: one Flax NNX module, split once into a plain dict of arrays, run by pure functions.

Pre-norm RMSNorm, RoPE, SwiGLU, grouped queries; biases on q, k, v and norms on q, k as the config says. `head` is "lm"
(logits over the vocabulary) or "scalar" (a number at each position: the value; at the end token: the reward).
Letters: b batch, t tokens, s keys, d model, n heads, k key-value heads, h head size, f feed-forward, l layers, v words.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from alignjax.config import Model
from alignjax.machine.sharding import constrain
from alignjax.models.attention import platform, self_attention

UNROLLED = 16  # layers at most that are written out one by one, on a CPU
REMAT = {
    "everything": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Linear(nnx.Module):
    """x[... inputs] -> [... outputs] over `axes` contracted dimensions; kernel normal with variance 1 / fan-in."""

    def __init__(self, inputs, outputs, bias, rngs):
        fan_in = math.prod(inputs)
        self.inputs = len(inputs)
        self.kernel = nnx.Param(
            jax.random.normal(rngs.params(), (*inputs, *outputs)) * fan_in**-0.5
        )
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x):
        kernel = self.kernel[...].astype(x.dtype)
        rows, outputs = x.shape[: x.ndim - self.inputs], kernel.shape[self.inputs :]
        # One product of two matrices: with b and t apart, XLA's CPU backend takes twice as long for the gradient.
        y = x.reshape(math.prod(rows), -1) @ kernel.reshape(-1, math.prod(outputs))
        y = y.reshape(*rows, *outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    def __init__(self, size, eps):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    def __init__(self, m: Model, rngs):
        self.q = Linear((m.d_model,), (m.heads, m.head_size), m.qkv_bias, rngs)
        self.k = Linear((m.d_model,), (m.kv_heads, m.head_size), m.qkv_bias, rngs)
        self.v = Linear((m.d_model,), (m.kv_heads, m.head_size), m.qkv_bias, rngs)
        self.out = Linear((m.heads, m.head_size), (m.d_model,), False, rngs)
        self.q_norm = Norm(m.head_size, m.norm_eps) if m.qk_norm else None
        self.k_norm = Norm(m.head_size, m.norm_eps) if m.qk_norm else None

    def __call__(self, x, rotation, attend):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        y, kept = attend(rotate(q, rotation), rotate(k, rotation), v)
        return self.out(y), kept


class MLP(nnx.Module):
    def __init__(self, m: Model, rngs):
        self.gate = Linear((m.d_model,), (m.d_ff,), False, rngs)
        self.up = Linear((m.d_model,), (m.d_ff,), False, rngs)
        self.down = Linear((m.d_ff,), (m.d_model,), False, rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    def __init__(self, m: Model, rngs):
        self.norm1, self.norm2 = Norm(m.d_model, m.norm_eps), Norm(m.d_model, m.norm_eps)
        self.attention, self.mlp = Attention(m, rngs), MLP(m, rngs)

    def __call__(self, x, rotation, attend):
        """x[b t d] after the layer, and what attend(q, k, v) -> (y[b t n h], kept) keeps."""
        y, kept = self.attention(self.norm1(x), rotation, attend)
        x = constrain(x + y)
        return constrain(x + self.mlp(self.norm2(x))), kept


class Head(nnx.Module):
    """Untied "lm": kernel [d v]. "scalar": kernel [d 1] of deviation 1 / (d + 1), bias [1] that holds the shift."""

    def __init__(self, m: Model, head, rngs):
        scalar = head == "scalar"
        deviation = 1 / (m.d_model + 1) if scalar else m.d_model**-0.5
        size = 1 if scalar else m.vocab_size
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (m.d_model, size)) * deviation)
        self.bias = nnx.Param(jnp.zeros(1)) if scalar else None


class Embed(nnx.Module):
    def __init__(self, m: Model, rngs):
        # A tied embedding is also the output kernel, and wants its fan-in.
        deviation = m.d_model**-0.5 if m.tied else 1.0
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), (m.vocab_size, m.d_model)) * deviation
        )


class Transformer(nnx.Module):
    """Layers are stacked, [l ...]: each gets its own key, so the values don't depend on devices or layout."""

    def __init__(self, m: Model, head, rngs):
        self.embed = Embed(m, rngs)
        keys = jax.random.split(rngs.params(), m.layers)
        self.layers = nnx.vmap(lambda key: Layer(m, nnx.Rngs(params=key)))(keys)
        self.norm = Norm(m.d_model, m.norm_eps)
        self.head = None if head == "lm" and m.tied else Head(m, head, rngs)


def init(model: Model, key, head: str) -> dict:
    """Fresh float32 parameters as nested dicts; `head` is "lm" or "scalar". The same for a key on any devices."""
    return nnx.to_pure_dict(nnx.state(Transformer(model, head, nnx.Rngs(params=key)), nnx.Param))


@functools.lru_cache
def layer_graph(values: tuple):
    """The static half of a layer, for a config's values (a Model can change, so it is no key itself)."""
    layer = nnx.eval_shape(lambda: Layer(Model(*values), nnx.Rngs(params=0)))
    return nnx.split(layer)


def run_layer(model: Model, params, x, rotation, attend):
    graph, state = layer_graph(dataclasses.astuple(model))
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(x, rotation, attend)


def embedded(model: Model, params, tokens):
    return constrain(jnp.asarray(params["embed"]["embedding"])[tokens].astype(model.dtype))


def apply(model: Model, params, tokens, positions, segments, keep=False, prefix=None):
    """hidden[b t d] after the last norm; with `keep`, also (keys, values) of all layers, each [l b k t h], else None.

    A token sees the tokens up to its own that hold its segment; segment 0 is padding. Positions only feed RoPE.
    segments[b t 2] name a second segment that a token sees.
    `prefix`, (what `keep` gives of one row [l 1 k s h], real[s] bool), is seen by all, and said before them.
    """
    rotation = rope(model, positions)
    before, real = (None, None) if prefix is None else prefix

    def step(x, layer):
        params, before = layer

        def attend(q, k, v):
            kept = (k.swapaxes(1, 2), v.swapaxes(1, 2)) if keep else None
            seen = None if before is None else (*(x[0].swapaxes(0, 1) for x in before), real)
            return self_attention(q, k, v, segments, model.attention, seen), kept

        return run_layer(model, params, x, rotation, attend)

    if model.remat != "nothing":
        step = jax.checkpoint(step, policy=REMAT[model.remat])
    unroll = model.layers if unrolled(model) else 1
    x, kept = jax.lax.scan(
        step, embedded(model, params, tokens), (params["layers"], before), unroll=unroll
    )
    return rms_norm(x, params["norm"]["scale"], model.norm_eps), kept


def unrolled(model: Model) -> bool:
    """Whether layers are written out one by one.

    XLA's CPU backend copies a layer out of a stacked array before it multiplies by it, and into one what a gradient
    needs later: without that, a gradient takes 0.4 to 0.9 of the time, a step of decoding half. Elsewhere a scan keeps
    the program small, whatever the depth.
    """
    return platform() == "cpu" and model.layers <= UNROLLED


def for_decoding(model: Model, params):
    """The layers' parameters as `decode` takes them."""
    layers = params["layers"]
    return [layer_of(layers, i) for i in range(model.layers)] if unrolled(model) else layers


def rounded(model: Model, params):
    """Parameters with matrices in the type that they are computed in: half of the bytes that sampling reads a token."""
    matrix = lambda path: path[-1].key in ("kernel", "embedding")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(model.dtype) if matrix(path) else x, params
    )


def layer_of(stack, i):
    """The i-th of arrays [l ...]."""
    return jax.tree.map(lambda x: x[i], stack)


def decode(model: Model, params, layers, tokens, positions, cache, attend):
    """hidden[b d] of one more token in each row, tokens[b], and its (keys, values) in all layers, each [l b k h], or in a
    list of the layers' own.

    `layers` are the parameters as `for_decoding` gives them, and `cache` is what attend(cache, layer, q[b n h],
    k[b k h], v[b k h]) -> y[b n h] reads: a list of the layers' own, or all layers' together, of which attend is to use
    the one whose number it is given. Nothing is written to it here: that would have XLA copy it, layer after layer.
    """
    rotation = rope(model, positions[:, None])

    def step(x, cache, number, layer):
        def one(q, k, v):
            q, k, v = q[:, 0], k[:, 0], v[:, 0]
            return attend(cache, number, q, k, v)[:, None], (k, v)

        return run_layer(model, layer, x, rotation, one)

    x = embedded(model, params, tokens[:, None])
    if isinstance(layers, list):
        new = []
        for layer, mine in zip(layers, cache, strict=True):
            x, kept = step(x, mine, None, layer)
            new.append(kept)
    else:
        x, new = jax.lax.scan(
            lambda x, layer: step(x, cache, *layer), x, (jnp.arange(model.layers), layers)
        )
    return rms_norm(x[:, 0], params["norm"]["scale"], model.norm_eps), new


def rms_norm(x, scale, eps):
    """x over its root mean square along the last axis, times scale; in float32, given back in x's type."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale).astype(
        x.dtype
    )


def output_kernel(model: Model, params):
    """[d v]: the head's kernel, or the embedding's transpose where they are tied."""
    return params["embed"]["embedding"].T if model.tied else params["head"]["kernel"]


def logits(model: Model, params, hidden):
    """[... v] float32 from hidden[... d]."""
    kernel = output_kernel(model, params).astype(hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    z = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
    return z.reshape(*hidden.shape[:-1], -1)


def scalar(params, hidden):
    """[...] float32 from hidden[... d]: the scalar head."""
    head = params["head"]
    return (hidden.astype(jnp.float32) @ head["kernel"])[..., 0] + head["bias"][0]


def rope(model: Model, positions):
    """(cos, sin), each [b t 1 h/2] float32; frequencies, scaled as the config says, in float32."""
    h = model.head_size
    exponent = jnp.arange(0, h, 2, dtype=jnp.float32) / h
    frequencies = 1.0 / model.rope_theta**exponent
    attention_factor = 1.0
    if model.rope_scaling == "linear":
        frequencies = frequencies / model.rope_factor
    elif model.rope_scaling == "llama3":
        # Long waves are stretched by the factor, short ones kept, those between blended (Llama 3.1).
        turns = model.rope_original_length * frequencies / (2 * math.pi)
        blend = (turns - model.rope_low_factor) / (model.rope_high_factor - model.rope_low_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        frequencies = blend * frequencies + (1 - blend) * frequencies / model.rope_factor
    elif model.rope_scaling == "yarn":
        frequencies, attention_factor = yarn(model, frequencies)
    angle = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angle) * attention_factor, jnp.sin(angle) * attention_factor


def yarn(model: Model, frequencies):
    """Peng et al. 2023: a ramp over dimensions between kept and stretched frequencies, and a factor on the logits."""
    h, base, length = model.head_size, model.rope_theta, model.rope_original_length
    dimension = lambda turns: h * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
    low = max(math.floor(dimension(model.rope_high_factor)), 0)
    high = min(math.ceil(dimension(model.rope_low_factor)), h - 1)
    ramp = jnp.clip((jnp.arange(h // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    scaled = frequencies * (1 - ramp) + frequencies / model.rope_factor * ramp
    return scaled, 0.1 * math.log(model.rope_factor) + 1.0 if model.rope_factor > 1 else 1.0


def rotate(x, rotation):
    """RoPE on x[b t n h]: the halves of a head are the pairs' two parts."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
