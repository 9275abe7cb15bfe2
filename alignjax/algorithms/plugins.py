"""Functions that a config names as "module:function": rewards, samplers, estimators."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from alignjax.config import SHIPPED, UserError, is_function_spec, nearest
from alignjax.machine import user_code


def load_function(field: str, spec: str) -> Callable:
    """Import the function that a field of the config names.

    The working directory is searched first, as for any `python -m` command, and last the
    directory that holds the configs that come with the package.

    Raises:
      UserError: if there is no such module or function, if the module raises an exception or
        exits when it is imported, and if what is named is no ordinary function. It names the
        field and the value.
    """
    name = f"{field}={spec}"
    if not is_function_spec(spec):
        raise UserError(f"{name}: must be module:function, such as my_module:my_function")
    module_name, _, path = spec.partition(":")
    value = import_module(name, module_name)
    for part in path.split("."):
        value = find_attribute(name, value, part)
    check_function(name, value)
    return value


def import_module(name: str, module_name: str) -> ModuleType:
    """Import a user's module; `name` is how errors begin."""
    prepare_search_path()
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if is_missing(error, module_name):
            places = f"the working directory {os.getcwd()} and the installed packages"
            raise UserError(f"{name}: {error}; searched {places}") from None
        raise user_code.error_of(name, error) from None
    check_not_shadowed(name, module_name)
    return module


def prepare_search_path() -> None:
    """Let imports search the working directory first, and the directory of our configs last."""
    importlib.invalidate_caches()
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    if str(SHIPPED) not in sys.path:
        sys.path.append(str(SHIPPED))


def is_missing(error: BaseException, module_name: str) -> bool:
    """Return whether an import failed because the module itself, or its package, is not there."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return False
    return f"{module_name}.".startswith(f"{error.name}.")


def check_not_shadowed(name: str, module_name: str) -> None:
    """Raise UserError if the working directory has the module, but another one was imported."""
    top = module_name.partition(".")[0]
    imported = getattr(sys.modules[top], "__file__", None) or f"the built-in module {top!r}"
    for candidate in (Path(f"{top}.py"), Path(top) / "__init__.py"):
        is_another = not (os.path.exists(imported) and candidate.exists())
        if candidate.exists() and (is_another or not candidate.samefile(imported)):
            raise UserError(
                f"{name}: the name {top!r} is taken by {imported}; "
                f"rename {candidate} in the working directory"
            )


def find_attribute(name: str, owner: Any, attribute: str) -> Any:
    """Return an attribute of a user's module or object; `name` is how errors begin."""
    try:
        return getattr(owner, attribute)
    except AttributeError:
        known = [known for known in dir(owner) if not known.startswith("_")]
        place = getattr(owner, "__file__", None) or user_code.describe_value(owner)
        hint = nearest(attribute, known) if known else ""
        raise UserError(f"{name}: {place} has no attribute {attribute!r}{hint}") from None


def check_function(name: str, function: Any) -> None:
    """Raise UserError unless a value is an ordinary function, or an object that acts as one."""
    if inspect.isclass(function):
        raise UserError(f"{name}: this is a class; name a function, or an instance to call")
    if not callable(function):
        value = user_code.describe_value(function)
        raise UserError(f"{name}: expected a function, found {value}")
    code = underlying(function)
    if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
        raise UserError(f"{name}: this is an async function; write an ordinary one")


def underlying(function: Callable) -> Callable:
    """Return the function behind partial objects and behind objects with `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return function
    return type(function).__call__
