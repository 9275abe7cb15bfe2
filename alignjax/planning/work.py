"""What a run does in a step, as shapes: its programs, and what stays in device memory."""

import math
from dataclasses import dataclass
from typing import Any

import jax

from alignjax.algorithms.registry import STAGES
from alignjax.algorithms.stage import Program
from alignjax.config import Config
from alignjax.machine import sharding


@dataclass(frozen=True)
class Work:
    """The programs of a step with their shapes, and the shapes that stay or are saved."""

    programs: list[Program]
    resident: dict[str, Any]  # name -> shapes in device memory throughout a step
    saved: dict[str, Any]  # what a checkpoint holds


def work_of(config: Config, mesh: jax.sharding.Mesh) -> Work:
    """Return the work of a run; `mesh` must be the one that is set.

    Every example is taken to be as long as it may be; the largest microbatch stands for all.
    """
    stage = STAGES[config.stage].plan(config, mesh)
    return Work(list(stage.programs()), stage.resident(), stage.abstract_state)


def device_bytes(tree: Any) -> int:
    """Return the bytes that shapes with shardings take in the memory of each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind in (None, "device", "unpinned_host")
    )


def repeated_bytes(tree: Any) -> int:
    """Return the bytes of shapes that a tree has again: one array, which several roles share."""
    return device_bytes(tree) - device_bytes(sharding.distinct_leaves(tree))


def total_bytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree of shapes, each once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_beside(program: Program, resident: dict[str, Any]) -> int:
    """Return the bytes in each device's memory during a call that are not its arguments."""
    arguments = {id(leaf) for leaf in jax.tree.leaves(program.arguments)}
    others = [leaf for leaf in jax.tree.leaves(resident) if id(leaf) not in arguments]
    return device_bytes(others) + device_bytes(program.beside)
