"""Check the shapes in signatures while tests run.

`install()` wraps every annotated function of the packages whose signatures carry shapes
(jaxtyping), so that a call with other shapes or types fails. In a test a numpy array may stand
for a JAX array. Dataclasses are not wrapped: JAX fills registered ones with placeholders.
"""

import functools
import importlib
import inspect
import pkgutil
import sys
import types
import typing

import jax
import jaxtyping
import numpy as np
from beartype import beartype

PACKAGES = ("alignjax.models", "alignjax.sampling", "alignjax.algorithms")


def accept_numpy(annotation):
    """Return an annotation whose JAX arrays may be numpy arrays too."""
    if annotation is jax.Array:
        return jax.Array | np.ndarray | np.generic
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        if annotation.array_type is jax.Array:
            return annotation.dtype[jax.Array | np.ndarray | np.generic, annotation.dim_str]
        return annotation
    arguments = typing.get_args(annotation)
    if not arguments or typing.get_origin(annotation) is typing.Literal:
        return annotation
    converted = tuple(accept_numpy(argument) for argument in arguments)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return functools.reduce(lambda one, other: one | other, converted)
    try:
        return typing.get_origin(annotation)[converted]
    except TypeError:  # a Callable, whose arguments are not checked anyway
        return annotation


def checked(function):
    """Return a function that checks its arguments and its result at every call."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=accept_numpy(parameter.annotation))
        for parameter in signature.parameters.values()
    ]
    result = accept_numpy(signature.return_annotation)
    call.__signature__ = signature.replace(parameters=parameters, return_annotation=result)
    call.__annotations__ = {
        name: accept_numpy(annotation) for name, annotation in function.__annotations__.items()
    }
    del call.__wrapped__  # or the checker would read the annotations of the original
    return jaxtyping.jaxtyped(typechecker=beartype)(call)


def modules():
    """Yield the modules of the checked packages."""
    for name in PACKAGES:
        package = importlib.import_module(name)
        yield package
        for info in pkgutil.walk_packages(package.__path__, f"{name}."):
            yield importlib.import_module(info.name)


def has_shapes(function) -> bool:
    return any(
        "jaxtyping" in repr(x) or "Array" in repr(x) for x in function.__annotations__.values()
    )


def install() -> int:
    """Wrap the functions wherever they are imported, and return how many there are."""
    replacements = {}
    for module in list(modules()):
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                if has_shapes(function):
                    replacements[function] = checked(function)
    for name, module in list(sys.modules.items()):
        if name.startswith("alignjax"):
            for attribute, value in list(vars(module).items()):
                if inspect.isfunction(value) and value in replacements:
                    setattr(module, attribute, replacements[value])
    return len(replacements)
