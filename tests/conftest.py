"""Eight virtual CPU devices, one cache of compiled programs for all test processes, and no time spent on fast code."""

import fcntl
import json
import os
import signal
import sys
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


@pytest.fixture(autouse=True)
def signals_as_they_were():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """(directory of all five tiny runs, what was printed), made by one command, without interruption, by whichever of the
    test processes needs it first."""
    from runs import command

    from alignjax import train

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "chain"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "printed.json").exists():
            printed, write = [], train.say
            train.say = printed.append
            try:
                assert train.main(command("ppo-tiny", shared / "runs")) == 0
            finally:
                train.say = write
            (shared / "printed.json").write_text(json.dumps(printed))
    return shared / "runs", json.loads((shared / "printed.json").read_text())
