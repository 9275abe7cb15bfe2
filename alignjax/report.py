"""Write one or more runs as an HTML file that opens offline.

    python -m alignjax.report runs/ppo [runs/other ...] [--out FILE]

The page has results, warnings, curves, responses, config and environment. Without --out it is
report.html in the first run's directory.

The runs may be incomplete. The curves of several runs are drawn over each other, and the fields in
which their configs differ come first. Moving over a chart shows the values of that step in all
charts. Points are figures on held-out data; dashed lines are figures at the start (SFT, before PPO)
or at the end of a run. A long curve is thinned to the lowest and the highest value of each of a
thousand stretches, and figures have six digits. Of each kind of samples at most 400 rows are
taken, evenly.

The tokens of a response are coloured by the policy's log p minus the reference's. In the responses
at the end of a run (responses.jsonl) it is the final policy's in both columns: the reference's
responses show what the policy has come to prefer or to avoid, and those of the policy itself add
up to its KL. The state of the page (sort, filter, theme) is in its address, behind the #.
"""

import argparse
import functools
import sys
from pathlib import Path

from alignjax.machine import console, outputs
from alignjax.machine import workdir as workdirs
from alignjax.machine.arguments import Parser
from alignjax.reports.content import page_content, run_title
from alignjax.reports.html_file import html_page
from alignjax.runs import records

# Near the beginning of a page; the second is that of older versions.
MARKS = (b'<meta name="generator" content="alignjax.report">', b": alignjax report</title>")


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or one of `machine.failures`."""
    return console.run_command(functools.partial(run, argv))


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m alignjax.report",
        description="Write one or more runs as an HTML file.",
    )
    parser.add_argument(
        "runs", nargs="+", help="work directories of complete or incomplete runs of any stage"
    )
    parser.add_argument("--out", help="default: report.html in the first run's directory")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that is not an earlier report"
    )
    return parser


def run(argv: list[str] | None) -> None:
    """Read the runs that the arguments name and write their page."""
    arguments = argument_parser().parse_args(argv)
    runs = [records.read(workdirs.resolve(directory)) for directory in arguments.runs]
    out = workdirs.resolve(arguments.out) if arguments.out else runs[0].workdir / "report.html"
    outputs.check_file(out, "--out", is_own=is_report, overwrite=arguments.overwrite)
    outputs.write_text(out, html_page(page_content(runs)))
    print(f"{out}: {', '.join(map(run_title, runs))}")


def is_report(path: Path) -> bool:
    """Return whether a file is a page that this command has written."""
    return any(outputs.begins_with(path, mark) for mark in MARKS)


if __name__ == "__main__":
    sys.exit(main())
