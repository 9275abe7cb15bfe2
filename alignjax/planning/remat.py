"""How much the backward pass recomputes: the least that fits the memory of a device."""

import dataclasses
from dataclasses import dataclass

import jax

from alignjax.algorithms.stage import Program
from alignjax.config import Config
from alignjax.machine import collectives
from alignjax.planning import cost
from alignjax.planning.chips import GIB
from alignjax.planning.work import Work, bytes_beside, device_bytes, work_of

AUTO = "auto"
LEVELS = ("nothing", "dots", "everything")  # the least recomputation first
MIB = 2**20
SHARE = 0.95  # of the memory that a plan may fill: an allocator leaves gaps


@dataclass(frozen=True, kw_only=True)
class RematChoice:
    """A level, and what it and those before it need."""

    level: str
    needs: dict[str, float]  # level -> GiB of a device
    memory: float  # GiB of a device; infinite if it has no memory of its own

    def __str__(self) -> str:
        if not self.needs:
            return f"remat: {self.level}; this device has no memory of its own to fit into"
        chosen = f"remat: {self.level}, {self.needs[self.level]:.1f} of {self.memory:.1f} GiB"
        rejected = [
            f"{level} would need {need:.1f}"
            for level, need in self.needs.items()
            if level != self.level
        ]
        return "; ".join([chosen, *rejected])


def with_level(config: Config, level: str) -> Config:
    """Return a config with another `model.remat`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=level))


def choose_remat(config: Config, mesh: jax.sharding.Mesh, memory: float) -> RematChoice:
    """Return the first level whose gradients fit, or the last one.

    `memory` is that of a device, in GiB. Each level is compiled with every example as long as it
    may be, beside everything that is resident; the mesh must be the one that is set.
    """
    needs = {}
    for level in LEVELS:
        work = work_of(with_level(config, level), mesh)
        gradients = [program for program in work.programs if program.name.endswith("gradient")]
        needs[level] = max(peak_of(program, work) for program in gradients)
        if needs[level] <= SHARE * memory:
            break
    return RematChoice(level=level, needs=needs, memory=memory)


def peak_of(program: Program, work: Work) -> float:
    """Return the GiB of a device while a program runs, with what is resident beside it."""
    resident = device_bytes(work.resident)
    try:
        _, compiled = cost.compile_program(program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return cost.rejected_row(program, str(error), resident, 0.0).peak
    return cost.memory_needs(program, compiled, bytes_beside(program, work.resident)).peak / GIB


def choose_here(config: Config, mesh: jax.sharding.Mesh) -> RematChoice:
    """Return the level for the devices of this run, the same in all processes."""
    # The smallest limit of all processes, in MiB; a CPU, which shares the machine's memory, has 0.
    limit = -int(collectives.largest_of_all(-memory_limit(mesh) // MIB))
    if limit == 0:
        return RematChoice(level=LEVELS[0], needs={}, memory=float("inf"))
    return choose_remat(config, mesh, limit * MIB / GIB)


def memory_limit(mesh: jax.sharding.Mesh) -> int:
    """Return the bytes that JAX may use of a device of this process, 0 if there is no limit."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats = local[0].memory_stats() or {}
    return stats.get("bytes_limit", 0)
