"""Several processes are one run: one result, whatever their number."""

import os
import shutil
import subprocess
import sys

import pytest
from runs import ROOT, command, rows


def test_two_processes_give_the_result_of_one(chain, tmp_path):
    """Of every kind of stage: each process has the whole batch, its devices their rows; the mesh spans both."""
    runs = tmp_path
    for parent in ("pmp-tiny", "sft-tiny"):
        shutil.copytree(chain[0] / parent, runs / parent)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    }
    for name in ("lm-tiny", "rm-tiny", "ppo-tiny"):
        asked = [sys.executable, "-m", "alignjax.train", *command(name, runs, "--config.mesh.data=2")]
        port = 20000 + os.getpid() % 20000
        both = [subprocess.Popen([*asked, f"--distributed=127.0.0.1:{port},2,{i}"], cwd=ROOT, env=environment,
                                 stderr=subprocess.PIPE, text=True) for i in range(2)]  # fmt: skip
        for process in both:
            errors = process.communicate()[1]
            assert process.returncode == 0, errors
        for mine, alone in zip(
            rows(runs / name / "metrics.jsonl"), rows(chain[0] / name / "metrics.jsonl"), strict=True
        ):
            for key, value in alone.items():
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
        texts = [[{k: v for k, v in row.items() if "score" not in k and k != "kl" and k != "entropy"} for row in rows(path)]
                 for path in (runs / name / "samples.jsonl", chain[0] / name / "samples.jsonl")]  # fmt: skip
        assert texts[0] == texts[1]
