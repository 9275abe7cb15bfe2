"""The machines that a plan can be made for, by the names that `--topology` takes.

`PLATFORMS` is the one table: to add a kind of machine, add its name, its slices and a function
that returns devices which the compiler can compile for.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.experimental import topologies as jax_topologies

from alignjax.config import UserError, reason_of
from alignjax.planning import gpus
from alignjax.planning.gpus import Gpu


@dataclass(frozen=True)
class Platform:
    """A kind of machine that does not have to be here."""

    name: str
    slices: tuple[str, ...]  # the sizes that a search tries, the smallest first
    devices: Callable[[str], list[jax.Device]]  # slice -> the devices to compile for


def tpu_devices(name: str, size: str) -> list[jax.Device]:
    """Return the devices of a TPU slice, from the TPU compiler, which needs no TPU."""
    topology = f"{name}:{size}"
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology}: the TPU compiler is missing; pip install 'alignjax[plan]'"
        )
    # Keep the compiler from looking for a TPU around it, and JAX from taking it for a backend.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    # Any type will do: without one the compiler says that there is no TPU.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    jax.config.update("jax_platforms", "cpu")
    try:
        description = jax_topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # whatever the compiler raises at a shape that it doesn't know
        reason = reason_of(error, 200)
        raise UserError(
            f"--topology {topology}: the TPU compiler knows no such slice ({reason})"
        ) from error
    return list(description.devices)


def tpu(name: str, slices: tuple[str, ...]) -> Platform:
    return Platform(name, slices, functools.partial(tpu_devices, name))


def gpu(name: str, kind: Gpu) -> Platform:
    return Platform(name, GPU_SLICES, functools.partial(gpus.gpu_devices, kind, name))


FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
GPU_SLICES = ("1", "2", "4", "8", "2x8", "4x8", "8x8")
PLATFORMS = {
    platform.name: platform
    for platform in (
        tpu("v5e", FLAT),
        tpu("v6e", FLAT),
        tpu("v4", CUBIC),
        tpu("v5", CUBIC),  # v5p
        gpu("h100", gpus.H100),
        gpu("h200", gpus.H200),
        gpu("a100", gpus.A100),
    )
}


def devices_of(topology: str) -> list[jax.Device]:
    """Return the devices of "PLATFORM:SLICE", or of this machine if `topology` is empty.

    Raises `UserError` for a topology that does not exist, or whose compiler is missing.
    """
    if not topology:
        return jax.devices()
    name = topology.partition(":")[0]
    size = topology.partition(":")[2]
    if name not in PLATFORMS or not size:
        raise UserError(
            f"--topology {topology}: must be {', '.join(PLATFORMS)}, a colon and a slice, such as "
            "v5e:4x4, v5:2x2x2, h100:8 or h100:2x8; with --search, a name alone tries its slices"
        )
    return PLATFORMS[name].devices(size)


def slices_of(topology: str) -> list[str]:
    """Return the topologies that a search tries: all slices of a bare name, or the one given."""
    if topology not in PLATFORMS:
        return [topology]
    return [f"{topology}:{size}" for size in PLATFORMS[topology].slices]
