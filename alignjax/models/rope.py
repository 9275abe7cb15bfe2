"""Rotary position embeddings (RoPE), with the frequency scalings of released models."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignjax.config import Model, check_extendable


class Rotation(NamedTuple):
    """The cosine and sine of each token's angles, float32, the same for all heads."""

    cos: Float[Array, "batch tokens 1 half_rotary_size"]
    sin: Float[Array, "batch tokens 1 half_rotary_size"]


def rope(
    model: Model,
    positions: Int[Array, "batch tokens"],
    lengths: Int[Array, "batch tokens"] | None = None,
) -> Rotation:
    """Return the rotation of each position, with frequencies scaled as the config says.

    `lengths` are those of the tokens' sequences, see `rotations_of`.
    """
    frequencies = scaled_frequencies(model, lengths)
    magnitude = model.rope_magnitude or magnitude_of(model)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude)


def scaled_frequencies(
    model: Model, lengths: Int[Array, "batch tokens"] | None
) -> Float[Array, "*tokens half_rotary_size"]:
    """Return the frequencies of all tokens, or [batch tokens 1 half_rotary_size] of each."""
    size = model.rotary_size
    exponents = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    if model.rope_scaling == "longrope":
        return longrope_frequencies(model, exponents, lengths)
    if model.rope_scaling == "dynamic" and lengths is not None:
        return dynamic_frequencies(model, exponents, lengths)
    frequencies = 1.0 / model.rope_theta**exponents
    if model.rope_scaling == "linear":
        return frequencies / model.rope_factor
    if model.rope_scaling == "llama3":
        return llama3_frequencies(model, frequencies)
    if model.rope_scaling == "yarn":
        return yarn_frequencies(model, frequencies)
    return frequencies


def magnitude_of(model: Model) -> float:
    """Return the factor on cosine and sine of the scaling's own formula."""
    if model.rope_scaling == "yarn":
        return yarn_magnitude(model)
    if model.rope_scaling == "longrope":
        return longrope_magnitude(model)
    return 1.0


class Rotations(NamedTuple):
    """The rotations of a model's layers; `window` is None if all layers rotate alike."""

    full: Rotation
    window: Rotation | None


def rotations_of(
    model: Model,
    positions: Int[Array, "batch tokens"],
    segments: Int[Array, "batch tokens"] | None,
) -> Rotations:
    """Return the rotations of each position, of layers without and with a window.

    `segments` tell the sequences of a row apart. They are None if tokens are added to a sequence or
    shared between several, which is a UserError for a model whose RoPE depends on its length.
    """
    lengths = None
    if segments is None:
        check_extendable(model)
    elif model.rope_varies:
        lengths = sequence_lengths(positions, segments)
    window = None
    if model.rope_window_theta:
        theta = model.rope_window_theta
        unscaled = dataclasses.replace(model, rope_theta=theta, rope_scaling="", rope_magnitude=0.0)
        window = rope(unscaled, positions)
    return Rotations(rope(model, positions, lengths), window)


def sequence_lengths(
    positions: Int[Array, "batch tokens"], segments: Int[Array, "batch tokens"]
) -> Int[Array, "batch tokens"]:
    """Return how many tokens the sequence of each token has; a segment's tokens are neighbours."""
    count = segments.shape[1]
    is_last = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    places = jnp.where(is_last, jnp.arange(count), count)
    last_places = jax.lax.cummin(places, axis=1, reverse=True)
    return jnp.take_along_axis(positions, last_places, axis=1) + 1


def longrope_frequencies(
    model: Model,
    exponents: Float[Array, " half_rotary_size"],
    lengths: Int[Array, "batch tokens"] | None,
) -> Float[Array, "*tokens half_rotary_size"]:
    """Divide by the short factors, and in sequences over the original length by the long ones."""
    wavelengths = model.rope_theta**exponents
    short = 1.0 / (numbers_of(model.rope_short_factors) * wavelengths)
    if lengths is None:
        return short
    long = 1.0 / (numbers_of(model.rope_long_factors) * wavelengths)
    is_long = lengths > model.rope_original_length
    return jnp.where(is_long[..., None, None], long, short)


def numbers_of(text: str) -> Float[Array, " numbers"]:
    """Return the numbers of a list with commas."""
    return jnp.asarray([float(word) for word in text.split(",")], jnp.float32)


def longrope_magnitude(model: Model) -> float:
    """Return the factor by which longrope (Ding et al. 2024) multiplies cosine and sine."""
    if model.rope_factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(model.rope_factor) / math.log(model.rope_original_length))


def dynamic_frequencies(
    model: Model,
    exponents: Float[Array, " half_rotary_size"],
    lengths: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens 1 half_rotary_size"]:
    """Enlarge the base with the length of the sequence, once it is over the original length."""
    original = model.rope_original_length
    size = model.rotary_size
    ratio = jnp.maximum(lengths, original).astype(jnp.float32) / original
    stretch = model.rope_factor * ratio - (model.rope_factor - 1)
    theta = model.rope_theta * stretch ** (size / (size - 2))
    return 1.0 / theta[..., None, None] ** exponents


def llama3_frequencies(
    model: Model, frequencies: Float[Array, " half_rotary_size"]
) -> Float[Array, " half_rotary_size"]:
    """Stretch long waves by the factor, keep short ones, and blend in between (Llama 3.1)."""
    turns = float(model.rope_original_length) * frequencies / (2 * math.pi)
    blend = (turns - model.rope_low_factor) / (model.rope_high_factor - model.rope_low_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return blend * frequencies + (1 - blend) * frequencies / model.rope_factor


def yarn_frequencies(
    model: Model, frequencies: Float[Array, " half_rotary_size"]
) -> Float[Array, " half_rotary_size"]:
    """Ramp over the dimensions from kept to stretched frequencies (YaRN, Peng et al. 2023)."""
    size = model.rotary_size
    low = max(math.floor(yarn_dimension(model, model.rope_high_factor)), 0)
    high = min(math.ceil(yarn_dimension(model, model.rope_low_factor)), size - 1)
    width = high - low or 0.001
    ramp = jnp.clip((jnp.arange(size // 2) - low) / width, 0.0, 1.0)
    return frequencies * (1 - ramp) + frequencies / model.rope_factor * ramp


def yarn_dimension(model: Model, turns: float) -> float:
    """Return the dimension whose wave turns this often within the original length."""
    waves = math.log(model.rope_original_length / (turns * 2 * math.pi))
    return model.rotary_size * waves / (2 * math.log(model.rope_theta))


def yarn_magnitude(model: Model) -> float:
    """Return YaRN's factor on cosine and sine, whose square multiplies the attention scores."""
    return 0.1 * math.log(model.rope_factor) + 1.0 if model.rope_factor > 1 else 1.0


def rotate(
    x: Float[Array, "batch tokens heads head_size"],
    rotation: Rotation | None,
    multiplier: float = 1.0,
) -> Float[Array, "batch tokens heads head_size"]:
    """Rotate each head's pairs of numbers; a pair has one number in each half of those rotated.

    What follows them in a head is left as it is, and None rotates nothing. The result is multiplied
    before it is rounded to the type of x.
    """
    if multiplier != 1.0:
        scaled = x.astype(jnp.float32) * multiplier
        return rotate(scaled, rotation).astype(x.dtype)
    if rotation is None:
        return x
    half = rotation.cos.shape[-1]
    numbers = x.astype(jnp.float32)
    first = numbers[..., :half]
    second = numbers[..., half : 2 * half]
    rotated = [
        first * rotation.cos - second * rotation.sin,
        second * rotation.cos + first * rotation.sin,
        numbers[..., 2 * half :],
    ]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
