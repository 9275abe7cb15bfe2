"""Where the frozen base of a run with adapters is.

The checkpoints of such a run (`lora.rank` above 0) hold adapters alone. Its base is its parent; or,
if the parent has adapters of the same settings, the parent's base, and the run goes on with the
parent's adapters. A run records its bases in its marker, those beside it by their name alone, so
runs that are moved together find each other.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alignjax.config import Config, Lora, UserError, is_config_file, lora_from_json
from alignjax.config import load as load_config
from alignjax.machine import marker
from alignjax.machine import workdir as workdirs
from alignjax.weights import checkpoint, locations, peft_parameters

BASES = "bases"  # an entry of the marker: trained role -> `Base`
BESIDE = "../"  # begins the place of a base beside the run

# (stage of the parent run, head of the child's role) -> the checkpoint item to load.
CHECKPOINT_ITEMS = {
    ("lm", "lm"): "model",
    ("lm", "scalar"): "model",
    ("ranking", "scalar"): "model",
    ("dpo", "lm"): "policy",
    ("dpo", "scalar"): "policy",
    ("ppo", "lm"): "policy",
    ("ppo", "scalar"): "value",
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a role with adapters begins with."""

    base: Path  # a run or a checkpoint, which may itself have other adapters
    item: str  # of the base's checkpoint; "" if it is no run
    # The run or the PEFT adapter (BASE+ADAPTER) that it goes on with; None if adapters are new.
    adapters: Path | None
    hub_name: str = ""  # hf://ORG/NAME of the base, if that is how the run in `adapters` names it


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base of a role, as its run records it."""

    place: str  # ../NAME beside the run, hf://ORG/NAME, or a path
    item: str  # of the base's checkpoint; "" if it is no run
    contents: str  # a hash of the base's parameters; "" if it is no run


def planned_base(spec: str, head: str, settings: Lora) -> str:
    """Return a name of the base that a parent will give, for configs that have not run yet.

    Equal names mean one base. The head is that of the role that the parent is for.
    """
    if not is_config_file(spec):
        return locations.base_spec(spec) if goes_on_with_adapter(spec, settings) else spec
    parent = load_config(spec)
    role = CHECKPOINT_ITEMS.get((parent.stage, head))
    if parent.lora.rank and have_same_form(parent.lora, settings) and role in parent.parents:
        return planned_base(parent.parents[role], head, settings)
    return spec


def goes_on_with_adapter(spec: str, settings: Lora) -> bool:
    """Return whether a child can go on with the PEFT adapter that a spec names, if it names one.

    A model on the hub is taken to have none unless the spec says so, and is not downloaded. So is
    a directory that is not here, which a plan may name.
    """
    is_on_hub = spec.startswith(locations.HUB_PREFIX)
    is_elsewhere = is_on_hub or ("://" not in spec and not Path(spec).exists())
    if is_elsewhere and locations.JOINT not in spec:
        return False
    own = adapters_of(locations.local_directory(spec, weights=False))
    return own is not None and have_same_form(own, settings)


def adapters_of(directory: Path) -> Lora | None:
    """Return the settings of the adapters of a run or a PEFT adapter.

    None if there are none, or if no run could train them.
    """
    adapted = locations.adapted_model(directory)
    if adapted is not None:
        model = locations.architecture(adapted.base)
        return peft_parameters.settings_of(adapted.adapter, model)
    values = locations.read_config(directory)
    if not locations.is_run_config(values):
        return None
    settings = lora_from_json(values)
    return settings if settings.rank else None


def have_same_form(one: Lora, other: Lora) -> bool:
    """Return whether adapters of some settings can go on with those of others."""
    return (one.rank, one.alpha, sorted_targets(one)) == (
        other.rank,
        other.alpha,
        sorted_targets(other),
    )


def sorted_targets(settings: Lora) -> list[str]:
    """Return the targets of adapters in one order."""
    return sorted(target.strip() for target in settings.targets.split(","))


def origin_of(directory: Path, head: str, settings: Lora) -> Origin:
    """Return what a role with adapters begins with whose parent is in `directory`."""
    own = adapters_of(directory)
    if own is None or not have_same_form(own, settings):
        return Origin(base=directory, item=item_of(directory, head), adapters=None)
    adapted = locations.adapted_model(directory)
    if adapted is not None:
        return Origin(base=adapted.base, item="", adapters=directory)
    base = base_of(directory, head)
    return Origin(
        base=directory_of(directory, base.place),
        item=base.item,
        adapters=directory,
        hub_name=base.place if base.place.startswith(locations.HUB_PREFIX) else "",
    )


def item_of(directory: Path, head: str) -> str:
    """Return the item of a run's checkpoint that has a role's parameters; "" if it is no run.

    Raises UserError if the run has no such role.
    """
    if not locations.is_run(directory):
        return ""
    stage = locations.read_config(directory)["stage"]
    if (stage, head) not in CHECKPOINT_ITEMS:
        raise UserError(
            f"parent {directory}: a language model is wanted, this run's stage is {stage!r}"
        )
    if head == "scalar":
        check_value_model(directory, f"parent {directory}")
    return CHECKPOINT_ITEMS[stage, head]


def check_value_model(run: Path, where: str) -> None:
    """Raise UserError if a run is of PPO and has trained no value model."""
    stored = locations.read_config(run)
    if stored["stage"] == "ppo" and "value" not in stored["parents"]:
        estimator = stored.get("ppo.advantage_estimator")
        raise UserError(
            f"{where}: with ppo.advantage_estimator={estimator!r} a run has no value model"
        )


def base_of(run: Path, head: str) -> Base:
    """Return the base of a role of a run with adapters, which must be there.

    Raises UserError if it is not, or is not the one that the run began with.
    """
    item = item_of(run, head)
    entry = marker.read(run).get(BASES, {}).get(item)
    if entry is None:
        raise UserError(f"{run / marker.NAME}: it does not say where the base of {item} is")
    base = Base(**entry)
    directory = directory_of(run, base.place)
    if not (locations.base_directory(directory) / locations.CONFIG).exists():
        raise UserError(
            f"{run}: its base {directory} is not there, and without it the run's adapters are of "
            "no use"
        )
    if contents_of(directory) != base.contents:
        raise UserError(
            f"{run}: its base {directory} has other parameters now than those that the run's "
            "adapters were trained for"
        )
    return base


def contents_of(directory: Path) -> str:
    """Return a hash of the parameters of a run; "" for a checkpoint, which is not looked into."""
    if not locations.is_run(directory):
        return ""
    return checkpoint.contents_id(checkpoint.newest(directory))


def directory_of(run: Path, place: str) -> Path:
    """Return the directory of a base from its place as the run has recorded it."""
    if place.startswith(BESIDE):
        return siblings_of(run) / place.removeprefix(BESIDE)
    return locations.local_directory(place)


def siblings_of(run: Path) -> Path:
    """Return the directory that a run is in."""
    return run.absolute().parent if workdirs.is_local(run) else run.parent


def record(
    config: Config, workdir: Path, parents: Mapping[str, Path], heads: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Return the bases of a run's trained roles, for its marker.

    `parents` maps roles to directories; `heads` maps the roles that are trained to their heads.
    """
    bases = {}
    for role, head in heads.items():
        if role in parents:
            origin = origin_of(parents[role], head, config.lora)
            base = Base(
                place=place_of(origin, config.parents[role], workdir),
                item=origin.item,
                contents=contents_of(origin.base),
            )
            bases[role] = dataclasses.asdict(base)
    return bases


def place_of(origin: Origin, spec: str, workdir: Path) -> str:
    """Return how a run records where its base is; `spec` names the parent in the config."""
    if origin.hub_name:
        return origin.hub_name
    goes_on = origin.adapters is not None
    if goes_on and locations.adapted_model(origin.adapters) is not None:
        spec = locations.base_spec(spec)
        goes_on = False
    if not goes_on and spec.startswith(locations.HUB_PREFIX):
        return spec
    is_plain = locations.adapted_model(origin.base) is None
    if is_plain and siblings_of(origin.base) == siblings_of(workdir):
        return f"{BESIDE}{origin.base.name}"
    return absolute_name(origin.base)


def absolute_name(directory: Path) -> str:
    """Return the name of a model's directory that holds wherever a command is run."""
    if not workdirs.is_local(directory):
        return str(directory)
    adapted = locations.adapted_model(directory)
    if adapted is None:
        return str(directory.absolute())
    return f"{adapted.base.absolute()}{locations.JOINT}{adapted.adapter.absolute()}"
