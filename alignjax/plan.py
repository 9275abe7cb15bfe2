"""Compile a run for machines that one doesn't have: what it needs, what it costs, whether it fits.

python -m alignjax.plan --config qwen_14b/ppo.py --topology v5:2x2x2      for 8 TPU v5p chips; exit code 3 if it doesn't fit
python -m alignjax.plan --config qwen_7b/ppo.py --topology v5e --search   for the smallest slice of v5e that holds it
python -m alignjax.plan --config ppo.py                                     for the devices that are here

The functions are those that training runs, compiled from shapes alone: no weights, no data, no network. The TPU compiler
comes with `pip install alignjax[plan]` and needs no TPU. Every example is taken to be as long as it may be.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import time

import jax
from jax.experimental import topologies

from alignjax import config as configs
from alignjax.algorithms import shapes
from alignjax.config import Config, UserError
from alignjax.machine import jsonl, sharding
from alignjax.models import attention, families, vocabulary
from alignjax.planning import cost
from alignjax.planning.cost import GIB
from alignjax.runs import lineage
from alignjax.sampling.slots import plan_slots
from alignjax.weights import locations

DOES_NOT_FIT = 3
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


def main(argv=None) -> int:
    """The exit code: 0 if the run fits, 3 if not, 2 after a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m alignjax.plan",
        allow_abbrev=False,
        description="Compile a run for machines that aren't here.",
        epilog="any field of the config: --config.FIELD=VALUE",
    )
    parser.add_argument(
        "--config", required=True, help="NAME.py[:variant], a path or a file of configs/"
    )
    parser.add_argument(
        "--topology",
        default="",
        help="v4, v5 (v5p), v5e or v6e and a slice, v5e:4x4; default: these devices",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, then rematerialisation and microbatches; of v5e alone, slices as well",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments, rest = parser.parse_known_args(argv)
    try:
        overrides = configs.parse_overrides(rest)
        config = configs.load(arguments.config, overrides)
        lineage.adopt_architecture(config, overrides, architecture)
        if arguments.search:
            plans = search(config, arguments.topology)
        else:
            plans = [plan(config, arguments.topology)]
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(jsonl.null(plans if arguments.search else plans[0]), indent=1))
    else:
        print(
            "\n\n".join(
                ([table(plans)] if arguments.search else [])
                + ([report(plans[0])] if plans[0]["rows"] else [])
            )
        )
    return 0 if plans[0]["fits"] else DOES_NOT_FIT


def architecture(spec: str):
    """The model that a parent has, without its weights; of those of the hub that are known here without asking it."""
    name = spec.rpartition("/")[2].partition("@")[0].lower().replace("_", ".")
    if spec.startswith("hf://") and name in families.PRESETS:
        return families.PRESETS[name]
    return locations.architecture(locations.local_directory(spec, weights=False))


def devices_of(topology: str) -> list:
    """Devices to compile for: of a TPU slice that needn't be here, or this machine's."""
    if not topology:
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology}: the TPU compiler is missing; pip install 'alignjax[plan]'"
        )
    # The compiler is told not to look for a TPU around it; and jax not to take it for this machine's backend.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # any: it would say that there is none
    jax.config.update("jax_platforms", "cpu")
    kind, _, shape = topology.partition(":")
    if kind not in SLICES or not shape:
        raise UserError(
            f"--topology {topology}: {', '.join(SLICES)}, a colon and a slice wanted, such as v5e:4x4 or v5:2x2x2; "
            "of v5e alone, --search tries all"
        )
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever the compiler raises at a shape that it doesn't know
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"--topology {topology}: the TPU compiler knows no such slice ({reason})"
        ) from error


def plan(config: Config, topology: str, stop: bool = False) -> dict:
    """What the run needs and costs, as `report` prints it. With `stop`, no more is compiled after a program that doesn't
    fit."""
    devices = devices_of(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    chip = cost.chip_of(devices[0]) or cost.measured(devices)
    with jax.set_mesh(mesh):
        attention.check(config.model)
        work = shapes.WORK[config.stage](config, mesh)
        resident = {name: cost.device_bytes(tree) for name, tree in work.resident.items()}
        rows, kept = [], sum(resident.values())
        for job in work.jobs:
            with jax.set_mesh(job.mesh or mesh):
                rows += compiled(job, work.resident, kept, chip, config)
            if stop and not rows[-1]["fits"]:
                break
    peak = max(rows, key=lambda row: row["peak"])
    return {
        "name": config.name,
        "topology": topology or "here",
        "devices": len(devices),
        "kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "remat": config.model.remat,
        "microbatch_tokens": config.microbatch_tokens,
        "rollout_tensor": config.ppo.rollout_tensor,
        "memory": chip.memory,
        "rows": rows,
        "resident": {name: size / GIB for name, size in resident.items()},
        "checkpoint": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(work.saved)) / GIB,
        "notes": notes(config, mesh),
        "peak": peak["peak"],
        "peak_of": peak["program"],
        "floor": sum(row["calls"] * row["floor"] for row in rows),
        "fits": kept < chip.memory * GIB and all(row["fits"] for row in rows),
    }


def compiled(
    job: shapes.Job, resident: dict, kept: int, chip: cost.Chip, config: Config
) -> list[dict]:
    """The rows of a job: one, or for a rollout two, whose costs are those of prefill and of decoding."""
    row = {"program": job.name, "calls": job.calls}
    start = time.perf_counter()
    traced = job.function.trace(*job.arguments)
    # What is resident and not among the arguments is there beside them.
    mine = {id(x) for x in jax.tree.leaves(job.arguments)}
    others = kept - sum(cost.device_bytes(x) for x in jax.tree.leaves(resident) if id(x) in mine)
    others += cost.device_bytes(job.beside)
    try:
        program = traced.lower().compile()
    except (
        jax.errors.JaxRuntimeError
    ) as error:  # the TPU compiler tells how much it would have needed
        found = re.search(
            r"total memory required.*?\(([\d.]+)([MG])\)|Used ([\d.]+)([MG])", str(error), re.DOTALL
        )
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        amount, unit = [x for x in found.groups() if x] if found else ("inf", "G")
        needs = float(amount) / (1024 if unit == "M" else 1)
        return [
            row
            | {
                "seconds": time.perf_counter() - start,
                "arguments": cost.device_bytes(job.arguments) / GIB,
                "temporaries": needs,
                "peak": needs + kept / GIB,
                "fits": False,
                "flops": 0,
                "moved": 0,
                "sent": 0,
                "floor": 0.0,
                "bound": "does not compile",
                "logits": None,
            }
        ]
    seconds = time.perf_counter() - start
    m, read = program.memory_analysis(), cost.Program(program.as_text())
    used = (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
    )
    row |= {
        "seconds": round(seconds, 1),
        "arguments": m.argument_size_in_bytes / GIB,
        "temporaries": (m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes)
        / GIB,
        "peak": (used + others) / GIB,
        "fits": used + others < chip.memory * GIB,
        "logits": logits(read, config),
    }
    parts = {job.name: job.loops}
    if job.name == "rollout":
        parts = {"rollout: prefill": job.loops._replace(steps=0), "rollout: decode": job.loops}
    rows, before = [], (0.0, cost.Traffic())
    for name, loops in parts.items():
        flops, traffic = cost.flops(traced.jaxpr.jaxpr, loops), read.traffic(loops)
        now = flops - before[0], traffic.moved - before[1].moved, traffic.sent - before[1].sent
        before = flops, traffic
        shares = {
            "products": now[0] / jax.sharding.get_abstract_mesh().size / chip.flops,
            "memory": now[1] / chip.bandwidth,
            "links": now[2] / chip.link,
        }
        bound = max(shares, key=shares.get)
        rows.append(
            row
            | {
                "program": name,
                "flops": now[0],
                "moved": now[1],
                "sent": now[2],
                "floor": shares[bound],
                "bound": bound,
            }
        )
    return rows


def logits(program: cost.Program, config: Config):
    """The largest array with the words as an axis and a microbatch's tokens beside it, that `vocabulary` would have cut."""
    mesh = jax.sharding.get_abstract_mesh()
    words = {config.model.vocab_size, config.model.vocab_size // mesh.shape["tensor"]}
    widths = {config.model.d_model, config.model.d_model // mesh.shape["fsdp"]}  # of an embedding
    tokens = config.microbatch_tokens // sharding.row_shards(mesh)
    found = [
        (math.prod(sizes), kind, list(sizes))
        for kind, sizes in set(program.arrays())
        for words_of_it in words & set(sizes)
        if not widths & set(sizes)
        and math.prod(sizes) >= max(tokens * words_of_it, vocabulary.ELEMENTS + 1)
    ]
    return "{1}{2}".format(*max(found)) if found else None


def notes(config: Config, mesh) -> list[str]:
    """What doesn't divide, and so lies whole on devices that could share it."""
    d, p, rows, out = config.data, config.ppo, sharding.row_shards(mesh), []
    counts = {"data.batch": d.batch}
    if config.stage == "ppo":
        own = sharding.row_shards(sharding.with_tensor(mesh, p.rollout_tensor))
        at_once, slots = plan_slots(d.batch, p.samples_per_prompt, p.slots)
        for name, count in (
            ("prompts filled in at once", at_once),
            ("slots of the rollout", slots),
        ):
            if count % own:
                out.append(
                    f"{name}: {count}, which {own} devices don't divide; each has all of them (ppo.slots={p.slots})"
                )
        counts["responses of a minibatch"] = d.batch * p.samples_per_prompt // p.minibatches
    out += [
        f"{name}={count}, which {rows} devices don't divide"
        for name, count in counts.items()
        if count % rows
    ]
    for name in ("heads", "kv_heads", "vocab_size", "d_ff"):
        if getattr(config.model, name) % mesh.shape["tensor"]:
            out.append(
                f"model.{name}={getattr(config.model, name)}, which mesh.tensor={mesh.shape['tensor']} doesn't divide"
            )
    if config.model.d_model % mesh.shape["fsdp"]:
        out.append(
            f"model.d_model={config.model.d_model}, which mesh.fsdp={mesh.shape['fsdp']} doesn't divide"
        )
    return out


# The columns of a plan: title, how wide, a row's text.
COLUMNS = (
    ("program", 22, lambda row: row["program"]),
    ("calls", 6, lambda row: str(row["calls"])),
    ("arguments", 10, lambda row: f"{row['arguments']:.2f}"),
    ("temporaries", 12, lambda row: f"{row['temporaries']:.2f}"),
    ("peak", 8, lambda row: f"{row['peak']:.2f}"),
    ("TFLOP", 10, lambda row: f"{row['flops'] / 1e12:.4g}"),
    ("GB moved", 10, lambda row: f"{row['moved'] / 1e9:.4g}"),
    ("GB sent", 9, lambda row: f"{row['sent'] / 1e9:.4g}"),
    ("floor, s", 10, lambda row: f"{row['floor']:.3g}"),
    ("bound by", 10, lambda row: row["bound"]),
    ("compiled, s", 12, lambda row: f"{row['seconds']:.0f}"),
)


def report(plan: dict) -> str:
    """A plan as text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    mesh += f"; rollout over tensor {plan['rollout_tensor']}" if plan["rollout_tensor"] else ""
    line = lambda texts: "".join(
        f"{text:<{width}}" if i == 0 else f"{text:>{width}}"
        for i, (text, (_, width, _)) in enumerate(zip(texts, COLUMNS, strict=True))
    )
    head = line([title for title, _, _ in COLUMNS])
    lines = [
        f"{plan['name']} on {plan['devices']} x {plan['kind']} ({plan['topology']}), mesh: {mesh}",
        f"remat {plan['remat']}, microbatches of {plan['microbatch_tokens']} tokens; every example as long as it may be",
        "GiB and GB of a device, TFLOP of all; calls in a step; floor of a call, at the chip's published rates",
        "",
        head,
        "-" * len(head),
    ]
    for row in plan["rows"]:
        lines.append(
            line([text(row) for _, _, text in COLUMNS]) + ("" if row["fits"] else "  does not fit")
        )
    resident, all_of_it = plan["resident"], sum(plan["resident"].values())
    parts = " + ".join(f"{name} {size:.2f}" for name, size in resident.items())
    big = "; ".join(f"{row['program']} {row['logits']}" for row in plan["rows"] if row["logits"])
    lines += [
        "-" * len(head),
        f"resident: {parts} = {all_of_it:.2f} GiB; a checkpoint: {plan['checkpoint']:.1f} GiB in all",
        f"a step takes {plan['floor']:.3g} s at the least",
        f"arrays of tokens x vocabulary: {big or 'none'}",
        *(f"not divided: {note}" for note in plan["notes"]),
        verdict(plan),
    ]
    return "\n".join(lines)


def verdict(plan: dict) -> str:
    spare = plan["memory"] - plan["peak"]
    if plan["fits"]:
        return (
            f"fits: {spare:.1f} of {plan['memory']:.1f} GiB to spare at the peak, {plan['peak_of']}"
        )
    return f"does not fit: {plan['peak_of']} needs {plan['peak']:.1f} of {plan['memory']:.1f} GiB, {-spare:.1f} too much"


def table(plans: list[dict]) -> str:
    """What a search has tried, the best first."""
    return "\n".join(
        f"{label(x)}: {verdict(x)}"
        + (f"; {x['floor']:.3g} s a step at the least" if x["fits"] else "")
        for x in plans
    )


def label(plan: dict) -> str:
    sizes = " x ".join(map(str, plan["mesh"].values()))
    own = f", rollout_tensor {plan['rollout_tensor']}" if plan["rollout_tensor"] else ""
    return f"{plan['topology']}, mesh {sizes}{own}, remat {plan['remat']}, microbatches of {plan['microbatch_tokens']}"


def meshes(devices: int, config: Config) -> list[configs.Mesh]:
    """Ways to lay out so many devices, with heads and widths divided: the fewest copies of the state first."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    out = [
        configs.Mesh(d, f, t)
        for d, f, t in itertools.product(sizes, repeat=3)
        if d * f * t == devices
        and t <= 8
        and config.model.kv_heads % t == 0
        and config.model.d_model % f == 0
    ]
    return sorted(out, key=lambda m: (m.data, m.tensor))


def lower_bound(config: Config, topology: str) -> dict:
    """Of a plan as much as is known before anything is compiled: what is resident, and a gradient beside it."""
    devices = devices_of(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        work = shapes.WORK[config.stage](config, mesh)
        gradient = max(
            cost.device_bytes(job.arguments[0][0])
            for job in work.jobs
            if job.name.endswith("gradient")
        )
        needs = (gradient + sum(map(cost.device_bytes, work.resident.values()))) / GIB
    memory = (cost.chip_of(devices[0]) or cost.measured(devices)).memory
    return {
        "topology": topology,
        "mesh": dict(mesh.shape),
        "remat": config.model.remat,
        "rows": [],
        "memory": memory,
        "rollout_tensor": config.ppo.rollout_tensor,
        "microbatch_tokens": config.microbatch_tokens,
        "peak": needs,
        "peak_of": "the state with a gradient",
        "floor": math.inf,
        "fits": needs < memory,
    }


def search(config: Config, topology: str) -> list[dict]:
    """Plans, the best first: it fits, and has the lowest floor. All meshes are tried that the state fits on, and around
    the best of them other remat and microbatches. Without a slice, the topology's are tried from the smallest on, until
    one fits.
    """
    if topology in SLICES:
        found = []
        for size in SLICES[topology]:
            found = search(config, f"{topology}:{size}") + found
            if found[0]["fits"]:
                break
        return found
    devices, found = devices_of(topology), {}
    if tensor := config.ppo.rollout_tensor:  # as many as there are
        config = dataclasses.replace(
            config,
            ppo=dataclasses.replace(config.ppo, rollout_tensor=math.gcd(tensor, len(devices))),
        )
    order = lambda key: (not found[key]["fits"], found[key]["floor"], found[key]["peak"])

    def attempt(mesh, remat, tokens) -> None:
        key = tuple(mesh.values()), remat, tokens
        if key in found:
            return
        new = dataclasses.replace(
            config,
            mesh=configs.Mesh(**mesh),
            microbatch_tokens=tokens,
            model=dataclasses.replace(config.model, remat=remat),
        )
        found[key] = lower_bound(new, topology)
        if found[key]["fits"]:
            found[key] = plan(new, topology, stop=True)
        print(table([found[key]]), file=sys.stderr, flush=True)

    for mesh in meshes(len(devices), config):
        attempt(dataclasses.asdict(mesh), config.model.remat, config.microbatch_tokens)
    for change in (
        lambda best: [{"remat": x} for x in ("nothing", "dots", "everything")],
        lambda best: [
            {"tokens": best["microbatch_tokens"] // 2},
            {"tokens": best["microbatch_tokens"] * 2},
        ],
    ):
        best = found[min(found, key=order)]
        if not best["rows"]:
            break
        for changes in change(best):
            attempt(
                **{
                    "mesh": best["mesh"],
                    "remat": best["remat"],
                    "tokens": best["microbatch_tokens"],
                }
                | changes
            )
    return [found[key] for key in sorted(found, key=order)]


if __name__ == "__main__":
    sys.exit(main())
