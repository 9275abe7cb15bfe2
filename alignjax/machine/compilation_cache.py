"""The persistent cache of compiled programs."""

import os
import tempfile
import warnings
from pathlib import Path

import jax

from alignjax.machine.console import say

JAX_MIN_COMPILE_SECONDS = 1.0  # JAX's default
# JAX warns of each program whose entry it can't read or write. It costs time and nothing else, and
# a disk that is full is reported where a run's own files are written.
NO_ENTRY = r"Error (reading|writing) persistent compilation cache entry"
MIN_COMPILE_SECONDS = 0.5  # ours: keep what took at least this long to compile


def keep_programs() -> None:
    """Keep compiled programs from run to run; call this before the first compilation.

    JAX's persistent cache goes to $XDG_CACHE_HOME/alignjax, or ~/.cache/alignjax. Programs that
    took half a second or more to compile are written there, and none is ever deleted.
    JAX_COMPILATION_CACHE_DIR names another directory, or none if it is empty;
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS another time. If the directory cannot be written,
    a line says so, and programs are not kept.
    """
    warnings.filterwarnings("ignore", message=NO_ENTRY)
    is_default = (
        jax.config.jax_persistent_cache_min_compile_time_secs == JAX_MIN_COMPILE_SECONDS
        and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ
    )
    if is_default:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        directory = make_cache_directory()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory.
        say(f"compiled programs are not kept: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))


def make_cache_directory() -> Path:
    """Create the cache's directory and check that it can be written."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = caches / "alignjax"
    # Its files are executed, so nobody else may write there.
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()
    return directory
