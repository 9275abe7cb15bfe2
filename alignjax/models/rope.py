"""Rotary position embeddings (RoPE), with the frequency scalings of released models."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignjax.config import Model


class Rotation(NamedTuple):
    """The cosine and sine of each token's angles, float32, the same for all heads."""

    cos: Float[Array, "batch tokens 1 half_head_size"]
    sin: Float[Array, "batch tokens 1 half_head_size"]


def rope(model: Model, positions: Int[Array, "batch tokens"]) -> Rotation:
    """Return the rotation of each position, with frequencies scaled as the config says."""
    exponents = jnp.arange(0, model.head_size, 2, dtype=jnp.float32) / model.head_size
    frequencies = 1.0 / model.rope_theta**exponents
    magnitude = 1.0
    if model.rope_scaling == "linear":
        frequencies = frequencies / model.rope_factor
    elif model.rope_scaling == "llama3":
        frequencies = llama3_frequencies(model, frequencies)
    elif model.rope_scaling == "yarn":
        frequencies = yarn_frequencies(model, frequencies)
        magnitude = yarn_magnitude(model)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude)


class Rotations(NamedTuple):
    """The rotations of a model's layers; `window` is None if all layers rotate alike."""

    full: Rotation
    window: Rotation | None


def rotations_of(model: Model, positions: Int[Array, "batch tokens"]) -> Rotations:
    """Return the rotations of each position, of layers without and with a window."""
    window = None
    if model.rope_window_theta:
        theta = model.rope_window_theta
        unscaled = dataclasses.replace(model, rope_theta=theta, rope_scaling="")
        window = rope(unscaled, positions)
    return Rotations(rope(model, positions), window)


def llama3_frequencies(
    model: Model, frequencies: Float[Array, " half_head_size"]
) -> Float[Array, " half_head_size"]:
    """Stretch long waves by the factor, keep short ones, and blend in between (Llama 3.1)."""
    turns = float(model.rope_original_length) * frequencies / (2 * math.pi)
    blend = (turns - model.rope_low_factor) / (model.rope_high_factor - model.rope_low_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return blend * frequencies + (1 - blend) * frequencies / model.rope_factor


def yarn_frequencies(
    model: Model, frequencies: Float[Array, " half_head_size"]
) -> Float[Array, " half_head_size"]:
    """Ramp over the dimensions from kept to stretched frequencies (YaRN, Peng et al. 2023)."""
    half = model.head_size // 2
    low = max(math.floor(yarn_dimension(model, model.rope_high_factor)), 0)
    high = min(math.ceil(yarn_dimension(model, model.rope_low_factor)), model.head_size - 1)
    width = high - low or 0.001
    ramp = jnp.clip((jnp.arange(half) - low) / width, 0.0, 1.0)
    return frequencies * (1 - ramp) + frequencies / model.rope_factor * ramp


def yarn_dimension(model: Model, turns: float) -> float:
    """Return the dimension whose wave turns this often within the original length."""
    waves = math.log(model.rope_original_length / (turns * 2 * math.pi))
    return model.head_size * waves / (2 * math.log(model.rope_theta))


def yarn_magnitude(model: Model) -> float:
    """Return YaRN's factor on cosine and sine, whose square multiplies the attention scores."""
    return 0.1 * math.log(model.rope_factor) + 1.0 if model.rope_factor > 1 else 1.0


def rotate(
    x: Float[Array, "batch tokens heads head_size"],
    rotation: Rotation | None,
    multiplier: float = 1.0,
) -> Float[Array, "batch tokens heads head_size"]:
    """Rotate each head's pairs of numbers; a pair has one number in each half of the head.

    None rotates nothing. The result is multiplied before it is rounded to the type of x.
    """
    if multiplier != 1.0:
        scaled = x.astype(jnp.float32) * multiplier
        return rotate(scaled, rotation).astype(x.dtype)
    if rotation is None:
        return x
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [
        first * rotation.cos - second * rotation.sin,
        second * rotation.cos + first * rotation.sin,
    ]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
