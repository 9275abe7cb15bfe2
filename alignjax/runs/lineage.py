"""The parents of a run: where they are, and which architecture they hand down.

A parent is a config (NAME.py[:variant]), a run's directory, or a Hugging Face checkpoint, local
or on the hub.
"""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

from alignjax import config as configs
from alignjax.config import (
    Config,
    Model,
    UserError,
    field_of_role,
    is_reward_role,
    kind_of_role,
    kind_of_source,
)
from alignjax.weights import bases, checkpoint, locations, roles
from alignjax.weights.locations import CHILDS_OWN


def parent_of(run: Path, role: str) -> Path | None:
    """Return the directory of a run's parent of a role, or None if it has none.

    A parent that is a config is beside the run. The role "reward" of a run with several rewards
    is the first reward model among them.
    """
    stored = locations.read_config(run)
    specs = dict(stored["parents"])
    for entry in stored["ppo.rewards"].values():
        if kind_of_source(entry.get("source", "")) == "model":
            specs.setdefault("reward", entry["source"])
    spec = specs.get(role)
    if spec is None:
        return None
    if not configs.is_config_file(spec):
        return locations.local_directory(spec)
    siblings = run.parent if run.name else run.absolute().parent
    return siblings / configs.load(spec).name


def local_architecture(spec: str) -> Model:
    """Return the architecture of a run or a checkpoint, which is downloaded if need be."""
    return locations.architecture(locations.local_directory(spec))


def adopt_architecture(
    config: Config,
    fixed: Collection[str],
    architecture: Callable[[str], Model] = local_architecture,
) -> None:
    """Give the config the architecture of its ancestors, unless the user asks for another.

    The reward model does not count: its architecture may differ.

    Args:
      config: to change.
      fixed: fields that the user has set, such as "model.layers".
      architecture: directory or hub name -> its model.

    Raises:
      UserError: if a field that the user has set differs from that of a parent.
    """
    for role, spec in config.parents.items():
        ancestor = root_of(spec)
        if role == "reward" or ancestor is None:
            continue
        for name, value in dataclasses.asdict(architecture(ancestor)).items():
            if name in CHILDS_OWN:
                continue
            own_value = getattr(config.model, name)
            if f"model.{name}" in fixed and own_value != value:
                raise UserError(
                    f"model.{name}={own_value!r}, but the parent {ancestor} has {value!r}"
                )
            setattr(config.model, name, value)
    configs.check(config)


def root_of(spec: str) -> str | None:
    """Return the directory or hub name that a parent begins with, or None for a fresh model.

    The first parent of a config counts as its beginning.
    """
    if not configs.is_config_file(spec):
        return spec
    return next(map(root_of, configs.load(spec).parents.values()), None)


def check_parent(config: Config, role: str, spec: str, directory: Path) -> None:
    """Check what can be seen of a parent's faults before the run claims its directory.

    A run must be complete, of a stage that fits, and have its last checkpoint. The files of a
    Hugging Face checkpoint must be whole. Both must have the child's architecture, but for a
    reward model.

    Args:
      config: of the child.
      role: of the parent.
      spec: how the config names it.
      directory: where it is.

    Raises:
      UserError: it names the parent and what is wrong with it.
    """
    is_reward = is_reward_role(role)
    head = roles.HEADS[config.stage, kind_of_role(role)]
    if not is_reward:
        locations.check_architecture(config.model, directory)
    if not locations.is_run(directory):
        roles.open_views(directory, head)
        return
    where = f"{field_of_role(role)}={spec}"
    if not (directory / "summary.json").exists():
        raise UserError(f"{where}: this run is not complete")
    stage = locations.read_config(directory)["stage"]
    if (stage, head) not in bases.CHECKPOINT_ITEMS:
        raise UserError(f"{where}: a language model is wanted, this run's stage is {stage!r}")
    if head == "scalar":
        bases.check_value_model(directory, where)
    if is_reward and stage in roles.LANGUAGE_MODELS:
        raise UserError(f"{where}: a reward model is wanted, this run's stage is {stage!r}")
    try:
        checkpoint.newest(directory)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
