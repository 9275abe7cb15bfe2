"""Several processes are one run: one result, shared reading, and a common end.

The processes are those of hosts.py.
"""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from runs import PARENTS, ROOT, STEPS, command, cut, rows

from alignjax import train
from alignjax.data import files
from alignjax.machine import signals as machine_signals
from alignjax.weights import checkpoint

HANG = 900  # seconds after which the processes are killed


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str

    def error_lines(self) -> list[str]:
        """Return the lines of errors that alignjax itself printed."""
        return [line for line in self.err.splitlines() if line.startswith("alignjax: ")]


def run_pair(scenario: str, runs: Path) -> list[Ended]:
    """Run a scenario of hosts.py in two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    processes = [
        subprocess.Popen(
            [sys.executable, "tests/hosts.py", scenario, f"127.0.0.1:{port},2,{index}", str(runs)],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ended: list[Ended | None] = [None, None]

    def wait(index: int) -> None:
        out, err = processes[index].communicate()
        ended[index] = Ended(processes[index].returncode, out, err)

    threads = [threading.Thread(target=wait, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
        if thread.is_alive():
            for process in processes:
                process.kill()
    return ended


class Pair(NamedTuple):
    """The directory of the runs of two processes, and how each process ended."""

    runs: Path
    ended: list[Ended]


def write_rows(runs: Path) -> None:
    """Write nine rows, two of them bad, as JSON lines (after an empty line) and as Parquet."""
    values = [{"text": f"cat {i}"} for i in range(9)]
    values[3] = {"text": 3}
    values[6] = {"texts": ""}
    lines = [json.dumps(value) for value in values]
    (runs / "text.jsonl").write_text("\n" + "\n".join(lines))
    values[3] = {}  # a column of Parquet has one type
    table = pyarrow.Table.from_pylist(values)
    pyarrow.parquet.write_table(table, runs / "text.parquet")


@pytest.fixture(scope="module")
def pair(chain, tmp_path_factory) -> Pair:
    """Run the scenario "chain" beside copies of the chain's own runs."""
    runs = tmp_path_factory.mktemp("hosts")
    write_rows(runs)
    for place, name in (
        ("", "sft-tiny"),
        ("", "rm-tiny"),
        ("other", "rm-tiny"),
        ("same", "ppo-tiny"),
    ):
        for parent in PARENTS[name]:
            shutil.copytree(chain.runs / parent, runs / place / parent)
    cut(chain.runs / "rm-tiny", runs / "other" / "rm-tiny")
    return Pair(runs, run_pair("chain", runs))


def exact_texts(rows: list[dict]) -> list[dict]:
    """Return rows of samples, or of evaluations with samples, without the rounded figures."""
    rounded = ("score", "kl", "entropy", "log_ratio")
    samples = [sample for row in rows for sample in row.get("samples", [row])]
    return [
        {name: value for name, value in sample.items() if not name.endswith(rounded)}
        for sample in samples
    ]


def assert_alike(run: Path, other: Path) -> None:
    """Check that figures agree up to rounding; and texts, so the order of the data, exactly.

    Adam turns the rounding of a gradient near 0 into a step, so PPO's policy differs by more
    after its second update, and a token that it then samples may be another. Its last step need
    only be about the same.
    """
    is_ppo = other.name == "ppo-tiny"
    evaluations = ["evaluations.jsonl"] if is_ppo else []
    for file in ("metrics.jsonl", *evaluations):
        for row, other_row in zip(rows(run / file), rows(other / file), strict=True):
            assert row.keys() == other_row.keys()
            for name in other_row.keys() - {"samples"}:
                tolerance = {"rel": 1e-4, "abs": 1e-4 if "policy" in name else 1e-5}
                if is_ppo and row["step"] == STEPS - 1:
                    tolerance = {"rel": 0.1, "abs": 0.05}
                assert row[name] == pytest.approx(other_row[name], **tolerance), name
    for file in ("samples.jsonl", *evaluations):
        assert exact_texts(rows(run / file)) == exact_texts(rows(other / file))


def test_each_process_parses_its_share_and_all_get_the_whole(pair):
    for name in ("text.jsonl", "text.parquet"):
        lines = []
        rows_alone = files.read(pair.runs / name, "text", True, lines.append)
        notes = [json.loads((pair.runs / f"{name}-{index}").read_text()) for index in range(2)]
        for note in notes:
            assert note["rows"] == rows_alone and lines == note["lines"][-1:]
        first, second = (set(note["places"]) for note in notes)
        assert len(first) in (4, 5) and len(first | second) == len(first) + len(second) == 9


# One of each stage, from parents of a single process.
@pytest.mark.parametrize("name", ["sft-tiny", "rm-tiny", "ppo-tiny"])
def test_two_processes_give_the_result_of_one(name, pair, chain):
    runs = pair.runs / "same" if name == "ppo-tiny" else pair.runs
    assert_alike(runs / name, chain.runs / name)


def test_a_sigterm_to_one_process_saves_in_all_and_the_run_goes_on(pair):
    first, second = pair.ended
    assert first.error_lines()[0] == (
        "alignjax: SIGTERM: sft-tiny saved at step 2 of 4; the same command resumes it"
    )
    assert "sft-tiny: resuming from step 2" in first.out.partition("stopped\n")[2]
    assert "stopped\n" in second.out
    # Only the first process prints.
    assert "sft-tiny" not in second.out and second.error_lines() == []


def test_a_run_goes_on_with_other_processes_and_another_mesh(pair, chain, tmp_path, capsys):
    """From one process to two, and back."""
    assert_alike(pair.runs / "other" / "rm-tiny", chain.runs / "rm-tiny")
    assert "rm-tiny: resuming from step 2" in pair.ended[0].out
    for parent in PARENTS["rm-tiny"]:
        shutil.copytree(pair.runs / parent, tmp_path / parent)
    cut(pair.runs / "rm-tiny", tmp_path / "rm-tiny")
    assert train.main(command("rm-tiny", tmp_path, "--config.mesh.tensor=2")) == 0
    assert "rm-tiny: resuming from step 2" in capsys.readouterr().out
    assert_alike(tmp_path / "rm-tiny", chain.runs / "rm-tiny")


def test_a_bad_row_is_the_same_error_in_all(pair):
    """Both have one in their share; the first of the file counts."""
    first, second = pair.ended
    assert first.code == second.code == 2 and second.error_lines() == []
    assert first.error_lines()[1:] == [
        f"alignjax: {pair.runs}/text.jsonl:5: text: expected text, found int: 3; "
        'data.on_bad_row="skip" leaves such rows out'
    ]


def last_arrays(run: Path) -> dict[str, bytes]:
    """Return every array of the last checkpoint, whichever processes saved it."""
    contents = {}
    for item in (run / "checkpoints" / str(STEPS)).iterdir():
        if (item / "_METADATA").exists():
            for path, x in jax.tree_util.tree_leaves_with_path(read_item(item)):
                contents[item.name + jax.tree_util.keystr(path)] = np.asarray(x).tobytes()
    return contents


def read_item(item: Path):
    """Return the arrays of a checkpoint's item, as NumPy arrays."""
    as_numpy = checkpoint.ocp.RestoreArgs(restore_type=np.ndarray)
    with checkpoint.ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(item).item_metadata.tree
        restore_args = jax.tree.map(lambda _: as_numpy, tree)
        arguments = checkpoint.ocp.args.PyTreeRestore(restore_args=restore_args)
        return reader.restore(item, args=arguments)


def test_a_process_that_is_gone_or_fails_ends_all_and_both_go_on_exactly(pair, tmp_path):
    for place in (tmp_path, tmp_path / "crashed"):
        shutil.copytree(pair.runs / "lm-tiny", place / "lm-tiny")
    name = f"process 1 on {socket.gethostname()}"

    first, killed = run_pair("kill", tmp_path)
    # SIGABRT if JAX's heartbeats end it.
    assert killed.code == -signal.SIGKILL and first.code in (1, -signal.SIGABRT)
    line = first.error_lines()[0]
    assert name in line and "the same command resumes from the last checkpoint" in line, first.err
    assert not (tmp_path / "sft-tiny" / "summary.json").exists()

    first, second = run_pair("resume", tmp_path)
    assert first.code == second.code == 70 and "sft-tiny: resuming from step 2" in first.out
    undisturbed = pair.runs / "sft-tiny"
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "sft-tiny" / file).read_bytes() == (undisturbed / file).read_bytes()
    arrays = last_arrays(tmp_path / "sft-tiny")
    assert len(arrays) > 20 and arrays == last_arrays(undisturbed)
    (line,) = first.error_lines()
    assert line.startswith(f"alignjax: {name}: unforeseen ValueError: a crash at ")
    assert second.error_lines() == [] and "Traceback" not in first.err + second.err
    (file,) = (tmp_path / "crashed" / "sft-tiny").glob("error-*.txt")
    assert line.endswith(f"; the traceback is in {file}")
    assert "ValueError: a crash" in file.read_text()


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server of a machine that must stop after the second look."""

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        requests = self.server.requests
        requests.append(self.path.removeprefix("/computeMetadata/v1/instance/"))
        must_stop = len(requests) >= 4
        answers = {
            "preempted": "FALSE",
            "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE" if must_stop else "NONE",
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answers[requests[-1]].encode())

    def log_message(self, *_):
        """Log nothing."""


def test_a_notice_of_the_machines_end_counts_as_a_sigterm(monkeypatch):
    notified = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        machine_signals.poll_metadata(host, notified.set, every=0.01)
        assert notified.is_set()
        assert server.requests == ["preempted", "maintenance-event"] * 2
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        notified.clear()
        with machine_signals.Signals() as signals:

            def announce_and_notify():
                signals.announce_end()
                notified.set()

            machine_signals.watch_for_preemption(announce_and_notify)
            assert notified.wait(60) and signals.received_anywhere()
        server.shutdown()
