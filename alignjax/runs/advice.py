"""Warn when a run goes wrong, as an expert who reads its figures would.

`Adviser` takes the rows of a run one by one, as the training log does. `advise` takes all of them
and returns the same warnings. The rules are in `rules`; docs/metrics.md has their table.
"""

from dataclasses import dataclass
from typing import Any

from alignjax.runs.rules import RULES, History


@dataclass(frozen=True, kw_only=True)
class Warning:
    """A rule that holds for a run."""

    kind: str
    # The first step at which the rule holds; for an evaluation, the number of steps before it.
    step: int
    observation: str  # what was seen, with its figures
    meaning: str  # what it usually means
    remedy: str  # what to try


def text(name: str, warning: Warning) -> str:
    """Return a warning about the run `name` as three lines for the terminal."""
    return f"{brief(name, warning)}\n  usually: {warning.meaning}\n  try: {warning.remedy}"


def brief(name: str, warning: Warning) -> str:
    """Return a warning about the run `name` as one line."""
    return f"{name}: warning at step {warning.step}: {warning.observation}"


class Adviser:
    """Gives each kind of warning once, at the first step at which it holds."""

    def __init__(self, config: dict[str, Any]):
        """Advise on a run; `config` is flat, {dotted field: value}, as `records.read` gives it."""
        self.history = History(config)
        # The rules that have not held yet.
        self.rules = [rule for rule in RULES if config["stage"] in rule.stages]

    def step(self, row: dict[str, Any]) -> list[Warning]:
        """Return the new warnings after a row of metrics.jsonl."""
        self.history.add_step(row)
        return self._new_warnings(row["step"])

    def evaluation(self, row: dict[str, Any]) -> list[Warning]:
        """Return the new warnings after a row of evaluations.jsonl."""
        self.history.add_evaluation(row)
        return self._new_warnings(row["step"])

    def _new_warnings(self, step: int) -> list[Warning]:
        warnings = []
        remaining = []
        for rule in self.rules:
            observation = rule.observe(self.history)
            if not observation:
                remaining.append(rule)
                continue
            warnings.append(
                Warning(
                    kind=rule.kind,
                    step=step,
                    observation=observation,
                    meaning=rule.meaning,
                    remedy=rule.remedy,
                )
            )
        self.rules = remaining
        return warnings


def advise(config: dict[str, Any], metrics: list[dict], evaluations: list[dict]) -> list[Warning]:
    """Return the warnings of a run in the order of its steps, at most one of each kind.

    `config` is flat, {dotted field: value}; the rows are those of metrics.jsonl and
    evaluations.jsonl. `records.read` returns all three.
    """
    return follow(Adviser(config), metrics, evaluations)


def follow(adviser: Adviser, metrics: list[dict], evaluations: list[dict]) -> list[Warning]:
    """Give rows to an adviser in the order in which a run made them; return its warnings.

    The evaluation after N steps comes before the row of step N.
    """
    events = [(row["step"], False, row) for row in evaluations]
    events += [(row["step"], True, row) for row in metrics]
    warnings = []
    for _, is_step, row in sorted(events, key=lambda event: event[:2]):
        warnings += adviser.step(row) if is_step else adviser.evaluation(row)
    return warnings
