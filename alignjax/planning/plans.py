"""A plan: what a run needs and costs on some devices, and whether it fits."""

import dataclasses
import math
import operator
from dataclasses import dataclass

import jax

from alignjax.config import Config
from alignjax.machine import sharding
from alignjax.machine.precision import products_of
from alignjax.models import attention
from alignjax.planning import remat
from alignjax.planning.chips import GIB, chip_of
from alignjax.planning.cost import ProgramCost, program_costs
from alignjax.planning.topologies import devices_of
from alignjax.planning.work import device_bytes, total_bytes, work_of
from alignjax.sampling.slots import plan_slots


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is known of a run on some devices, whether or not its programs have been compiled."""

    topology: str
    mesh: dict[str, int]  # axis -> size
    remat: str
    microbatch_tokens: int
    rollout_tensor: int
    memory: float  # GiB of a device
    rows: list[ProgramCost]  # one a program; none before anything is compiled
    peak: float  # GiB of a device
    peak_of: str  # the program that needs the most
    floor: float  # the least seconds of a step; infinite before anything is compiled
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan(Estimate):
    """What a run needs and costs, by the programs that training runs."""

    name: str
    devices: int
    kind: str  # of a device
    resident: dict[str, float]  # name -> GiB of a device that stay in its memory
    checkpoint: float  # GiB in all
    notes: list[str]  # what does not divide over the devices
    remat_choice: str  # how `model.remat="auto"` was resolved; "" if it was not


def plan_dict(plan: Estimate) -> dict:
    """Return a plan as JSON has it."""
    return dataclasses.asdict(plan)


def make_plan(config: Config, topology: str, stop: bool = False) -> Plan:
    """Compile the programs of a run for a topology, and return what they need and cost.

    With `stop`, the first program that does not fit is the last one that is compiled. Of
    `model.remat="auto"` the plan has the level that fits.
    """
    devices = devices_of(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    chip = chip_of(devices)
    remat_choice = ""
    with jax.set_mesh(mesh), products_of(config.model.dtype):
        attention.check(config.model)
        if config.model.remat == remat.AUTO:
            choice = remat.choose_remat(config, mesh, chip.memory)
            config = remat.with_level(config, choice.level)
            remat_choice = str(choice)
        work = work_of(config, mesh)
        resident = {name: device_bytes(tree) for name, tree in work.resident.items()}
        resident_bytes = sum(resident.values())
        rows = []
        for program in work.programs:
            with jax.set_mesh(program.mesh or mesh):
                rows += program_costs(program, work.resident, resident_bytes, chip, config)
            if stop and not rows[-1].fits:
                break
    peak = max(rows, key=operator.attrgetter("peak"))
    return Plan(
        name=config.name,
        topology=topology or "here",
        devices=len(devices),
        kind=devices[0].device_kind,
        mesh=dict(mesh.shape),
        remat=config.model.remat,
        microbatch_tokens=config.microbatch_tokens,
        rollout_tensor=config.ppo.rollout_tensor,
        memory=chip.memory,
        rows=rows,
        resident={name: size / GIB for name, size in resident.items()},
        checkpoint=total_bytes(work.saved) / GIB,
        notes=uneven_divisions(config, mesh),
        remat_choice=remat_choice,
        peak=peak.peak,
        peak_of=peak.program,
        floor=sum(row.calls * row.floor for row in rows),
        fits=resident_bytes < chip.memory * GIB and all(row.fits for row in rows),
    )


def lower_bound(config: Config, topology: str) -> Estimate:
    """Return what is known before anything is compiled: the state needs a gradient beside it."""
    devices = devices_of(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    if config.model.remat == remat.AUTO:
        config = remat.with_level(config, remat.LEVELS[-1])
    with jax.set_mesh(mesh):
        work = work_of(config, mesh)
        gradient = max(
            device_bytes(program.arguments[0].gradient)
            for program in work.programs
            if program.name.endswith("gradient")
        )
        peak = (gradient + device_bytes(work.resident)) / GIB
    memory = chip_of(devices).memory
    return Estimate(
        topology=topology,
        mesh=dict(mesh.shape),
        remat=config.model.remat,
        microbatch_tokens=config.microbatch_tokens,
        rollout_tensor=config.ppo.rollout_tensor,
        memory=memory,
        rows=[],
        peak=peak,
        peak_of="the state with a gradient",
        floor=math.inf,
        fits=peak < memory,
    )


def uneven_divisions(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    """Return notes on what does not divide, so that devices hold whole what they could share."""
    return rollout_notes(config, mesh) + batch_notes(config, mesh) + model_notes(config, mesh)


def rollout_notes(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    if config.stage != "ppo":
        return []
    ppo = config.ppo
    devices = sharding.row_shards(sharding.with_tensor(mesh, ppo.rollout_tensor))
    plan = plan_slots(config.data.batch, ppo.samples_per_prompt, ppo.slots)
    counts = {
        "prompts that are prefilled at once": plan.prompts_per_fill,
        "slots of the rollout": plan.slots,
    }
    return [
        f"{name}: {count} do not divide over {devices} devices, so each of them has all "
        f"(ppo.slots={ppo.slots})"
        for name, count in counts.items()
        if count % devices
    ]


def batch_notes(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    devices = sharding.row_shards(mesh)
    counts = {"data.batch": config.data.batch}
    if config.stage == "ppo":
        responses = config.data.batch * config.ppo.samples_per_prompt
        counts["responses of a minibatch"] = responses // config.ppo.minibatches
    return [
        f"{name}={count} does not divide over {devices} devices"
        for name, count in counts.items()
        if count % devices
    ]


def model_notes(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    axes = {"heads": "tensor", "kv_heads": "tensor", "vocab_size": "tensor", "d_ff": "tensor"}
    axes |= {"d_model": "fsdp", "experts": "fsdp"}
    notes = []
    for name, axis in axes.items():
        size = getattr(config.model, name)
        if size % mesh.shape[axis]:
            notes.append(f"model.{name}={size} does not divide by mesh.{axis}={mesh.shape[axis]}")
    return notes
