"""Evaluate runs: reward models on comparisons (Table 4), policies on benchmarks (Table 5).

python -m alignjax.evaluate --run runs/rm --sets hh_helpful_base,summarize,shp,prm800k
python -m alignjax.evaluate --run runs/ppo --tasks mmlu,ceval,gsm8k,humaneval,bbh --shots both

`evals.table4` computes the first table, `evals.table5` the second.
"""

import argparse
import functools
import importlib
import importlib.util
from types import ModuleType

from alignjax import config as configs
from alignjax.config import UserError
from alignjax.data import preferences
from alignjax.evals import table4
from alignjax.machine import console
from alignjax.machine.arguments import Parser
from alignjax.machine.compilation_cache import keep_programs


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code, 0 or one of `machine.failures`."""
    return console.run_command(functools.partial(evaluate, argv))


def evaluate(argv: list[str] | None) -> None:
    """Compute the table that the arguments ask for."""
    arguments = parse_arguments(argv)
    keep_programs()
    if arguments.tasks is None:
        table4.evaluate(arguments)
        return
    try:
        table5().evaluate(arguments)
    except KeyboardInterrupt:
        message = "interrupted; the same command resumes the evaluation"
        raise KeyboardInterrupt(message) from None


def table5() -> ModuleType:
    """Import `evals.table5` on demand: it needs the extra [eval], which Table 4 does not."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs lm-evaluation-harness: pip install -c constraints.txt -e '.[eval]'"
        )
    return importlib.import_module("alignjax.evals.table5")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; raise UserError if a number is below 1."""
    arguments = argument_parser().parse_args(argv)
    for name in ("examples", "max_length", "microbatch_tokens", "slots", "best_of"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    about_files = arguments.columns != "{}" or arguments.on_bad_row != "error"
    if arguments.tasks is not None and about_files:
        raise UserError("--columns and --on_bad_row are for the files of --sets, not for --tasks")
    check_best_of(arguments)
    return arguments


def check_best_of(arguments: argparse.Namespace) -> None:
    """Raise UserError unless --best_of and --reward are given together, and for --tasks."""
    if arguments.tasks is None and (arguments.best_of > 1 or arguments.reward):
        raise UserError("--best_of and --reward are for --tasks, not for --sets")
    if arguments.best_of > 1 and not arguments.reward:
        raise UserError(f"--best_of={arguments.best_of} needs a reward model: --reward RUN")
    if arguments.reward and arguments.best_of == 1:
        raise UserError(f"--reward {arguments.reward} needs --best_of N, with N above 1")


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="python -m alignjax.evaluate",
        description="Evaluate ranking runs on comparisons, or language models on benchmarks.",
    )
    add_models_and_data(parser)
    add_benchmark_options(parser)
    add_best_of_options(parser)
    add_general_options(parser)
    return parser


def add_models_and_data(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what to evaluate, and on what."""
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        metavar="DIR",
        help="with --sets: one ranking run, which is evaluated together with its PMP parent, or "
        "several reward models, which are evaluated alone; with --tasks: language models; each is "
        "a run, a Hugging Face directory or hf://ORG/NAME",
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--sets",
        metavar="SET,SET",
        help=f"sets of comparisons: {', '.join(preferences.SETS)} (with options as "
        "NAME:OPTION=VALUE), toy/comparisons-clean, or paths of JSON lines",
    )
    parser.add_argument(
        "--columns",
        default="{}",
        metavar="JSON",
        help="with --sets: names of fields in files, if they are others than the usual ones: "
        '\'{"prompt": "question"}\'',
    )
    parser.add_argument(
        "--on_bad_row",
        default="error",
        choices=("error", "skip"),
        help="with --sets: what to do with a bad row of a file; default: error",
    )
    data.add_argument(
        "--tasks",
        metavar="NAME,NAME",
        help="benchmarks: mmlu, ceval, gsm8k, humaneval (runs the model's code in a sandbox), "
        "bbh, world; some subjects only as bbh:word_sorting+navigate",
    )


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of --tasks."""
    parser.add_argument(
        "--shots",
        default="both",
        choices=("zero", "few", "both"),
        help="with --tasks: the settings to evaluate; default: both",
    )
    parser.add_argument(
        "--template",
        default="auto",
        choices=("auto", "chat", "none"),
        help="with --tasks: whether prompts go through the chat template; default: they do if "
        "there is a template and the run was not trained on plain text",
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=64,
        help="with --tasks: the number of responses decoded at once; default: 64",
    )


def add_best_of_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose among several responses."""
    parser.add_argument(
        "--best_of",
        type=int,
        default=1,
        metavar="N",
        help="with --tasks: answer with the best of N responses under --reward, sampled as in PPO; "
        "tasks that compare likelihoods stay as they are; default: 1",
    )
    parser.add_argument(
        "--reward",
        metavar="RUN",
        help="with --best_of: the reward model, a run, a Hugging Face directory or hf://ORG/NAME",
    )


def add_general_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that --sets takes, most of which --tasks takes too."""
    parser.add_argument(
        "--data_dir",
        default="",
        help="with --sets: the directory of the prepared public sets; with --tasks: the directory "
        "with the published files in DIR/mmlu, DIR/gsm8k ...; default: data from the hub",
    )
    parser.add_argument(
        "--split",
        default="heldout",
        choices=("heldout", "train"),
        help="with --sets: the split to evaluate; default: heldout",
    )
    parser.add_argument(
        "--examples",
        type=int,
        help="evaluate only the first EXAMPLES of each set or task; default: all",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        help="in tokens; longer pairs are left out, and longer prompts lose their beginning; "
        "default: the length used in training, or what the model allows",
    )
    parser.add_argument(
        "--microbatch_tokens",
        type=int,
        help="the number of tokens read at once; default: the number used in training, or 4096",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=configs.CHOICES["model.dtype"],
        help="the type of the computation; in bfloat16, close calls depend on the batch's layout",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.json",
        help="with --sets: the file for the figures, with the calibration in FILE.png; default: "
        "DIR/evaluation.json and DIR/calibration.png, for a Hugging Face model "
        "NAME.evaluation.json and NAME.calibration.png in the working directory; with --tasks: "
        "a directory; default: DIR/benchmarks",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that are not earlier results of this command",
    )


if __name__ == "__main__":
    console.leave(main())
