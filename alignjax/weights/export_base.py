"""Which base an exported PEFT adapter names: one that peft can load, equal to the run's."""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from alignjax.config import UserError
from alignjax.weights import bases, hf, host_reader, locations

# Parameters that are compared with those of another base: small, and changed by any training.
COMPARED = ("norm/scale", "layers/norm1/scale", "layers/norm2/scale")
ADVICE = (
    "write it as a checkpoint with alignjax.convert and name that by --base, or write the whole "
    "model with --merged"
)


@dataclass(frozen=True, kw_only=True)
class PeftBase:
    """A base as adapter_config.json has it."""

    name: str  # on the hub, or an absolute directory
    revision: str  # on the hub; "" is the newest


def base_for_peft(run: Path, head: str, other: str) -> PeftBase:
    """Return the base that the adapters of a run are exported with.

    Args:
      run: has adapters.
      head: of the role that is exported.
      other: the base to name, if it is not the run's own: a directory or hf://ORG/NAME.

    Raises:
      UserError: if the run's base is itself a run or has an adapter and `other` is empty, or if
        `other` has other parameters.
    """
    place = bases.base_of(run, head).place
    own = bases.directory_of(run, place)
    if other:
        check_same(run, head, own, other)
        return named(other)
    if locations.is_run(own):
        raise UserError(f"{run}: the base of its adapters is the run {own}; {ADVICE}")
    if locations.adapted_model(own) is not None:
        raise UserError(f"{run}: the base of its adapters has an adapter itself, {own}; {ADVICE}")
    return named(place if place.startswith(locations.HUB_PREFIX) else str(own))


def named(spec: str) -> PeftBase:
    """Return a base by its spec: hf://ORG/NAME[@REVISION] or a directory."""
    if not spec.startswith(locations.HUB_PREFIX):
        return PeftBase(name=str(Path(spec).absolute()), revision="")
    name, _, revision = spec.removeprefix(locations.HUB_PREFIX).partition("@")
    return PeftBase(name=name, revision=revision)


def check_same(run: Path, head: str, own: Path, other: str) -> None:
    """Raise UserError unless another base is a checkpoint with the parameters of the run's own.

    It may have them in another type. Only the norms are compared, which any training changes.
    """
    directory = locations.local_directory(other)
    if locations.is_run(directory) or locations.adapted_model(directory) is not None:
        raise UserError(f"--base {other}: expected a Hugging Face checkpoint without an adapter")
    locations.check_architecture(locations.architecture(own), directory)
    read = host_reader.read_whole(own, head)
    read_other = host_reader.read_whole(directory, hf.head_of(directory))
    for path in COMPARED:
        expected = read(path)
        rounded = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        values = read_other(path)
        if not (np.array_equal(values, expected) or np.array_equal(values, rounded)):
            raise UserError(
                f"--base {other}: its {path} differs from that of {own}, the base of {run}"
            )
