"""Plans: what they say of a run, of this machine's devices and of TPUs that aren't here, and how a search chooses."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
from runs import ROOT

from alignjax import config as configs
from alignjax import plan
from alignjax.algorithms import ppo_programs, shapes
from alignjax.machine import sharding
from alignjax.models import families
from alignjax.planning import cost
from alignjax.weights import roles

COMPILER = ROOT / ".venv" / "tpu-compiler"  # where run.sh has put it
SMALL = [
    "--config.model.dtype=bfloat16",
    "--config.model.d_model=256",
    "--config.model.heads=4",
    "--config.model.kv_heads=4",
    "--config.model.head_size=64",
    "--config.model.d_ff=512",
    "--config.model.layers=3",
    "--config.model.vocab_size=65536",
    "--config.model.max_length=512",
    "--config.data.max_length=256",
    "--config.model.remat=everything",
]
TPU = """
import json, sys
from alignjax import plan
for arguments in json.loads(sys.argv[1]):
    print(plan.main([*arguments, "--json"]), file=sys.stderr)
"""


def planned(capsys, *arguments, code=0):
    assert plan.main(list(arguments)) == code
    return capsys.readouterr().out


def test_a_plan_has_every_program_of_ppo_and_its_verdict(capsys, monkeypatch):
    """On the devices that are here; then with a memory that is a byte smaller than its peak."""
    found = json.loads(planned(capsys, "--config", "ppo.py:tiny", "--config.ppo.slots=4", "--json"))
    names = [row["program"] for row in found["rows"]]
    assert names == [
        "rollout: prefill",
        "rollout: decode",
        "scoring",
        "experience",
        "value gradient",
        "value step",
        "policy gradient",
        "pretraining gradient",
        "policy step",
    ]
    assert found["fits"] and found["devices"] == jax.device_count()
    rows = dict(zip(names, found["rows"], strict=True))
    assert all(
        row["floor"] > 0 and row["peak"] >= row["arguments"] > 0 and row["logits"] is None
        for row in found["rows"]
    )
    assert found["floor"] == pytest.approx(
        sum(row["calls"] * row["floor"] for row in found["rows"])
    )
    # Every token of eight prompts of two responses goes through each matrix; decoding repeats its steps.
    assert rows["rollout: decode"]["flops"] > rows["rollout: prefill"]["flops"] > 0
    assert rows["policy gradient"]["flops"] > 2 * rows["scoring"]["flops"] / 4
    chip = cost.Chip(found["peak"] * (1 - 1e-6), 1e9, 1e9, 1e9)
    monkeypatch.setattr(cost, "measured", lambda devices: chip)
    text = planned(
        capsys, "--config", "ppo.py:tiny", "--config.ppo.slots=4", code=plan.DOES_NOT_FIT
    )
    assert f"does not fit: {found['peak_of']} needs" in text and "resident: policy" in text


def test_what_is_resident_is_the_state_and_the_frozen_roles():
    """By hand: float32 parameters and two moments of what is trained, a copy of what is not."""
    config = configs.load("ppo.py:tiny")
    mesh = sharding.make_mesh(configs.Mesh(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        work = shapes.WORK["ppo"](config, mesh)
        frozen = roles.abstract_frozen(work.resident["policy"].params, "bfloat16", "host")
    m = config.model
    layer = (
        4 * m.d_model * m.heads * m.head_size - 2 * m.d_model * (m.heads - m.kv_heads) * m.head_size
    )
    layer += 3 * m.d_model * m.d_ff + (m.heads + 2 * m.kv_heads) * m.head_size + 2 * m.d_model
    body = m.layers * layer + m.vocab_size * m.d_model + m.d_model
    policy, value = body + m.vocab_size * m.d_model, body + m.d_model + 1
    size = {name: cost.device_bytes(tree) for name, tree in work.resident.items()}
    assert size["reference"] == 4 * policy and size["reward"] == 4 * value
    assert (
        size["policy"] == 12 * policy + 3 * 4 and size["value"] == 12 * value + 3 * 4
    )  # and three counters
    assert cost.device_bytes(frozen) == 0  # it is in the host's memory


@pytest.mark.parametrize(
    "b, samples, slots, r, turns, steps",
    [(8, 2, 0, 14, 0, 13), (8, 2, 4, 14, 8, 7), (256, 2, 64, 1024, 64, 128)],
)
def test_a_rollout_decodes_all_tokens_of_all_slots(b, samples, slots, r, turns, steps):
    config = configs.load("ppo.py:tiny")
    config.data.batch = b
    config.ppo = dataclasses.replace(
        config.ppo, samples_per_prompt=samples, slots=slots, response_length=r
    )
    assert ppo_programs.rollout_loops(config) == (turns, steps)


def test_the_hubs_known_models_are_planned_without_it():
    assert plan.architecture("hf://Qwen/Qwen-14B") == families.PRESETS["qwen-14b"]
    assert plan.architecture("hf://Qwen/Qwen-1_8B@main") == families.PRESETS["qwen-1.8b"]
    assert plan.architecture("hf://Qwen/Qwen2.5-0.5B") == families.PRESETS["qwen2.5-0.5b"]


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v5e", "a colon and a slice wanted, such as v5e:4x4"),
        ("v7:2x2", "v5e, v6e, v4, v5, a colon and a slice wanted"),
        ("v5e:3x5x7", "the TPU compiler knows no such slice"),
    ],
)
def test_a_topology_that_is_none_is_one_line(topology, message, capsys, monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: True)

    def none(**_):
        raise ValueError("INVALID_ARGUMENT: no such thing\nand more")

    monkeypatch.setattr(plan.topologies, "get_topology_desc", none)
    assert plan.main(["--config", "lm.py", "--topology", topology]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_without_its_compiler_a_tpu_cannot_be_planned(capsys, monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert plan.main(["--config", "lm.py", "--topology", "v5e:2x2"]) == 2
    assert "pip install 'alignjax[plan]'" in capsys.readouterr().err


def fake(config, topology, stop=False):
    """A plan without a compiler: the smaller the microbatch the slower; without remat too much; tensor 2 the fastest."""
    mesh, tokens = dataclasses.asdict(config.mesh), config.microbatch_tokens
    return {
        "topology": topology,
        "mesh": mesh,
        "rollout_tensor": config.ppo.rollout_tensor,
        "remat": config.model.remat,
        "microbatch_tokens": tokens,
        "rows": [{}],
        "memory": 16.0,
        "peak": 20.0 if config.model.remat == "nothing" else tokens / 1000,
        "peak_of": "it",
        "fits": config.model.remat != "nothing" and tokens <= 8192,
        "floor": 10 / tokens + abs(mesh["tensor"] - 2) + (config.model.remat == "everything"),
    }


def bound(config, topology):
    return fake(config, topology) | {
        "fits": config.mesh.data == 1,
        "rows": [],
        "floor": float("inf"),
    }


def test_a_search_takes_the_fastest_that_fits(monkeypatch, capsys):
    monkeypatch.setattr(plan, "plan", fake)
    monkeypatch.setattr(plan, "lower_bound", bound)
    config = configs.load("ppo.py:tiny", {"microbatch_tokens": "4096"})
    config.model.remat = "everything"
    found = plan.search(config, "")
    if jax.device_count() == 8:
        assert found[0]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert (found[0]["remat"], found[0]["microbatch_tokens"], found[0]["fits"]) == (
        "dots",
        8192,
        True,
    )
    assert [x["fits"] for x in found] == sorted((x["fits"] for x in found), reverse=True)
    assert all(x["rows"] == [] for x in found if x["mesh"]["data"] > 1)  # those were never compiled
    assert capsys.readouterr().err.count("\n") == len(found)


def test_a_search_that_finds_nothing_is_valid_json(monkeypatch, capsys):
    monkeypatch.setattr(
        plan, "lower_bound", lambda config, topology: bound(config, topology) | {"fits": False}
    )
    config = ["--config", "ppo.py:tiny", "--search"]
    found = json.loads(
        planned(capsys, *config, "--json", code=plan.DOES_NOT_FIT), parse_constant=pytest.fail
    )
    assert all(not x["fits"] and x["floor"] is None for x in found)


def test_a_search_without_a_slice_ends_at_the_smallest_that_holds_the_run(monkeypatch):
    tried, devices = [], jax.devices()[:1]

    def needs_sixteen(config, topology):
        tried.append(topology)
        return bound(config, topology) | {"fits": topology == "v5e:4x4"}

    monkeypatch.setattr(plan, "devices_of", lambda topology: devices)
    monkeypatch.setattr(plan, "plan", fake)
    monkeypatch.setattr(plan, "lower_bound", needs_sixteen)
    config = configs.load("ppo.py:tiny", {"model.remat": "dots", "ppo.rollout_tensor": "8"})
    assert plan.search(config, "v5e")[0]["topology"] == "v5e:4x4"
    assert (
        set(tried) == {"v5e:2x2", "v5e:2x4", "v5e:4x4"} and config.ppo.rollout_tensor == 8
    )  # of one device, 1


def test_a_variant_of_each_stage_compiles_for_a_tpu_that_is_not_here():
    """With splash attention, no array of tokens x vocabulary, and a rollout that moves about what it must."""
    if not (COMPILER / "libtpu").exists():
        pytest.skip("needs libtpu, the TPU compiler, which tests/run.sh installs")
    ppo = [
        "--config.data.batch=32",
        "--config.ppo.response_length=256",
        "--config.ppo.slots=32",
        "--config.ppo.rollout_tensor=4",
    ]
    runs = [
        ["--config", "lm.py", *SMALL],
        ["--config", "rm.py", *SMALL],
        ["--config", "ppo.py", *SMALL, *ppo],
    ]
    # XLA_FLAGS and the cache of compiled programs are for the tests' CPU devices.
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{COMPILER}:{ROOT}"}
    asked = json.dumps([[*run, "--topology", "v5:2x2x2"] for run in runs])
    done = subprocess.run(
        [sys.executable, "-c", TPU, asked], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    decoder, plans, rest = json.JSONDecoder(), [], done.stdout
    while rest.strip():
        found, end = decoder.raw_decode(rest.lstrip())
        plans.append(found)
        rest = rest.lstrip()[end:]
    assert [p["name"] for p in plans] == ["lm", "rm", "ppo"] and all(
        p["fits"] and p["kind"] == "TPU v5" for p in plans
    )
    assert all(row["logits"] is None and row["floor"] > 0 for p in plans for row in p["rows"])
    rows = {row["program"]: row for row in plans[2]["rows"]}
    assert rows["layout of the rollout"]["sent"] > 0  # from fsdp 8 to data 2, tensor 4
    # A step of decoding reads a device's share of all matrices and of the cache, and a few times the logits of all slots:
    # were the cache copied in every layer, or the parameters gathered, it would be far more.
    matrices = 2 * (3 * (4 * 256 * 256 + 3 * 256 * 512) + 65536 * 256) / 4
    cache = 3 * 2 * 32 * 4 * 64 * 2 * (256 + 256) / 8
    logits, steps = 4 * 32 * 65536 / 2, 255 * 2
    assert (
        matrices + cache / 2
        < rows["rollout: decode"]["moved"] / steps
        < 2 * (matrices + cache) + 8 * logits
    )
