"""What one program of a run needs and costs, from its compiled text."""

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.stages import Compiled, Traced

from alignjax.algorithms.stage import Loops, Program
from alignjax.config import Config
from alignjax.machine import sharding
from alignjax.models import vocabulary
from alignjax.planning.chips import GIB, Chip
from alignjax.planning.hlo import Module, parse_module
from alignjax.planning.operations import count_operations
from alignjax.planning.traffic import Traffic, count_traffic
from alignjax.planning.work import bytes_beside, device_bytes, repeated_bytes

ROLLOUT = "rollout"  # the program whose costs are given in two rows
# How the TPU compiler says what a program would have needed, in G or in M.
NEEDED = re.compile(
    r"total memory required.*?\(([\d.]+)([MG])\)|Used ([\d.]+)([MG])", flags=re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class ProgramCost:
    """A row of a plan: a program, or a phase of one."""

    program: str
    calls: int  # in one step of the loop
    seconds: float  # to compile
    arguments: float  # GiB of a device, as are `temporaries` and `peak`
    temporaries: float  # with the results that do not take the place of an argument
    peak: float  # with everything else that is in memory during the call
    fits: bool
    logits: str | None  # the largest array of tokens x vocabulary, if there is one
    flops: float = 0.0  # operations of all devices, in one call
    moved: float = 0.0  # bytes of a device to and from its memory, in one call
    sent: float = 0.0  # bytes that a device sends, in one call
    floor: float = 0.0  # the least seconds of a call, at the chip's rates
    bound: str = ""  # what sets the floor: "products", "memory", "links" or "network"


def program_costs(
    program: Program, resident: dict, resident_bytes: int, chip: Chip, config: Config
) -> list[ProgramCost]:
    """Compile a program and return its rows: a rollout has two, prefill and decoding.

    `resident` has the shapes that stay in device memory, `resident_bytes` of them on a device.
    A program that the compiler rejects for its memory gets one row that does not fit. The mesh
    that the program runs on must be set.
    """
    start = time.perf_counter()
    try:
        traced, compiled = compile_program(program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        return [rejected_row(program, str(error), resident_bytes, seconds)]
    seconds = time.perf_counter() - start
    module = parse_module(compiled.as_text())
    row = memory_row(program, compiled, bytes_beside(program, resident), chip, seconds)
    row = dataclasses.replace(row, logits=largest_logits(module, config))
    return priced_rows(row, program.loops, traced, module, chip)


def compile_program(program: Program) -> tuple[Traced, Compiled]:
    """Trace and compile a program from the shapes of its arguments."""
    traced = program.function.trace(*program.arguments)
    return traced, traced.lower().compile()


def rejected_row(program: Program, error: str, resident_bytes: int, seconds: float) -> ProgramCost:
    """Return the row of a program that does not compile, with the memory that the error names."""
    needed = math.inf
    match = NEEDED.search(error)
    if match:
        amount, unit = [group for group in match.groups() if group]
        needed = float(amount) / (1024 if unit == "M" else 1)
    return ProgramCost(
        program=program.name,
        calls=program.calls,
        seconds=seconds,
        arguments=device_bytes(program.arguments) / GIB,
        temporaries=needed,
        peak=needed + resident_bytes / GIB,
        fits=False,
        logits=None,
        bound="does not compile",
    )


def memory_row(
    program: Program, compiled: Compiled, beside: int, chip: Chip, seconds: float
) -> ProgramCost:
    """Return a row with the memory of a compiled program, while `beside` bytes are there too."""
    needs = memory_needs(program, compiled, beside)
    return ProgramCost(
        program=program.name,
        calls=program.calls,
        seconds=round(seconds, 1),
        arguments=needs.arguments / GIB,
        temporaries=needs.temporaries / GIB,
        peak=needs.peak / GIB,
        fits=needs.peak < chip.memory * GIB,
        logits=None,
    )


class MemoryNeeds(NamedTuple):
    """The bytes of a device that the call of a program needs."""

    arguments: int
    temporaries: int  # with the results that do not take the place of an argument
    peak: int  # with everything else that is in memory during the call


def memory_needs(program: Program, compiled: Compiled, beside: int) -> MemoryNeeds:
    """Return the memory of a compiled program, while `beside` bytes are there too."""
    memory = compiled.memory_analysis()
    # The compiler takes each argument for an array of its own.
    arguments = memory.argument_size_in_bytes - repeated_bytes(program.arguments)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes + results
    return MemoryNeeds(arguments, temporaries, arguments + temporaries + beside)


def priced_rows(
    row: ProgramCost, loops: Loops, traced: Traced, module: Module, chip: Chip
) -> list[ProgramCost]:
    """Add operations, bytes and floor to a row; split that of a rollout into its two phases.

    Decoding costs what the rollout costs beyond one without any decode steps.
    """
    hosts = hosts_on_a_network(chip)
    flops = count_operations(traced.jaxpr.jaxpr, loops)
    traffic = count_traffic(module, loops, hosts)
    if row.program != ROLLOUT:
        return [priced(row, flops, traffic, chip)]
    no_steps = loops._replace(steps=0)
    prefill_flops = count_operations(traced.jaxpr.jaxpr, no_steps)
    prefill_traffic = count_traffic(module, no_steps, hosts)
    prefill = dataclasses.replace(row, program=f"{ROLLOUT}: prefill")
    decode = dataclasses.replace(row, program=f"{ROLLOUT}: decode")
    return [
        priced(prefill, prefill_flops, prefill_traffic, chip),
        priced(decode, flops - prefill_flops, traffic - prefill_traffic, chip),
    ]


def hosts_on_a_network(chip: Chip) -> tuple[int, ...]:
    """Return the host of each device of the mesh that is set, if only a network joins hosts."""
    if math.isinf(chip.network):
        return ()
    return tuple(device.process_index for device in jax.sharding.get_mesh().devices.flat)


def priced(row: ProgramCost, flops: float, traffic: Traffic, chip: Chip) -> ProgramCost:
    """Add what a call costs, and the least time that it takes at the chip's rates."""
    devices = jax.sharding.get_abstract_mesh().size
    seconds = {
        "products": flops / devices / chip.flops,
        "memory": traffic.moved / chip.bandwidth,
        "links": traffic.sent / chip.link,
        "network": traffic.network / chip.network,
    }
    bound = max(seconds, key=seconds.get)
    return dataclasses.replace(
        row,
        flops=flops,
        moved=traffic.moved,
        sent=traffic.sent,
        floor=seconds[bound],
        bound=bound,
    )


def largest_logits(module: Module, config: Config) -> str | None:
    """Return the type of the largest array that `models.vocabulary` should have cut, if any.

    Such an array has the vocabulary as one axis and the tokens of a microbatch beside it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    model = config.model
    vocabularies = {model.vocab_size, model.vocab_size // mesh.shape["tensor"]}
    widths = {model.d_model, model.d_model // mesh.shape["fsdp"]}  # those of an embedding
    tokens = config.microbatch_tokens // sharding.row_shards(mesh)
    largest = None
    for element, sizes in set(module.arrays()):
        words = vocabularies & set(sizes)
        if not words or widths & set(sizes):
            continue
        threshold = max(tokens * min(words), vocabulary.ELEMENTS + 1)
        candidate = (math.prod(sizes), element, list(sizes))
        if math.prod(sizes) >= threshold and (largest is None or candidate > largest):
            largest = candidate
    return "{1}{2}".format(*largest) if largest else None
