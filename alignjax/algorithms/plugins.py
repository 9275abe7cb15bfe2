"""Functions that a config names as "module:function": rewards, samplers, estimators."""

import importlib
import sys
from collections.abc import Callable

from alignjax.config import SHIPPED, UserError


def load_function(field: str, spec: str) -> Callable:
    """Import the function that a field of the config names.

    The working directory is searched first, as for any `python -m` command, and last the
    directory that holds the configs that come with the package.

    Raises:
      UserError: if there is no such module or function; it names the field and the value.
    """
    module, _, name = spec.partition(":")
    if str(SHIPPED) not in sys.path:
        sys.path.append(str(SHIPPED))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{field}={spec}: {error}") from None
