"""Record where a run was made: versions, machine, devices, commit.

environment.json of a run has an entry for each environment that the run has used.
"""

import functools
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from alignjax.machine import outputs

ROOT = Path(__file__).resolve().parents[2]
GIT_TIMEOUT = 20  # seconds
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


def record(workdir: Path) -> None:
    """Add this environment to environment.json of a work directory, unless it is the last entry.

    A file with invalid JSON is replaced: a run needs nothing from it.
    """
    path = workdir / "environment.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        entries = []
    current = describe()
    if entries[-1:] != [current]:
        outputs.write_text(path, json.dumps([*entries, current], indent=1))


@functools.cache
def describe() -> dict[str, Any]:
    """Describe this process and its devices: {name: text or number}, and {package: version}."""
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
    """Return the versions of the packages that are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str:
    """Return the commit of the git checkout that holds this code, "" outside a checkout.

    It ends in "-dirty" if the files differ from the commit.
    """
    if not (ROOT / ".git").exists():
        return ""
    git = ["git", "-C", str(ROOT)]
    describe_head = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(
            git + describe_head, capture_output=True, text=True, timeout=GIT_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
