"""Plans: for this machine's devices and for TPUs that are not here, and how a search chooses."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import pytest
from runs import ROOT

from alignjax import config as configs
from alignjax import plan
from alignjax.algorithms import ppo_plan
from alignjax.machine import sharding
from alignjax.models import families
from alignjax.planning import cost, plans, search, topologies
from alignjax.planning.chips import Chip
from alignjax.planning.work import device_bytes, repeated_bytes, work_of
from alignjax.weights import bases, roles

COMPILER = ROOT / ".venv" / "tpu-compiler"  # where run.sh installs it
LARGE_VOCABULARY = "--config.model.vocab_size=65536"
SMALL = [
    "--config.model.dtype=bfloat16",
    "--config.model.d_model=256",
    "--config.model.heads=4",
    "--config.model.kv_heads=4",
    "--config.model.head_size=64",
    "--config.model.d_ff=512",
    "--config.model.layers=3",
    "--config.model.max_length=512",
    "--config.data.max_length=256",
    "--config.model.remat=everything",
]
PLAN_FOR_TPU = """
import json, sys
from alignjax import plan
from alignjax.algorithms import ppo_plan
for arguments in json.loads(sys.argv[1]):
    print(plan.main([*arguments, "--json"]), file=sys.stderr)
"""


def run_plan(capsys, *arguments, code=0):
    """Run the command, check its exit code, and return what it prints."""
    assert plan.main(list(arguments)) == code
    return capsys.readouterr().out


def compile_each_program_once(monkeypatch):
    """Let plans of the same run share their compiled programs."""
    compiled = {}
    compile_program = cost.compile_program

    def compile_once(program):
        if program.name not in compiled:
            compiled[program.name] = compile_program(program)
        return compiled[program.name]

    monkeypatch.setattr(cost, "compile_program", compile_once)


def test_a_plan_has_every_program_of_ppo_and_its_verdict(capsys, monkeypatch):
    """On the devices that are here; then with a memory that is a byte smaller than its peak."""
    compile_each_program_once(monkeypatch)
    command = ["--config", "ppo.py:tiny", "--config.ppo.slots=4"]
    planned = json.loads(run_plan(capsys, *command, "--json"))
    names = [row["program"] for row in planned["rows"]]
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
    assert planned["fits"]
    assert planned["devices"] == jax.device_count()
    rows = dict(zip(names, planned["rows"], strict=True))
    for row in planned["rows"]:
        assert row["floor"] > 0
        assert row["peak"] >= row["arguments"] > 0
        assert row["logits"] is None
    floors = [row["calls"] * row["floor"] for row in planned["rows"]]
    assert planned["floor"] == pytest.approx(sum(floors))
    # Every token of eight prompts of two responses goes through each matrix; decoding repeats its
    # steps.
    assert rows["rollout: decode"]["flops"] > rows["rollout: prefill"]["flops"] > 0
    assert rows["policy gradient"]["flops"] > 2 * rows["scoring"]["flops"] / 4
    chip = Chip(memory=planned["peak"] * (1 - 1e-6), flops=1e9, bandwidth=1e9, link=1e9)
    monkeypatch.setattr(plans, "chip_of", lambda devices: chip)
    text = run_plan(capsys, *command, code=plan.DOES_NOT_FIT)
    assert f"does not fit: {planned['peak_of']} needs" in text
    assert "resident: policy" in text


def test_an_array_that_roles_share_counts_once():
    mesh = sharding.make_mesh(configs.Mesh(fsdp=1), jax.devices()[:1])
    layout = sharding.replicated(mesh)
    one = jax.ShapeDtypeStruct((4, 2), "float32", sharding=layout)
    other = jax.ShapeDtypeStruct((8,), "float32", sharding=layout)
    assert repeated_bytes({"policy": {"base": one}, "value": {"base": one}, "head": other}) == 32
    assert repeated_bytes([one, other]) == 0


def test_the_state_and_the_frozen_roles_are_resident():
    """By hand: float32 parameters and two moments of each trained role, a copy of the others."""
    config = configs.load("ppo.py:tiny")
    mesh = sharding.make_mesh(configs.Mesh(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        resident = work_of(config, mesh).resident
        frozen = roles.abstract_frozen(config.model, resident["policy"].params, "bfloat16", "host")
    model = config.model
    query_and_output = 2 * model.d_model * model.heads * model.head_size
    key_and_value = 2 * model.d_model * model.kv_heads * model.head_size
    attention_biases = (model.heads + 2 * model.kv_heads) * model.head_size
    feed_forward = 3 * model.d_model * model.d_ff
    norms = 2 * model.d_model
    layer = query_and_output + key_and_value + attention_biases + feed_forward + norms
    embedding = model.vocab_size * model.d_model
    body = model.layers * layer + embedding + model.d_model
    policy = body + embedding
    value = body + model.d_model + 1
    size = {name: device_bytes(tree) for name, tree in resident.items()}
    assert size["reference"] == 4 * policy
    assert size["reward"] == 4 * value
    counters = 3 * 4
    assert size["policy"] == 12 * policy + counters
    assert size["value"] == 12 * value + counters
    with jax.set_mesh(mesh):
        work = work_of(configs.load("grpo.py:tiny"), mesh)
    without_value = {name: device_bytes(tree) for name, tree in work.resident.items()}
    roles_and_experience = {"policy", "reference", "reward", "experience"}
    assert set(without_value) == roles_and_experience
    assert all(without_value[name] == size[name] for name in roles_and_experience - {"experience"})
    assert set(work.saved) == {"policy", "stats"}
    assert not any("value" in program.name for program in work.programs)
    assert device_bytes(frozen) == 0  # it is in the host's memory


@pytest.mark.parametrize(
    "batch, samples, slots, response_length, turns, steps",
    [(8, 2, 0, 14, 0, 13), (8, 2, 4, 14, 8, 7), (256, 2, 64, 1024, 64, 128)],
)
def test_a_rollout_decodes_all_tokens_of_all_slots(
    batch, samples, slots, response_length, turns, steps
):
    config = configs.load("ppo.py:tiny")
    config.data.batch = batch
    config.ppo = dataclasses.replace(
        config.ppo, samples_per_prompt=samples, slots=slots, response_length=response_length
    )
    loops = ppo_plan.rollout_loops(config)
    assert (loops.turns, loops.steps) == (turns, steps)
    longest = config.data.max_length + response_length
    filled = longest - response_length / 2
    assert loops.filled == pytest.approx(filled / (128 * math.ceil(longest / 128)))


def test_known_models_of_the_hub_are_planned_without_asking_it():
    assert plan.architecture("hf://Qwen/Qwen-14B") == families.PRESETS["qwen-14b"]
    assert plan.architecture("hf://Qwen/Qwen-1_8B@main") == families.PRESETS["qwen-1.8b"]
    assert plan.architecture("hf://Qwen/Qwen2.5-0.5B") == families.PRESETS["qwen2.5-0.5b"]
    llama = plan.architecture("hf://meta-llama/Llama-3.1-8B-Instruct")
    assert llama == families.PRESETS["llama3.1-8b"]


def test_a_known_model_in_a_directory_that_is_not_here_can_be_planned():
    spec = "models/gemma-3-4b-it-text"
    assert plan.architecture(spec) == families.PRESETS["gemma3-4b"]
    assert bases.planned_base(spec, "lm", configs.Lora(rank=16)) == spec


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v5e", "a colon and a slice, such as v5e:4x4"),
        ("v7:2x2", "must be v5e, v6e, v4, v5, h100, h200, a100, a colon and a slice"),
        ("v5e:3x5x7", "the TPU compiler knows no such slice"),
    ],
)
def test_an_unknown_topology_is_reported_in_one_line(topology, message, capsys, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: True)

    def reject(**_):
        raise ValueError("INVALID_ARGUMENT: no such thing\nand more")

    monkeypatch.setattr(topologies.jax_topologies, "get_topology_desc", reject)
    assert plan.main(["--config", "lm.py", "--topology", topology]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_tpu_cannot_be_planned_without_its_compiler(capsys, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    assert plan.main(["--config", "lm.py", "--topology", "v5e:2x2"]) == 2
    assert "pip install 'alignjax[plan]'" in capsys.readouterr().err


def plan_without_compiling(config, topology, stop=False):
    """Make up a plan of one program.

    The smaller the microbatch, the slower it is; without rematerialisation it does not fit; it is
    the fastest with tensor 2.
    """
    mesh = dataclasses.asdict(config.mesh)
    remat = config.model.remat
    tokens = config.microbatch_tokens
    row = cost.ProgramCost(
        program="it",
        calls=1,
        seconds=0.0,
        arguments=0.0,
        temporaries=0.0,
        peak=0.0,
        fits=True,
        logits=None,
    )
    return plans.Estimate(
        topology=topology,
        mesh=mesh,
        remat=remat,
        microbatch_tokens=tokens,
        rollout_tensor=config.ppo.rollout_tensor,
        memory=16.0,
        rows=[row],
        peak=20.0 if remat == "nothing" else tokens / 1000,
        peak_of="it",
        floor=10 / tokens + abs(mesh["tensor"] - 2) + (remat == "everything"),
        fits=remat != "nothing" and tokens <= 8192,
    )


def bound_without_compiling(config, topology, fits=None):
    """Make up a lower bound, which fits if there is one copy of the state, or as `fits` says."""
    if fits is None:
        fits = config.mesh.data == 1
    planned = plan_without_compiling(config, topology)
    return dataclasses.replace(planned, fits=fits, rows=[], floor=float("inf"))


def test_a_search_takes_the_fastest_plan_that_fits(monkeypatch, capsys):
    monkeypatch.setattr(plans, "make_plan", plan_without_compiling)
    monkeypatch.setattr(plans, "lower_bound", bound_without_compiling)
    config = configs.load("ppo.py:tiny", {"microbatch_tokens": "4096"})
    config.model.remat = "everything"
    tried = search.search(config, "")
    best = tried[0]
    if jax.device_count() == 8:
        assert best.mesh == {"data": 1, "fsdp": 4, "tensor": 2}
    assert (best.remat, best.microbatch_tokens, best.fits) == ("dots", 8192, True)
    fitting = [estimate.fits for estimate in tried]
    assert fitting == sorted(fitting, reverse=True)
    never_compiled = [estimate for estimate in tried if estimate.mesh["data"] > 1]
    assert all(estimate.rows == [] for estimate in never_compiled)
    assert capsys.readouterr().err.count("\n") == len(tried)


def test_a_search_without_a_result_prints_valid_json(monkeypatch, capsys):
    def never_fits(config, topology):
        return bound_without_compiling(config, topology, fits=False)

    monkeypatch.setattr(plans, "lower_bound", never_fits)
    command = ["--config", "ppo.py:tiny", "--search", "--json"]
    text = run_plan(capsys, *command, code=plan.DOES_NOT_FIT)
    tried = json.loads(text, parse_constant=pytest.fail)
    assert all(not estimate["fits"] and estimate["floor"] is None for estimate in tried)


def test_a_search_without_a_slice_ends_at_the_smallest_that_holds_the_run(monkeypatch):
    tried = []
    one_device = jax.devices()[:1]

    def needs_sixteen(config, topology):
        tried.append(topology)
        return bound_without_compiling(config, topology, fits=topology == "v5e:4x4")

    monkeypatch.setattr(search, "devices_of", lambda topology: one_device)
    monkeypatch.setattr(plans, "make_plan", plan_without_compiling)
    monkeypatch.setattr(plans, "lower_bound", needs_sixteen)
    config = configs.load("ppo.py:tiny", {"model.remat": "dots", "ppo.rollout_tensor": "8"})
    assert search.search(config, "v5e")[0].topology == "v5e:4x4"
    assert set(tried) == {"v5e:2x2", "v5e:2x4", "v5e:4x4"}
    assert config.ppo.rollout_tensor == 8  # the search's own config has 1, for one device


def decode_objects(text):
    """Yield the JSON objects that a text holds one after the other."""
    decoder = json.JSONDecoder()
    text = text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        yield value
        text = text[end:].lstrip()


def plan_for_tpu(runs):
    """Return the plans of these command lines, made by a process that has the TPU compiler."""
    # XLA_FLAGS and the cache of compiled programs are meant for the tests' CPU devices.
    for_cpu = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in for_cpu}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{COMPILER}:{ROOT}"}
    command_lines = json.dumps([[*run, "--topology", "v5:2x2x2"] for run in runs])
    done = subprocess.run(
        [sys.executable, "-c", PLAN_FOR_TPU, command_lines],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(decode_objects(done.stdout))


def test_a_variant_of_each_stage_compiles_for_a_tpu_that_is_not_here():
    """With splash attention, no array of tokens x vocabulary, and a rollout that moves little."""
    if not (COMPILER / "libtpu").exists():
        pytest.skip("needs libtpu, the TPU compiler, which tests/run.sh installs")
    rollout = [
        "--config.data.batch=32",
        "--config.ppo.response_length=256",
        "--config.ppo.slots=32",
        "--config.ppo.rollout_tensor=4",
    ]
    runs = [
        # A small vocabulary compiles faster. With the large one, the same loss is PPO's
        # pretraining gradient.
        ["--config", "lm.py", *SMALL, "--config.model.vocab_size=4096"],
        ["--config", "rm.py", *SMALL, LARGE_VOCABULARY],
        ["--config", "ppo.py", *SMALL, LARGE_VOCABULARY, *rollout],
    ]
    planned = plan_for_tpu(runs)
    assert [run["name"] for run in planned] == ["lm", "rm", "ppo"]
    assert all(run["fits"] and run["kind"] == "TPU v5" for run in planned)
    for run in planned:
        assert all(row["logits"] is None and row["floor"] > 0 for row in run["rows"])
    rows = {row["program"]: row for row in planned[2]["rows"]}
    assert rows["layout of the rollout"]["sent"] > 0  # from fsdp 8 to data 2, tensor 4
    # A decode step reads a device's share of all matrices and of the cache, and a few times the
    # logits of all slots. It would read far more if every layer copied the cache, or if the
    # parameters were gathered.
    attention = 4 * 256 * 256
    feed_forward = 3 * 256 * 512
    matrices = 2 * (3 * (attention + feed_forward) + 65536 * 256) / 4
    cache = 3 * 2 * 32 * 4 * 64 * 2 * (256 + 256) / 8
    logits = 4 * 32 * 65536 / 2
    steps = 255 * 2
    moved = rows["rollout: decode"]["moved"] / steps
    assert matrices + cache / 2 < moved < 2 * (matrices + cache) + 8 * logits
