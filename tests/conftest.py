"""Give the tests eight virtual CPU devices and one cache of compiled programs for all processes.

Optimisation is off, because the tests run tiny programs: the time goes to compilation.
"""

import fcntl
import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
sys.path.insert(0, str(ROOT))

# Mappings of memory at which a test process drops its compiled programs. Linux allows 65,530, each
# program has some, and one file of tests makes up to 15,000: beyond the limit XLA crashes.
MOST_MAPPINGS = 30_000
MAPPINGS = Path("/proc/self/maps")  # of Linux, a line each

# The slowest files, the longest first. A test process takes one file at a time: if it took one of
# these last, the others would wait for it.
SLOW_FILES = (
    "test_hosts",
    "test_faults",
    "test_train",
    "test_ppo",
    "test_sharding",
    "test_advice",
    "test_requests",
    "test_plan",
    "test_extending",
    "test_docs",
    "test_adapter",
    "test_nonfinite",
)


def pytest_configure(config: pytest.Config) -> None:
    """Check the shapes in signatures in every test of a process that runs tests."""
    distributes = config.getoption("numprocesses", None)
    if not distributes:
        import shape_checks  # not at the top: it imports JAX

        shape_checks.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first."""
    rank = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def restored_signal_handlers() -> Iterator[None]:
    """Put the signal handlers back after each test, because commands install their own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def bounded_programs() -> Iterator[None]:
    """Drop all compiled programs behind a file of tests if there are very many."""
    yield
    if not MAPPINGS.exists() or MAPPINGS.read_bytes().count(b"\n") <= MOST_MAPPINGS:
        return
    import jax  # not at the top, see above

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory):
    """Return the `Chain` of tiny runs, made by whichever test process needs it first."""
    # Not at the top: `runs` imports JAX, which reads the environment that is set above.
    from runs import Chain, command

    from alignjax import train

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "chain"
    shared.mkdir(exist_ok=True)
    printed_file = shared / "printed.json"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed_file.exists():
            printed = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "say", printed.append)
                assert train.main(command("ppo-tiny", shared / "runs")) == 0
                assert train.main(command("dpo-tiny", shared / "runs")) == 0
            printed_file.write_text(json.dumps(printed))
    return Chain(runs=shared / "runs", printed=json.loads(printed_file.read_text()))
