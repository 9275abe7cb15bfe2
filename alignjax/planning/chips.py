"""What one device can do: published figures, or figures measured on this machine."""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

GIB = 2**30
MATRIX_SIZE = 2048  # of the square product that `measure_chip` times
VECTOR_SIZE = 2**25  # of the float32 array that it reads and writes
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Chip:
    """The rates of one device, and the memory that the compiler gives a program on it."""

    memory: float  # GiB
    flops: float  # bfloat16 operations a second
    bandwidth: float  # bytes a second to and from its memory
    link: float  # bytes a second that it can send to its neighbours, over all links together
    # Bytes a second to other hosts, where they are not neighbours like all others: a slice of TPUs
    # has one network of links.
    network: float = math.inf


# By the beginning of JAX's `device_kind`. Sources: cloud.google.com/tpu/docs (system architecture)
# and NVIDIA's data sheets (dense rates; of a DGX, a network interface for each GPU).
CHIPS = {
    # JAX's device is one of the two cores of a v4 chip.
    "TPU v4": Chip(memory=15.25, flops=137.5e12, bandwidth=614e9, link=150e9),
    "TPU v5 lite": Chip(memory=15.75, flops=197e12, bandwidth=819e9, link=200e9),
    "TPU v5": Chip(memory=95.74, flops=459e12, bandwidth=2765e9, link=600e9),
    "TPU v6 lite": Chip(memory=31.25, flops=918e12, bandwidth=1640e9, link=448e9),
    "NVIDIA A100-SXM4-80GB": Chip(
        memory=79.25, flops=312e12, bandwidth=2039e9, link=300e9, network=25e9
    ),
    "NVIDIA H100": Chip(memory=79.1, flops=989e12, bandwidth=3350e9, link=450e9, network=50e9),
    "NVIDIA H200": Chip(memory=139.8, flops=989e12, bandwidth=4800e9, link=450e9, network=50e9),
}


def chip_of(devices: Sequence[jax.Device]) -> Chip:
    """Return the published figures of these devices, or measure them if their kind is unknown."""
    return published_chip(devices[0].device_kind) or measure_chip(devices)


def published_chip(kind: str) -> Chip | None:
    """Return the figures of the longest name in `CHIPS` that a device kind begins with."""
    names = [name for name in CHIPS if kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else None


def measure_chip(devices: Sequence[jax.Device]) -> Chip:
    """Measure a device of this machine with a square product and an elementwise sum.

    The devices of one CPU share its cores, so each gets its share of the rates.
    """
    device = devices[0]
    matrix = jax.device_put(jnp.ones((MATRIX_SIZE, MATRIX_SIZE)), device)
    vector = jax.device_put(jnp.ones(VECTOR_SIZE), device)
    sharing = len(devices) if device.platform == "cpu" else 1
    flops = 2 * MATRIX_SIZE**3 / seconds_per_call(jax.jit(square), matrix) / sharing
    bandwidth = 2 * vector.nbytes / seconds_per_call(jax.jit(increment), vector) / sharing
    return Chip(
        memory=device_memory(devices) / GIB, flops=flops, bandwidth=bandwidth, link=bandwidth
    )


def device_memory(devices: Sequence[jax.Device]) -> float:
    """Return the bytes of memory of a device; the devices of a CPU share the machine's."""
    stats = devices[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit") or machine / len(devices)


def square(x: jax.Array) -> jax.Array:
    return x @ x


def increment(x: jax.Array) -> jax.Array:
    return x + 1


def seconds_per_call(function: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    """Return the mean seconds of a call, after one call that compiles."""
    function(argument).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(argument).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.fmean(seconds)
