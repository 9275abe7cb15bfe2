"""Use the code of a documentation page from outside the package, and forget it afterwards."""

import importlib
import sys
from pathlib import Path

import pytest

from alignjax import config as configs
from alignjax.data import formats
from alignjax.models import families


def install(files: dict[str, str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the files of a page to a directory and work there, as a user would."""
    for name, text in files.items():
        (directory / name).write_text(text)
    enter(directory, monkeypatch)


def enter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory whose modules can be imported; forget what they register."""
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(directory)
    importlib.invalidate_caches()
    for path in directory.glob("*.py"):
        # Set and deleted, so that the module imported in between goes when the test ends.
        monkeypatch.setitem(sys.modules, path.stem, None)
        del sys.modules[path.stem]
    monkeypatch.setattr(formats, "FORMATS", list(formats.FORMATS))
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(families, "PRESETS", dict(families.PRESETS))
    monkeypatch.setitem(configs.CHOICES, "model.family", configs.CHOICES["model.family"])
