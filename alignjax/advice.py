"""What an expert would say of a run that goes wrong, by what it writes: rules over bounded windows of its figures.

`Adviser` takes a run's rows one by one, as the terminal does; `advise` takes all of them, and finds the same.
docs/metrics.md has the table of the rules.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

SHORT, WINDOW, LONG = 5, 10, 20  # steps that a rule looks at


class Warning(NamedTuple):
    kind: str
    step: int  # the first at which the rule holds; of an evaluation, how many steps had been done
    said: str  # what was seen, with its figures
    meaning: str
    remedy: str


class Rule(NamedTuple):
    kind: str
    stages: tuple[str, ...]
    rule: str  # in words, for docs/metrics.md
    meaning: str
    remedy: str
    seen: Callable  # Past -> what was seen, "" if the rule does not hold


class Past:
    """The figures of a run so far, as far as rules need them. A figure that isn't there is NaN, with which no rule holds."""

    def __init__(self, config: dict):
        self.config = config
        self.first, self.rows = {}, deque(maxlen=LONG)
        self.evaluations = ()  # the first and the last one
        self.best = None  # the WINDOW steps of the highest true score: (first step, true scores, scores)
        self.lowest = math.inf  # loss, of the first step or of WINDOW steps

    def take(self, row: dict) -> None:
        self.first = self.first or row
        self.rows.append(row)
        true = self.last("objective/true_score", WINDOW)
        if self.best is None or statistics.fmean(true) > statistics.fmean(self.best[1]):
            if not math.isnan(sum(true)):
                self.best = self.since(WINDOW), true, self.last("objective/scores", WINDOW)
        self.lowest = min((self.lowest, figure(self.first, "loss"), self.mean("loss", WINDOW)), key=nan_last)

    def last(self, name: str, n: int, before: int = 0) -> list[float]:
        """A figure of the last n steps, less `before`; [NaN] if there are not so many."""
        rows = list(self.rows)[: len(self.rows) - before][-n:]
        return [figure(row, name) for row in rows] if len(rows) == n else [math.nan]

    def mean(self, name: str, n: int, before: int = 0) -> float:
        return statistics.fmean(self.last(name, n, before))

    def since(self, n: int) -> int:
        """The first of the last n steps."""
        return self.rows[-n]["step"]


def figure(row: dict, name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else value


def nan_last(x: float) -> float:
    return math.inf if math.isnan(x) else x


RULES: list[Rule] = []


class Adviser:
    """Says each kind of warning once, at the step at which it first holds."""

    def __init__(self, config: dict):
        """`config` is flat, {dotted field: value}, as `records.read` gives it."""
        self.past, self.rules = Past(config), [rule for rule in RULES if config["stage"] in rule.stages]

    def step(self, row: dict) -> list[Warning]:
        """What is new with a row of metrics.jsonl."""
        self.past.take(row)
        return self.new(row["step"])

    def evaluation(self, row: dict) -> list[Warning]:
        """What is new with a row of evaluations.jsonl."""
        self.past.evaluations = (*self.past.evaluations[:1], row)
        return self.new(row["step"])

    def new(self, step: int) -> list[Warning]:
        found = [(rule, rule.seen(self.past)) for rule in self.rules]
        self.rules = [rule for rule, said in found if not said]
        return [Warning(rule.kind, step, said, rule.meaning, rule.remedy) for rule, said in found if said]


def advise(config: dict, metrics: list[dict], evaluations: list[dict]) -> list[Warning]:
    """The warnings that a run gives rise to, by step, at most one of a kind.

    `config` is flat, {dotted field: value}; the rows are those of metrics.jsonl and evaluations.jsonl, see `records`.
    """
    return follow(Adviser(config), metrics, evaluations)


def follow(adviser: Adviser, metrics: list[dict], evaluations: list[dict]) -> list[Warning]:
    """What an adviser says of rows in the order in which they were made: an evaluation is made before its step."""
    rows = [(row["step"], 0, adviser.evaluation, row) for row in evaluations]
    rows += [(row["step"], 1, adviser.step, row) for row in metrics]
    return [warning for *_, take, row in sorted(rows, key=lambda x: x[:2]) for warning in take(row)]
