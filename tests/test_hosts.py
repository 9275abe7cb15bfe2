"""Several processes are one run: one result, whatever their number; each reads its share; all end when one must."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from runs import PARENTS, ROOT, STEPS, command, cut, rows

from alignjax import train
from alignjax.data import files
from alignjax.machine import signals as machine_signals
from alignjax.weights import checkpoint

NAMES = ("sft-tiny", "rm-tiny", "ppo-tiny")  # one of each stage, from parents of one process
SCRIPT = """
import json, os, signal, sys, time
sys.path[:0] = ["tests", "."]
import conftest
from runs import act_in_step, command
from alignjax import train
from alignjax.machine import processes
from alignjax.data import files
from pathlib import Path
index, runs = int(sys.argv[1][-1]), Path(sys.argv[2])

def acting(step, act, *asked):  # a run in which process 1 acts at a step
    with act_in_step(step, act if index else lambda: None):
        return train.main(list(asked))

def crash():
    raise ValueError("a crash")

processes.start(sys.argv[1])
"""
# A file that is read; a run of each stage, the first after a SIGTERM to one process; what one process began; a bad row. PPO
# is from parents of one process, for from others that differ by a rounding a token comes out differently now and then.
CHAIN = """
read_row, parsed, said = files.read_row, [], []
files.read_row = lambda value, where, kind: parsed.append(where) or read_row(value, where, kind)
for name in ("text.jsonl", "text.parquet"):
    found = files.read(runs / name, "text", True, said.append)
    (runs / f"{name}-{index}").write_text(json.dumps([found, parsed, said]))
    parsed.clear()
files.read_row = read_row
assert acting(0, lambda: os.kill(os.getpid(), signal.SIGTERM), *command("sft-tiny", runs)) == 0
print("stopped", flush=True)
for name, where in (("sft-tiny", runs), ("rm-tiny", runs), ("ppo-tiny", runs / "same")):
    assert train.main(command(name, where)) == 0
assert train.main(command("rm-tiny", runs / "other")) == 0
train.main(command("lm-tiny", runs / "bad", f"--config.data.train={runs / 'text.jsonl'}"))
"""
KILLED = """
def die():
    while not (runs / "sft-tiny" / "checkpoints" / "2").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)

acting(2, die, *command("sft-tiny", runs))
"""
# What was killed goes on; then one process fails in the midst of a run.
AGAIN = """
assert train.main(command("sft-tiny", runs)) == 0
acting(1, crash, *command("pmp-tiny", runs))
"""


def pair(code: str, runs) -> list[tuple[int, str, list[str]]]:
    """(exit code, output, errors) of two processes with four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT + code, f"127.0.0.1:{port},2,{i}", str(runs)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    found = [None, None]

    def wait(i):
        out, err = both[i].communicate()
        found[i] = both[i].returncode, out, err

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(900)  # a hang
        for process in both if thread.is_alive() else ():
            process.kill()
    return found


def told(err: str) -> list[str]:
    """What alignjax itself says of errors."""
    return [line for line in err.splitlines() if line.startswith("alignjax: ")]


def texts(rows) -> list[dict]:
    """Rows of samples, or of evaluations with samples, less what is but alike."""
    flat = [entry for row in rows for entry in row.get("samples", [row])]
    alike = "score", "kl", "entropy", "log_ratio"
    return [{k: v for k, v in row.items() if not k.endswith(alike)} for row in flat]


def assert_alike(run, other):
    """Figures to rounding; texts, and so the order of the data, exactly.

    Adam makes a step of what rounding leaves of a gradient, so PPO's policy differs by more after its second update, and
    one of the tokens that it then draws may be another: of the last step only that it is about the same.
    """
    evaluated = ["evaluations.jsonl"] * (other.name == "ppo-tiny")
    for name in ("metrics.jsonl", *evaluated):
        for mine, theirs in zip(rows(run / name), rows(other / name), strict=True):
            assert mine.keys() == theirs.keys()
            drawn = other.name == "ppo-tiny" and mine["step"] == STEPS - 1
            for key in theirs.keys() - {"samples"}:
                near = (
                    {"rel": 0.1, "abs": 0.05}
                    if drawn
                    else {"rel": 1e-4, "abs": 1e-4 if "policy" in key else 1e-5}
                )
                assert mine[key] == pytest.approx(theirs[key], **near), key
    for name in ("samples.jsonl", *evaluated):
        assert texts(rows(run / name)) == texts(rows(other / name))


@pytest.fixture(scope="module")
def shared(chain, tmp_path_factory):
    """(directory of the runs, what the two processes of CHAIN came to)."""
    runs = tmp_path_factory.mktemp("hosts")
    values = [{"text": f"cat {i}"} for i in range(9)]
    values[3], values[6] = {"text": 3}, {"texts": ""}
    files.pyarrow.parquet.write_table(
        files.pyarrow.Table.from_pylist(values[:3] + [{}] + values[4:]), runs / "text.parquet"
    )
    (runs / "text.jsonl").write_text("\n" + "\n".join(map(json.dumps, values)))
    for where, name in (
        ("", "sft-tiny"),
        ("", "rm-tiny"),
        ("other", "rm-tiny"),
        ("same", "ppo-tiny"),
    ):
        for parent in PARENTS[name]:
            shutil.copytree(chain[0] / parent, runs / where / parent)
    cut(chain[0] / "rm-tiny", runs / "other" / "rm-tiny")
    return runs, pair(CHAIN, runs)


def test_each_process_parses_its_share_and_all_get_the_whole(shared):
    runs, _ = shared
    for name in ("text.jsonl", "text.parquet"):
        said, parsed = [], []
        alone = files.read(runs / name, "text", True, said.append)
        for i in range(2):
            found, mine, heard = json.loads((runs / f"{name}-{i}").read_text())
            assert found == alone and said == heard[-1:]
            parsed.append(set(mine))
        assert (
            len(parsed[0]) in (4, 5)
            and len(parsed[0] | parsed[1]) == len(parsed[0]) + len(parsed[1]) == 9
        )


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_result_of_one(name, shared, chain):
    where = "same" if name == "ppo-tiny" else ""
    assert_alike(shared[0] / where / name, chain[0] / name)


def test_a_sigterm_to_one_process_saves_in_all_and_the_run_goes_on(shared):
    (_, out, err), (_, other, silent) = shared[1]
    assert (
        told(err)[0] == "alignjax: SIGTERM: sft-tiny saved at step 2 of 4; the same command goes on"
    )
    assert "sft-tiny: goes on from step 2" in out.partition("stopped\n")[2] and "stopped\n" in other
    assert "sft-tiny" not in other and told(silent) == []  # the first process alone prints


def test_a_run_goes_on_with_other_processes_and_another_mesh(shared, chain, tmp_path, capsys):
    """From one process to two, and back."""
    assert_alike(shared[0] / "other" / "rm-tiny", chain[0] / "rm-tiny")
    assert "rm-tiny: goes on from step 2" in shared[1][0][1]
    for parent in PARENTS["rm-tiny"]:
        shutil.copytree(shared[0] / parent, tmp_path / parent)
    cut(shared[0] / "rm-tiny", tmp_path / "rm-tiny")
    assert train.main(command("rm-tiny", tmp_path, "--config.mesh.tensor=2")) == 0
    assert "rm-tiny: goes on from step 2" in capsys.readouterr().out
    assert_alike(tmp_path / "rm-tiny", chain[0] / "rm-tiny")


def test_a_bad_row_is_the_same_error_in_all(shared):
    """Both have one in their share; the first of the file counts."""
    (code, _, err), (other, _, silent) = shared[1]
    assert code == other == 2 and told(silent) == []
    assert told(err)[1:] == [
        f"alignjax: {shared[0]}/text.jsonl:5: text: expected text, found int: 3; "
        'data.on_bad_row="skip" leaves such rows out'
    ]


def arrays(run) -> dict:
    """Every array of the last checkpoint, by whichever processes it was saved."""
    out = {}
    for item in (run / "checkpoints" / str(STEPS)).iterdir():
        if (item / "_METADATA").exists():
            with checkpoint.ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(item).item_metadata.tree
                how = jax.tree.map(
                    lambda _: checkpoint.ocp.RestoreArgs(restore_type=np.ndarray), tree
                )
                found = reader.restore(
                    item, args=checkpoint.ocp.args.PyTreeRestore(restore_args=how)
                )
            for path, x in jax.tree_util.tree_leaves_with_path(found):
                out[item.name + jax.tree_util.keystr(path)] = np.asarray(x).tobytes()
    return out


def test_a_process_that_is_gone_or_fails_ends_all_and_both_go_on_exactly(shared, tmp_path):
    shutil.copytree(shared[0] / "lm-tiny", tmp_path / "lm-tiny")
    (code, _, err), (killed, _, _) = pair(KILLED, tmp_path)
    name = f"process 1 on {socket.gethostname()}"
    assert killed == -signal.SIGKILL and code in (
        1,
        -signal.SIGABRT,
    )  # the latter where jax's heartbeats end it
    assert (
        name in told(err)[0] and "the same command resumes from the last checkpoint" in told(err)[0]
    ), err
    assert not (tmp_path / "sft-tiny" / "summary.json").exists()
    (code, out, err), (other, _, traceback) = pair(AGAIN, tmp_path)
    assert code == other == 1 and "sft-tiny: goes on from step 2" in out
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "sft-tiny" / file).read_bytes() == (
            shared[0] / "sft-tiny" / file
        ).read_bytes()
    mine = arrays(tmp_path / "sft-tiny")
    assert len(mine) > 20 and mine == arrays(shared[0] / "sft-tiny")
    assert told(err) == [f"alignjax: {name}: ValueError: a crash"]
    assert "ValueError: a crash" in traceback


def test_a_notice_of_the_machines_end_counts_as_a_sigterm(monkeypatch):
    asked, told = [], threading.Event()

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            asked.append(self.path.removeprefix("/computeMetadata/v1/instance/"))
            answers = {
                "preempted": "FALSE",
                "maintenance-event": "NONE" if len(asked) < 4 else "TERMINATE_ON_HOST_MAINTENANCE",
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[asked[-1]].encode())

        def log_message(self, *what):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        machine_signals.poll_metadata(f"127.0.0.1:{server.server_port}", told.set, every=0.01)
        assert told.is_set() and asked == ["preempted", "maintenance-event"] * 2
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        signals = machine_signals.Signals()
        machine_signals.watch_for_preemption(lambda: (signals.remember(signal.SIGTERM), told.set()))
        told.clear()
        assert told.wait(60) and signals.received_anywhere()
        server.shutdown()
