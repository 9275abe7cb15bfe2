"""An installed wheel works on its own: its configs and studies come with it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REWARD = """
from alignjax.algorithms import plugins
from alignjax.config import PACKAGE
reward = plugins.load_function("ppo.reward_fn", "configs.arithmetic:reward")
print(PACKAGE, reward([], ["it is 4"], answer=["4"]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Build a wheel from a copy of the sources, and return the directory that it is unpacked in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("alignjax", "configs", "studies"):
        ignore = shutil.ignore_patterns("__pycache__", "shipped")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    shutil.copy(ROOT / "setup.py", source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", source / "dist", source], check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    directory = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(directory)
    return directory


def run(installed: Path, directory: Path, *arguments: str) -> str:
    """Run Python in a directory, with the wheel before all else, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return process.stdout


def test_the_wheel_trains_in_another_directory(installed, tmp_path):
    printed = run(installed, tmp_path, "-m", "alignjax.train", "--config", "lm.py:tiny")
    assert "loss on held-out targets" in printed
    assert (tmp_path / "runs" / "lm-tiny" / "summary.json").exists()


def test_the_wheel_has_its_studies(installed, tmp_path):
    assert "warmup" in run(installed, tmp_path, "-m", "alignjax.study", "--help")


def test_the_wheel_finds_the_functions_of_its_configs(installed, tmp_path):
    assert run(installed, tmp_path, "-c", REWARD).split() == [str(installed / "alignjax"), "[1.0]"]


def test_the_wheel_has_every_file_of_the_package(installed):
    def files(directory: Path) -> set[str]:
        return {
            str(path.relative_to(directory))
            for path in directory.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    package = installed / "alignjax"
    shipped = {name for name in files(package) if name.startswith("shipped/")}
    assert files(package) - shipped == files(ROOT / "alignjax")
    configs = {f"shipped/configs/{name}" for name in files(ROOT / "configs")}
    studies = {f"shipped/studies/{name}" for name in files(ROOT / "studies")}
    assert shipped == configs | studies
