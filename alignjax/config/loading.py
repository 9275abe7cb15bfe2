"""Config files: a file defines `config(variant)`, which returns a `Config`."""

import contextlib
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignjax.config.checks import check, check_types
from alignjax.config.errors import UserError, nearest
from alignjax.config.fields import Config
from alignjax.config.overrides import override

# A checkout has configs/ and studies/ beside the package; an installed package has them inside.
PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent
CONFIGS = SHIPPED / "configs"


def load(spec: str, overrides: dict[str, str] | None = None) -> Config:
    """Load the config that `NAME.py[:variant]` names, apply overrides, and check it.

    Args:
      spec: a path, or the name of a file in `configs/`; the path is tried first.
      overrides: dotted field -> text, such as {"ppo.kl_coef": "0.1"}.

    Raises:
      UserError: for a file, variant or field that does not exist, and for a broken rule.
    """
    name, _, variant = spec.partition(":")
    candidates = [path for path in (Path(name), CONFIGS / name) if path.is_file()]
    if not candidates:
        known = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.py"))
        raise UserError(
            f"--config {spec}: no file {name} here or in {CONFIGS}{nearest(name, known)}"
        )
    config = config_of_file(candidates[0], variant)
    for key, value in (overrides or {}).items():
        override(config, key, value)
    check(config)
    return config


def config_of_file(path: Path, variant: str) -> Config:
    """Return the config of a variant that a file defines; its fields are not checked."""
    namespace = run_file(path)
    variants = namespace.get("VARIANTS", ("",))
    is_list = isinstance(variants, tuple | list | set | frozenset | dict)
    if not is_list or not all(isinstance(name, str) for name in variants):
        raise UserError(f"{path}: VARIANTS must be a tuple of texts, not {variants!r}")
    if variant not in variants:
        raise UserError(f"{path} has no variant {variant!r}{nearest(variant, variants)}")
    make_config = namespace.get("config")
    if not callable(make_config):
        raise UserError(f"{path}: there is no function config(variant), which returns a Config")
    with errors_of_file(path):
        config = make_config(variant)
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise UserError(f"{path}: config({variant!r}) must return a Config, not {kind}")
    try:
        check_types(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def run_file(path: Path) -> dict[str, Any]:
    """Run a user's file of Python code, and return what it defines.

    Unlike `runpy`, this runs neither directories nor archives.

    Raises:
      UserError: if the file cannot be read, or its code raises an exception or exits; it names
        the line.
    """
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    with errors_of_file(path):
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module.__dict__


@contextlib.contextmanager
def errors_of_file(path: Path) -> Iterator[None]:
    """Raise UserError, with the file and the line, for what the code of a user's file raises."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        line = line_of_error(path, error)
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{path}{line}: {type(error).__name__}: {reason}") from error


def line_of_error(path: Path, error: BaseException) -> str:
    """Return ":LINE" of the last line of a file that an error went through, "" for none."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f":{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""
