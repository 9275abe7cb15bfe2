"""benchmarks/gpu.py runs everywhere at a tiny size, and survives a section that fails."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu


def test_sections_run_apart_and_the_last_line_is_json():
    """Two of them, on one device: the tiny sizes divide over few."""
    sections = ["learn 0.5b", "attention"]
    script = str(ROOT / "benchmarks" / "gpu.py")
    command = [sys.executable, script, "--tiny", "--limit", "300", "--sections", ",".join(sections)]
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["sections"]
    assert list(results) == sections
    assert not any("failed" in figures for figures in results.values()), results
    assert results["learn 0.5b"]["update_tflops"] > 0
    assert list(results["attention"]) == ["xla", "section_s"]


def test_a_section_that_fails_or_takes_too_long_is_a_line():
    python = sys.executable
    late = gpu.run_apart([python, "-c", "import time; time.sleep(60)"], limit=0.5)
    assert late == {"failed": "not done after 0.5 s"}
    broken = gpu.run_apart([python, "-c", "raise ValueError('out of memory')"], limit=60)
    assert broken == {"failed": "exit code 1: ValueError: out of memory"}
    fine = gpu.run_apart([python, "-c", "print('a line'); print('{\"s\": 3}')"], limit=60)
    assert fine["s"] == 3 and fine["section_s"] > 0


def test_a_peer_is_its_median_iteration_or_what_went_wrong():
    line = "trl_ppo tiny seconds_per_iteration [3.5, 1.5, 2.0] response_tokens_per_s 9"
    peer = gpu.peer_iteration([sys.executable, "-c", f"print({line!r})"], limit=60)
    assert peer == {"s": 2.0, "iterations": 3}
    silent = gpu.peer_iteration([sys.executable, "-c", "print('nothing')"], limit=60)
    assert silent == {"failed": "no iteration was printed"}
    assert "No such file" in gpu.peer_iteration(["/no/such/python"], limit=60)["failed"]


def test_the_table_leaves_out_what_failed():
    failed = {"failed": "not done after 60 s"}
    results = dict.fromkeys(gpu.SECTIONS, failed)
    assert gpu.shares(results) == gpu.shares({}) == {}
    results["card"] = {"tflops": 700.0, "gb_per_s": 2500.0}
    results["decode 1.8b"] = {"ms": 5.0, "gb": 10.0, "launches_a_layer": 14.5}
    results["learn 0.5b"] = {"scoring_tflops": 350.0, "update_tflops": 280.0}
    rows = gpu.shares(results)
    assert rows["decode step 1.8b, of the bandwidth"] == pytest.approx(0.8)
    assert rows["scoring 0.5b, of the rate"] == pytest.approx(0.5)
    assert rows["update 0.5b, of the rate"] == pytest.approx(0.4)
    assert len(rows) == 5


@pytest.mark.parametrize("name", ["0.5b", "1.8b"])
def test_the_shapes_are_those_of_the_table(name):
    shape = gpu.shape_of(name, tiny=False)
    assert shape.model.dtype == "bfloat16"
    assert shape.rows * shape.width == 32768
    assert shape.microbatch_tokens % shape.width == 0


def test_bfloat16_is_compared_with_float32():
    figures = gpu.exactness(gpu.shape_of("0.5b", tiny=True))
    assert figures["holds"]
    assert 0 < figures["logprob_mean"] < figures["logprob_max"] < 0.1
