"""docs/metrics.md has a line for each name that a run writes and for no other, and all warnings."""

import json
import re
from pathlib import Path

import pytest
from runs import ROOT, Chain, rows

from alignjax.runs.rules import RULES

TEXT = (ROOT / "docs" / "metrics.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
# Words in the documented names that stand for any text.
PLACEHOLDERS = ("SET", "NAME", "X")


# What settings that the chain does not have would write.
NOT_IN_THE_CHAIN = {
    "objective/rewards/NAME",
    "objective/rewards_std/NAME",
    "reward/running_mean/NAME",
    "reward/running_std/NAME",
    "score/NAME",
    "phases/NAME",
    "objective/kl_coef",
    "objective/frac_zero_std",
    "loss/kl_avg",
    "loss/entropy_avg",
    "policy/dual_clipfrac_avg",
    "load_balancing",
    "loss/load_balancing_avg",
    "loss/value_load_balancing_avg",
}


def documented(section: str) -> dict[str, str]:
    """Return the names in a section's table, each with the rest of its line."""
    return dict(re.findall(r"^\| `([^`]+)` \|(.*)$", SECTIONS[section], re.M))


def pattern(name: str) -> re.Pattern:
    """Return a pattern for a documented name, whose placeholders match any text."""
    parts = re.split(rf"\b({'|'.join(PLACEHOLDERS)})\b", name)
    return re.compile("".join(".+" if part in PLACEHOLDERS else re.escape(part) for part in parts))


def keys(chain: Chain, file: str, *runs: str) -> set[str]:
    """Return all keys in the rows of a file of some runs."""
    return {key for run in runs for row in rows(chain.runs / run / file) for key in row}


def summary_keys(chain: Chain) -> set[str]:
    runs: list[Path] = [run for run in chain.runs.iterdir() if run.is_dir()]
    return {key for run in runs for key in json.loads((run / "summary.json").read_text())}


@pytest.mark.parametrize(
    "section, file, runs",
    [
        ("metrics.jsonl: lm", "metrics.jsonl", ["lm-tiny", "sft-tiny"]),
        ("metrics.jsonl: ranking", "metrics.jsonl", ["pmp-tiny", "rm-tiny"]),
        ("metrics.jsonl: dpo", "metrics.jsonl", ["dpo-tiny"]),
        ("metrics.jsonl: ppo", "metrics.jsonl", ["ppo-tiny"]),
        ("evaluations.jsonl", "evaluations.jsonl", ["ppo-tiny"]),
        ("timing.jsonl", "timing.jsonl", ["lm-tiny", "rm-tiny", "ppo-tiny"]),
        ("summary.json", None, None),
    ],
)
def test_every_name_has_its_line_and_every_line_its_name(section, file, runs, chain):
    lines = documented(section)
    written = keys(chain, file, *runs) if file else summary_keys(chain)
    patterns = {name: pattern(name) for name in lines}
    undocumented = [
        key for key in written if not any(known.fullmatch(key) for known in patterns.values())
    ]
    assert undocumented == []
    absent = {name for name, known in patterns.items() if not any(map(known.fullmatch, written))}
    assert {name for name in absent if "Only with" not in lines[name]} == set()
    assert absent <= NOT_IN_THE_CHAIN  # the chain writes all other names


def test_the_keys_of_samples_are_documented(chain):
    for run in ("lm-tiny", "rm-tiny", "dpo-tiny", "ppo-tiny"):
        for key in keys(chain, "samples.jsonl", run) - {"step"}:
            assert f"`{key}`" in SECTIONS["samples.jsonl"], key


def test_the_table_of_warnings_has_the_rules_of_the_code():
    lines = re.findall(r"^\| (?!kind|---)(.+) \|$", SECTIONS["Warnings"], re.M)
    assert lines == [
        f"`{rule.kind}` | {', '.join(rule.stages)} | {rule.condition} | {rule.meaning} "
        f"| {rule.remedy}"
        for rule in RULES
    ]
