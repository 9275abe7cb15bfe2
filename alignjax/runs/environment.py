"""Where a run was made: versions, machine, devices, commit. environment.json of a run has an entry for each that it met."""

import functools
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import jax

from alignjax.machine import workdir as workdirs

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "alignjax",
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "ml_dtypes",
    "transformers",
    "tokenizers",
    "tensorflow-datasets",
)


def keep(workdir) -> None:
    """Add this environment to environment.json of a work directory, unless it is the last one there.

    A file that isn't JSON is begun anew: it says nothing that a run needs.
    """
    path, mine = workdir / "environment.json", found()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        known = []
    if known[-1:] != [mine]:
        workdirs.write_atomically(path, json.dumps([*known, mine], indent=1))


@functools.cache
def found() -> dict:
    """{name: text or number} of this process and its devices, "packages" {name: version}."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "processes": jax.process_count(),
        "commit": commit(),
        "packages": versions(),
    }


def versions() -> dict[str, str]:
    """Those of the packages that are installed."""
    out = {}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def commit() -> str:
    """Of the git checkout that this code lies in, "-dirty" where its files differ from it; "" elsewhere."""
    if not (ROOT / ".git").exists():
        return ""
    asked = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(
            asked, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
