"""docs/metrics.md has a line for every name that a run writes, none that no run writes, and the table of the warnings."""

import json
import re

import pytest
from runs import ROOT, rows

from alignjax.runs.rules import RULES

TEXT = (ROOT / "docs" / "metrics.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))


def names(section: str) -> dict[str, str]:
    """The names of a section's table, with what their lines say."""
    return dict(re.findall(r"^\| `([^`]+)` \|(.*)$", SECTIONS[section], re.M))


def pattern(name: str) -> re.Pattern:
    """Capital words stand for any."""
    return re.compile(
        "".join(
            ".+" if part in ("SET", "NAME", "X") else re.escape(part)
            for part in re.split(r"\b(SET|NAME|X)\b", name)
        )
    )


def keys(chain, file: str, *runs) -> set[str]:
    return {key for run in runs for row in rows(chain[0] / run / file) for key in row}


def summaries(chain) -> set[str]:
    return {
        key
        for run in chain[0].iterdir()
        if run.is_dir()
        for key in json.loads((run / "summary.json").read_text())
    }


@pytest.mark.parametrize(
    "section, written",
    [
        ("metrics.jsonl: lm", lambda chain: keys(chain, "metrics.jsonl", "lm-tiny", "sft-tiny")),
        (
            "metrics.jsonl: ranking",
            lambda chain: keys(chain, "metrics.jsonl", "pmp-tiny", "rm-tiny"),
        ),
        ("metrics.jsonl: ppo", lambda chain: keys(chain, "metrics.jsonl", "ppo-tiny")),
        ("evaluations.jsonl", lambda chain: keys(chain, "evaluations.jsonl", "ppo-tiny")),
        (
            "timing.jsonl",
            lambda chain: keys(chain, "timing.jsonl", "lm-tiny", "rm-tiny", "ppo-tiny"),
        ),
        ("summary.json", summaries),
    ],
)
def test_every_name_has_its_line_and_every_line_its_name(section, written, chain):
    told, found = names(section), written(chain)
    assert [key for key in found if not any(pattern(name).fullmatch(key) for name in told)] == []
    absent = {name for name in told if not any(map(pattern(name).fullmatch, found))}
    assert {name for name in absent if "Only with" not in told[name]} == set()
    assert absent <= {"phases/NAME"}  # this chain has all the others


def test_samples_are_told(chain):
    for run in ("lm-tiny", "rm-tiny", "ppo-tiny"):
        for key in keys(chain, "samples.jsonl", run) - {"step"}:
            assert f"`{key}`" in SECTIONS["samples.jsonl"], key


def test_the_warnings_are_those_of_the_code():
    lines = re.findall(r"^\| (?!kind|---)(.+) \|$", SECTIONS["Warnings"], re.M)
    assert lines == [
        f"`{r.kind}` | {', '.join(r.stages)} | {r.condition} | {r.meaning} | {r.remedy}"
        for r in RULES
    ]
