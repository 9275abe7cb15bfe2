"""Say what a run needs and costs on machines that are not here, and whether it fits.

python -m alignjax.plan --config qwen_14b/ppo.py --topology v5:2x2x2
python -m alignjax.plan --config qwen_7b/ppo.py --topology v5e --search
python -m alignjax.plan --config qwen_7b/ppo.py --topology h100:8
python -m alignjax.plan --config ppo.py

The first plans for 8 TPU v5p chips, and ends with exit code 3 if the run does not fit. The second
searches for the smallest slice of v5e that holds it. The third plans for 8 GPUs, the last for the
devices that are here.

The programs are those that training runs, compiled from shapes alone: no weights, no data, no
network. The TPU compiler comes with `pip install alignjax[plan]` and needs no TPU, the CUDA
compiler with `alignjax[plan-gpu]` and needs no GPU. Every example is taken to be as long as it may
be.
"""

import argparse
import functools
import json
from pathlib import Path

from alignjax import config as configs
from alignjax.config import Config, Model
from alignjax.machine import console, jsonl
from alignjax.machine.arguments import Parser
from alignjax.models import families
from alignjax.planning.plans import Estimate, make_plan, plan_dict
from alignjax.planning.printing import format_estimates, format_plan
from alignjax.planning.search import search
from alignjax.planning.topologies import PLATFORMS
from alignjax.runs.lineage import adopt_architecture
from alignjax.weights import locations

DOES_NOT_FIT = 3
# The last part of a directory's or a hub name -> the preset, where their names differ.
PRESET_OF = {
    "gemma-3-4b-it-text": "gemma3-4b",
    "llama-3.1-8b": "llama3.1-8b",
    "llama-3.1-8b-instruct": "llama3.1-8b",
    "mistral-7b-instruct-v0.3": "mistral-7b",
    "mistral-7b-v0.3": "mistral-7b",
}


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 if the run fits, 3 if not, or one of `machine.failures`."""
    return console.run_command(functools.partial(run, argv))


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m alignjax.plan",
        description="Compile a run for machines that are not here.",
        epilog="any field of the config: --config.FIELD=VALUE",
    )
    parser.add_argument(
        "--config", required=True, help="NAME.py[:variant], a path or a file of configs/"
    )
    parser.add_argument(
        "--topology",
        default="",
        help=f"one of {', '.join(PLATFORMS)} (v5 is v5p) with a slice, such as v5e:4x4 or h100:8; "
        "default: the devices of this machine",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, then rematerialisation and microbatches; if --topology names no slice, "
        "try its slices too",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(argv: list[str] | None) -> int:
    """Plan the run that the arguments name, print the result, and return the exit code."""
    arguments, rest = argument_parser().parse_known_args(argv)
    overrides = configs.parse_overrides(rest)
    config = configs.load(arguments.config, overrides)
    adopt_architecture(config, overrides, architecture)
    plans = plans_of(config, arguments.topology, arguments.search)
    if arguments.json:
        texts = [plan_dict(plan) for plan in plans]
        print(json.dumps(jsonl.null(texts if arguments.search else texts[0]), indent=1))
    else:
        parts = [format_estimates(plans)] if arguments.search else []
        parts += [format_plan(plans[0])] if plans[0].rows else []
        print("\n\n".join(parts))
    return 0 if plans[0].fits else DOES_NOT_FIT


def plans_of(config: Config, topology: str, searching: bool) -> list[Estimate]:
    """Return the plans of a search, the best first, or the one plan of this config."""
    return search(config, topology) if searching else [make_plan(config, topology)]


def architecture(spec: str) -> Model:
    """Return the model of a parent without reading its weights.

    The hub's models that `families.PRESETS` knows are not asked of the hub, and neither need a
    directory of such a model be here. In BASE+ADAPTER the base has it.
    """
    is_on_hub = spec.startswith("hf://")
    if is_on_hub:
        spec = spec.partition("+")[0]
    name = spec.rpartition("/")[2].partition("@")[0].lower().replace("_", ".")
    name = PRESET_OF.get(name, name)
    if name in families.PRESETS and (is_on_hub or not Path(spec).exists()):
        return families.PRESETS[name]
    return locations.architecture(locations.local_directory(spec, weights=False))


if __name__ == "__main__":
    console.leave(main())
