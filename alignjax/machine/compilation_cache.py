"""The persistent cache of compiled programs."""

import os
import tempfile
from pathlib import Path

import jax

from alignjax.machine.console import say


def keep_programs() -> None:
    """Keep compiled programs from run to run in $XDG_CACHE_HOME/alignjax, or ~/.cache/alignjax; before the first compile.

    The persistent cache of jax: what took half a second to compile or longer is written there, and nothing is ever
    deleted. JAX_COMPILATION_CACHE_DIR names another directory, or none if it is empty;
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS another time. A directory that can't be written is done without.
    """
    untouched = jax.config.jax_persistent_cache_min_compile_time_secs == 1.0  # the default of jax
    if untouched and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignjax"
        directory.mkdir(
            mode=0o700, parents=True, exist_ok=True
        )  # its files are run: for nobody else to write
        tempfile.TemporaryFile(dir=directory).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        say(f"compiled programs are not kept: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
