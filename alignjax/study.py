"""Test claims of the report in the embedded world, over several seeds.

python -m alignjax.study warmup --seeds 5

A study is a file of studies/, or any path: a `claims.Study` whose arms are one config with other
fields. Each arm is run with each seed by the command that its table shows, in WORKDIR/SEED/. Arms
of any study that are the same run, and the parents of runs, are run once. After an interruption
the same command continues; it does not repeat a complete run.

OUT/study/NAME.json has every figure, NAME.png the picture, and OUT/study.md all studies of OUT.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

from alignjax import claims
from alignjax import config as configs
from alignjax.claims import Study
from alignjax.config import UserError
from alignjax.machine import console, outputs, pictures
from alignjax.machine.arguments import Parser
from alignjax.reports import study_picture, study_results, study_runs
from alignjax.runs import records

STUDIES = configs.CONFIGS.parent / "studies"


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or one of `machine.failures`; a failed run gives 2."""
    return console.run_command(
        functools.partial(run, argv), interrupted="interrupted; the same command continues"
    )


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m alignjax.study",
        description="Test claims of the report over several seeds.",
    )
    parser.add_argument(
        "name",
        nargs="+",
        metavar="NAME",
        help=f"one of {', '.join(known())}; all of them: all; or the path of a file",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on; default: 5")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="how many seeds run at once and share the cores; default: 1",
    )
    parser.add_argument(
        "--workdir", default="runs/study", help="directory of the runs; default: runs/study"
    )
    parser.add_argument(
        "--out",
        default="runs",
        metavar="DIR",
        help="write DIR/study.md, DIR/study/NAME.png and .json; default: runs",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of these names that this command has not written",
    )
    return parser


def run(argv: list[str] | None) -> None:
    """Run the studies that the arguments name; all of them are checked before the first starts."""
    arguments = argument_parser().parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}={getattr(arguments, name)} must be at least 1")
    names = known() if arguments.name == ["all"] else arguments.name
    studies = {name: load(name) for name in names}
    out = Path(arguments.out)
    for name in names:
        study_results.check_files(out, Path(name).stem, arguments.overwrite)
    for name, study in studies.items():
        stem = Path(name).stem
        trials = study_runs.plan_trials(study, arguments.seeds, Path(arguments.workdir))
        study_runs.run_trials(stem, trials, arguments.jobs)
        write_results(stem, study, trials, out)


def known() -> list[str]:
    """Return the names of the studies in studies/."""
    return sorted(path.stem for path in STUDIES.glob("*.py"))


def load(name: str) -> Study:
    """Return the study of this name or path, after checking the fields of its arms."""
    path = Path(name) if name.endswith(".py") else STUDIES / f"{name}.py"
    if not path.is_file():
        raise UserError(f"study {name}: no file {path}{configs.nearest(name, known())}")
    study = claims.check(configs.run_file(path).get("study"), f"study {name}: {path}")
    study_runs.plan_trials(study, 1, Path())
    return study


def write_results(name: str, study: Study, trials: list[study_runs.Trial], out: Path) -> None:
    """Write the figures, the picture and the page of a study, and print its table."""
    runs = {arm: [] for arm in study.arms}
    for trial in trials:
        runs[trial.arm].append(records.read_result(trial.workdir))
    record = study_results.study_record(name, study, trials, runs)
    files = study_results.result_files(out, name)
    with outputs.writing(files.record.parent):
        files.record.parent.mkdir(parents=True, exist_ok=True)
    picture = study_picture.draw_study(study, record, runs)
    pictures.write_picture(files.picture, picture, dpi=110)
    outputs.write_text(files.record, json.dumps(record, indent=1))
    outputs.write_text(files.page, study_results.document(out))
    heading, *lines = [(row[0], row[1:]) for row in study_results.table_rows(record)]
    title = f"{name}: {record['seeds']} seeds, mean and half of the 95 % interval"
    print(console.grid(title, heading, lines))
    print(f"figures in {files.record}, picture beside it, all in {files.page}")


if __name__ == "__main__":
    sys.exit(main())
