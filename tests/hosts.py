"""One of the two processes of a scenario of test_hosts.py.

python tests/hosts.py SCENARIO HOST:PORT,2,INDEX DIRECTORY
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, ".")

import conftest  # noqa: F401, I001  before JAX: it sets the environment
from jax._src import cache_key
from runs import act_in_step, command

from alignjax import train
from alignjax.data import files
from alignjax.data.raw_rows import RawRow
from alignjax.machine import processes, watchdog

# JAX's key of a compiled program has a fingerprint of the CPU topology, which differs between
# processes, and only process 0 writes programs to the cache. Leave the fingerprint out, so that
# process 1 reads what process 0 has written.
cache_key._hash_accelerator_config = cache_key._hash_devices

watchdog.FIRST_REPORT = 900.0  # seconds; a busy machine may answer a signal late

processes.PATIENCE = processes.SILENT + 1  # seconds; the test need not wait for more


def act_in_process_1(step: int, act: Callable[[], object], arguments: list[str]) -> int:
    """Train, and let process 1 act in a step; return the exit code."""
    in_process_1 = processes.membership().index == 1
    with act_in_step(step, act if in_process_1 else lambda: None):
        return train.main(arguments)


def terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise ValueError("a crash")


def read_shares(runs: Path) -> None:
    """Read files together; note the rows, the places that this process parses, and the lines."""
    read_row = files.read_row
    for name in ("text.jsonl", "text.parquet"):
        places = []
        lines = []

        def read_and_note(raw: RawRow, options: files.RowOptions, places: list = places) -> dict:
            places.append(raw.where)
            return read_row(raw, options)

        with mock.patch.object(files, "read_row", read_and_note):
            rows = files.read(runs / name, "text", True, lines.append)
        note = {"rows": rows, "places": places, "lines": lines}
        index = processes.membership().index
        (runs / f"{name}-{index}").write_text(json.dumps(note))


def run_chain(runs: Path) -> None:
    """Read files; train a run of each stage and continue one of a single process; then fail.

    The first run is interrupted by a SIGTERM to process 1. The last has a bad row in its data.
    PPO's parents are those of a single process: with parents that differ by rounding, a sampled
    token differs now and then.
    """
    read_shares(runs)
    assert act_in_process_1(0, terminate_self, command("sft-tiny", runs)) == 0
    print("stopped", flush=True)
    assert train.main(command("sft-tiny", runs)) == 0
    assert train.main(command("rm-tiny", runs)) == 0
    assert train.main(command("ppo-tiny", runs / "same")) == 0
    assert train.main(command("rm-tiny", runs / "other")) == 0
    train.main(command("lm-tiny", runs / "bad", f"--config.data.train={runs / 'text.jsonl'}"))


def kill_one(runs: Path) -> None:
    """Kill process 1 once there is a checkpoint of step 2."""

    def die() -> None:
        while not (runs / "sft-tiny" / "checkpoints" / "2").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    act_in_process_1(2, die, command("sft-tiny", runs))


def resume_and_crash(runs: Path) -> None:
    """Finish the run that was killed; then raise an error in process 1, in the midst of another."""
    assert train.main(command("sft-tiny", runs)) == 0
    act_in_process_1(1, crash, command("sft-tiny", runs / "crashed"))


SCENARIOS = {"chain": run_chain, "kill": kill_one, "resume": resume_and_crash}


if __name__ == "__main__":
    scenario, address, directory = sys.argv[1:]
    processes.start(address)
    SCENARIOS[scenario](Path(directory))
