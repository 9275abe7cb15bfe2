"""The programs of a run as the planner takes them."""

from dataclasses import dataclass
from typing import Any

import jax

from alignjax.algorithms.registry import STAGES
from alignjax.algorithms.stage import Program
from alignjax.config import Config


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run's programs, and what lies in device memory throughout: by name, shapes."""

    jobs: list[Program]
    resident: dict[str, Any]
    saved: dict[str, Any]  # what a checkpoint holds


def work_of(config: Config, mesh: jax.sharding.Mesh) -> Work:
    """Return the programs of a run."""
    stage = STAGES[config.stage].plan(config, mesh)
    return Work(jobs=list(stage.programs()), resident=stage.resident(), saved=stage.abstract_state)


WORK = dict.fromkeys(STAGES, work_of)
Job = Program
