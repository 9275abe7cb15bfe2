"""All benchmarks by name, and their tasks built by the harness."""

from pathlib import Path

from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from alignjax.config import UserError
from alignjax.evals.benchmark import HARNESS, Benchmark
from alignjax.evals.tasks import bbh, ceval, gsm8k, humaneval, mmlu, world

BENCHMARKS: dict[str, Benchmark] = {
    m.BENCHMARK.name: m.BENCHMARK for m in (mmlu, ceval, gsm8k, humaneval, bbh, world)
}


def include_paths(names) -> list[Path]:
    """The folders of the harness' task files that these benchmarks take from; reading all of them takes 8 s."""
    return [HARNESS / folder for name in names for folder in BENCHMARKS[name].harness.values()]


def load(manager: TaskManager, groups: list[dict]) -> dict:
    """What `manager.load` gives, for groups of `Benchmark.group`; `simple_evaluate` takes its groups as tasks.

    UserError if a data set is missing, and how to have it. Of a group given as a dict the harness (0.4.13) hands the
    group's own fields down to its tasks, which refuse them: so groups are put together here.
    """
    built = []
    for group in groups:
        try:
            built.append(build(manager, group))
        except (OSError, ValueError, DatasetsError) as error:
            if "custom_dataset" in group["task"][0]:  # nothing of it comes from the hub
                raise
            name, first = group["group"].rpartition("-")[0], str(error).strip().partition("\n")[0]
            raise UserError(
                f"{name}: its data set can't be had from the hub ({first}); without the network give "
                f"--data_dir DATA_DIR, and {BENCHMARKS[name].source}"
            ) from error
    return manager.load(built)


def build(manager: TaskManager, group: dict) -> Group:
    """Tasks that the harness knows by name are its own, with our config over theirs; the others are ours alone."""
    out = Group.from_config({k: v for k, v in group.items() if k != "task"})
    for config in group["task"]:
        if config["task"] in manager.task_index:
            (task,) = manager.load({"group": out.name, "task": [config]})["tasks"].values()
        else:
            task = ConfigurableTask(config={**config, "task": f"{out.name}::{config['task']}"})
        out.add(task)
    return out
