"""List all benchmarks by name, and have the harness build their tasks."""

from collections.abc import Iterable
from pathlib import Path

from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from alignjax.config import UserError
from alignjax.evals.benchmark import HARNESS, Benchmark
from alignjax.evals.tasks import bbh, ceval, gsm8k, humaneval, mmlu, world

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (mmlu, ceval, gsm8k, humaneval, bbh, world)
}


def include_paths(names: Iterable[str]) -> list[Path]:
    """Return the folders with the harness's task files that these benchmarks use.

    Reading all task files of the harness would take 8 s.
    """
    return [
        HARNESS / folder for name in names for folder in BENCHMARKS[name].harness_folders.values()
    ]


def load(manager: TaskManager, groups: list[dict]) -> dict:
    """Build the groups of `Benchmark.group`; return what `manager.load` returns.

    `simple_evaluate` takes the groups in it as tasks. Raises UserError if a data set is missing,
    and says how to get it. The groups are built here because the harness (0.4.13) hands the fields
    of a group that is given as a dict down to its tasks, which reject them.
    """
    return manager.load([build_group(manager, group) for group in groups])


def build_group(manager: TaskManager, group: dict) -> Group:
    """Build one group; raise UserError if the hub does not provide its data set."""
    try:
        return assemble_group(manager, group)
    except (OSError, ValueError, DatasetsError) as error:
        if "custom_dataset" in group["task"][0]:  # the data do not come from the hub
            raise
        name = group["group"].rpartition("-")[0]
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name}: the hub does not provide its data set ({reason}); without a network, use "
            f"--data_dir DATA_DIR, and {BENCHMARKS[name].source}"
        ) from error


def assemble_group(manager: TaskManager, group: dict) -> Group:
    """Build the tasks of a group.

    Our config overrides fields of a task that the harness knows by name. Any other task is ours.
    """
    built = Group.from_config({key: value for key, value in group.items() if key != "task"})
    for config in group["task"]:
        if config["task"] in manager.task_index:
            loaded = manager.load({"group": built.name, "task": [config]})
            (task,) = loaded["tasks"].values()
        else:
            task = ConfigurableTask(config={**config, "task": f"{built.name}::{config['task']}"})
        built.add(task)
    return built
