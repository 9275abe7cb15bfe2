"""Plans for GPUs that are not here, by the CUDA compiler, and what leaves a host."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT

from alignjax.config import UserError
from alignjax.planning import gpus, topologies
from alignjax.planning.hlo import parse_module
from alignjax.planning.traffic import count_traffic, device_groups

# Where run.sh installs the compilers, in .venv -> a package of each.
COMPILERS = {"gpu-compiler": "jax_cuda12_plugin", "tpu-compiler": "libtpu"}
PLAN = """
import json, sys
from alignjax import plan
for arguments in json.loads(sys.argv[1]):
    print(plan.main([*arguments, "--json"]), file=sys.stderr)
"""
SMALL = [
    "--config.model.dtype=bfloat16",
    "--config.model.d_model=256",
    "--config.model.heads=4",
    "--config.model.kv_heads=4",
    "--config.model.head_size=64",
    "--config.model.d_ff=512",
    "--config.model.layers=2",
    "--config.model.vocab_size=16384",
    "--config.model.max_length=256",
    "--config.data.max_length=128",
    "--config.model.remat=everything",
    "--config.ppo.response_length=64",
    "--config.microbatch_tokens=256",
]
# Prints, for programs that read rows, the kernels of attention that they call and their arrays with
# two axes as long as a row.
SQUARES = """
import json, sys
import jax
from alignjax import config as configs
from alignjax.config.overrides import parse_overrides
from alignjax.machine import sharding
from alignjax.planning import cost, hlo, topologies, work

devices = topologies.devices_of("h100:1")
config = configs.load("ppo.py", parse_overrides(json.loads(sys.argv[1])))
mesh = sharding.make_mesh(config.mesh, devices)
row = config.data.max_length + config.ppo.response_length
with jax.set_mesh(mesh):
    for program in work.work_of(config, mesh).programs:
        if program.name in ("scoring", "policy gradient"):
            text = cost.compile_program(program)[1].as_text()
            arrays = hlo.parse_module(text).arrays()
            squares = sorted({sizes for _, sizes in arrays if sizes.count(row) > 1})
            kernels = [name for name in ("mha_forward", "mha_backward") if name in text]
            print(json.dumps([program.name, kernels, squares]))
"""
MODULE = """
HloModule m

ENTRY %main (x: f32[1024]) -> f32[4096] {{
  %x = f32[1024]{{0}} parameter(0)
  ROOT %all-gather = f32[4096]{{0}} all-gather(%x), channel_id=1, {groups}, dimensions={{0}}
}}
"""


def run_with_compiler(program, words, compiler="gpu-compiler"):
    """Return what a program prints that has the CUDA compiler, or another one."""
    path = ROOT / ".venv" / compiler
    if not (path / COMPILERS[compiler]).exists():
        pytest.skip(f"needs {compiler}, which tests/run.sh installs")
    # XLA_FLAGS and the cache of compiled programs are meant for the tests' CPU devices.
    for_cpu = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in for_cpu}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": f"{path}:{ROOT}",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(words)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def plans_of(command_lines):
    """Return the plans of these command lines."""
    text = run_with_compiler(PLAN, command_lines)
    return [json.loads(plan) for plan in text.replace("}\n{", "}\0{").split("\0")]


def test_a_run_compiles_for_gpus_that_are_not_here():
    """PPO on two of them; a language model on two hosts, whose gradients cross a network."""
    ppo, lm = plans_of(
        [
            ["--config", "ppo.py", *SMALL, "--topology", "h100:2"],
            ["--config", "lm.py", *SMALL, "--topology", "h100:2x1"],
        ]
    )
    assert ppo["kind"] == lm["kind"] == "NVIDIA H100 80GB HBM3"
    assert ppo["devices"] == lm["devices"] == 2
    assert ppo["fits"] and lm["fits"]
    for row in ppo["rows"]:
        assert row["logits"] is None
        assert row["peak"] >= row["arguments"] > 0
        assert row["bound"] != "network"
    gradient = next(row for row in lm["rows"] if row["program"] == "gradient")
    assert gradient["bound"] == "network"
    assert gradient["floor"] == pytest.approx(gradient["sent"] / 50e9)


def test_a_packed_row_on_an_h100_makes_no_array_of_its_tokens_squared():
    """Scoring and the policy's gradient call the kernels that read segments themselves."""
    lines = run_with_compiler(SQUARES, SMALL).splitlines()
    assert [json.loads(line) for line in lines] == [
        ["scoring", ["mha_forward"], []],
        ["policy gradient", ["mha_forward", "mha_backward"], []],
    ]


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4], device_ids=([2,2]T(1,0)) {'a':(2)2}", [[0, 2], [1, 3]]),
        ("dimensions={0}", [[0, 1, 2, 3]]),
    ],
)
def test_the_groups_of_a_collective_are_read(attributes, groups):
    devices = 1 + max(max(group) for group in groups)
    assert device_groups(attributes, devices) == groups


@pytest.mark.parametrize(
    ("groups", "share"),
    [
        ("replica_groups={{0,1,2,3}}", 1 / 3),  # two hosts of two: one of three parts comes over
        ("replica_groups={{0,1},{2,3}}", 0),
        ("replica_groups={{0,2},{1,3}}", 1),
    ],
)
def test_what_leaves_a_host_is_the_least_that_has_to(groups, share):
    module = parse_module(MODULE.format(groups=groups))
    traffic = count_traffic(module, hosts=(0, 0, 1, 1))
    assert traffic.sent == 3 * 4096
    assert traffic.network == pytest.approx(share * traffic.sent)
    assert count_traffic(module).network == 0  # the same links everywhere


@pytest.mark.parametrize("size", ["0", "8x", "x8", "2x4x4", "all", "16", "-1"])
def test_a_number_of_gpus_that_is_none_is_refused(size):
    with pytest.raises(UserError, match=f"--topology h100:{size}: "):
        topologies.devices_of(f"h100:{size}")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(gpus, "PLUGINS", ("no_such_package.plugin",))
    with pytest.raises(UserError, match=r"pip install 'alignjax\[plan-gpu\]'"):
        topologies.devices_of("h100:8")
