"""NVIDIA GPUs that are not here, as the CUDA compiler of JAX's plugin wants them described."""

import importlib.util
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies as jax_topologies

from alignjax.config import UserError, reason_of

# Of JAX's plugins for CUDA, whichever is installed.
PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
# Autotuning runs kernels on a GPU. Without it the compiler may choose other kernels for a product,
# but as many.
WITHOUT_A_GPU = "--xla_gpu_autotune_level=0"
# "8", or "2x8" for two hosts with eight GPUs each.
SLICE = re.compile(r"(?:(?P<hosts>[1-9]\d*)x)?(?P<gpus>[1-9]\d*)")
LARGEST_HOST = 8  # GPUs that are joined by NVLink
# What the compiler reads of a device. The figures are from NVIDIA's data sheets and from the table
# of technical specifications by compute capability in its CUDA programming guide.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {block_memory}
  shared_memory_per_core: {core_memory} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {cache}
  clock_rate_ghz: {clock} cuda_compute_capability {{ major: {capability} minor: 0 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }} device_description_str: "{kind}"
"""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU."""

    kind: str  # JAX's `device_kind`
    capability: int  # CUDA's compute capability, the major number
    cores: int  # streaming multiprocessors
    units: int  # of float32 arithmetic in each
    clock: float  # GHz
    core_memory: int  # bytes of shared memory of a multiprocessor
    block_memory: int  # bytes of it that one block may use
    cache: int  # bytes of the L2 cache
    memory: int  # bytes
    bandwidth: int  # bytes a second

    def description(self) -> str:
        """Return the text that describes a device to the compiler."""
        return DESCRIPTION.format(**vars(self))


HOPPER = {
    "capability": 9,
    "cores": 132,
    "units": 128,
    "clock": 1.98,
    "core_memory": 233472,
    "block_memory": 232448,
    "cache": 50 * 2**20,
}
H100 = Gpu(kind="NVIDIA H100 80GB HBM3", memory=84978434048, bandwidth=3_352_320_000_000, **HOPPER)
H200 = Gpu(kind="NVIDIA H200", memory=150_109_880_320, bandwidth=4_800_000_000_000, **HOPPER)
A100 = Gpu(
    kind="NVIDIA A100-SXM4-80GB",
    capability=8,
    cores=108,
    units=64,
    clock=1.41,
    core_memory=167936,
    block_memory=166912,
    cache=40 * 2**20,
    memory=85_094_825_984,
    bandwidth=2_039_000_000_000,
)


def gpu_devices(gpu: Gpu, name: str, size: str) -> list[jax.Device]:
    """Return the devices of "GPUS" or "HOSTSxGPUS" of a kind that need not be here.

    Raises:
      UserError: for a size that is none, and if the compiler is not installed.
    """
    topology = f"{name}:{size}"
    match = SLICE.fullmatch(size)
    if not match:
        raise UserError(
            f"--topology {topology}: expected a number of GPUs, such as {name}:8, or hosts and "
            f"GPUs of each, such as {name}:2x8"
        )
    hosts = int(match["hosts"] or 1)
    gpus = int(match["gpus"])
    if gpus > LARGEST_HOST:
        raise UserError(
            f"--topology {topology}: a host has at most {LARGEST_HOST} GPUs; write several hosts "
            f"as {name}:2x8"
        )
    if not any(map(is_installed, PLUGINS)):
        raise UserError(
            f"--topology {topology}: the CUDA compiler is missing; pip install 'alignjax[plan-gpu]'"
        )
    prepare_environment()
    shape = f"1x{hosts}x{gpus}"
    try:
        description = jax_topologies.get_topology_desc(
            topology_name=shape,
            platform="cuda",
            target_config=gpu.description(),
            topology=shape,
        )
    except Exception as error:  # whatever the plugin raises
        reason = reason_of(error, 200)
        raise UserError(f"--topology {topology}: the CUDA compiler refuses: {reason}") from error
    return list(description.devices)


def is_installed(module: str) -> bool:
    """Return whether a module of a package that may be missing can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def prepare_environment() -> None:
    """Let the compiler work where there is no GPU, and keep JAX from looking for one."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {WITHOUT_A_GPU}".strip()
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    # The plugin reports on every start that it finds no driver.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax.config.update("jax_platforms", "cpu")
