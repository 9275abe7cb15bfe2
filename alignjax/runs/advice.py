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
    meaning: str  # what that usually means
    remedy: str  # what to try


def text(name: str, warning: Warning) -> str:
    """A warning for the terminal, three lines."""
    return f"{brief(name, warning)}\n  usually: {warning.meaning}\n  try: {warning.remedy}"


def brief(name: str, warning: Warning) -> str:
    return f"{name}: warning at step {warning.step}: {warning.said}"


class Rule(NamedTuple):
    kind: str
    stages: tuple[str, ...]
    seen: Callable  # Past -> what was seen, "" if the rule does not hold
    words: str  # the rule, for docs/metrics.md
    meaning: str  # usually
    remedy: str


class Past:
    """The figures of a run so far, as far as rules need them. A figure that isn't there is NaN, with which no rule holds."""

    def __init__(self, config: dict):
        self.config = config
        self.first, self.rows = {}, deque(maxlen=LONG)
        self.evaluations = ()  # the first and the last one
        self.best = (
            None  # the WINDOW steps of the highest true score: (their numbers, true scores, scores)
        )
        self.lowest = math.inf  # loss, of the first step or of WINDOW steps

    def take(self, row: dict) -> None:
        self.first = self.first or row
        self.rows.append(row)
        true = self.last("objective/true_score", WINDOW)
        if not math.isnan(sum(true)) and (self.best is None or sum(true) > sum(self.best[1])):
            self.best = self.steps(WINDOW), true, self.last("objective/scores", WINDOW)
        self.lowest = min(
            (self.lowest, figure(self.first, "loss"), self.mean("loss", WINDOW)), key=nan_last
        )

    def last(self, name: str, n: int, before: int = 0) -> list[float]:
        """A figure of the last n steps, less `before`; [NaN] if there are not so many."""
        rows = list(self.rows)[: len(self.rows) - before][-n:]
        return [figure(row, name) for row in rows] if len(rows) == n else [math.nan]

    def mean(self, name: str, n: int, before: int = 0) -> float:
        return statistics.fmean(self.last(name, n, before))

    def steps(self, n: int) -> str:
        """Numbers of the last n steps, in words."""
        return f"{self.rows[-n]['step']} to {self.rows[-1]['step']}"


def figure(row: dict, name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else value


def nan_last(x: float) -> float:
    return math.inf if math.isnan(x) else x


def kl(past: Past) -> str:
    name = "objective/kl_per_token"
    now, before = past.mean(name, SHORT), past.mean(name, SHORT, before=WINDOW)
    if not (now > 0.5 or (now > 0.2 and now > 3 * before)):
        return ""
    return (
        f"KL to the reference {past.mean('objective/kl', SHORT):.3g} nats a response, {now:.3g} a token in the last "
        f"{SHORT} steps"
        + (f", {before:.3g} a token {WINDOW} steps before" if before == before else "")
    )


def explained_variance(past: Past) -> str:
    values = past.last("value/explained_variance", WINDOW)
    learnt = past.last(
        "policy/approxkl_avg", WINDOW
    )  # there where the policy learns, and so after the warm-up
    spread = min(
        past.last("objective/scores_std", WINDOW)
    )  # where scores are all one, returns differ by rounding alone
    if not (statistics.fmean(values) < 0 and spread > 1e-5 and not math.isnan(sum(learnt))):
        return ""
    return f"the values' explained variance is {statistics.fmean(values):.3g}, mean of steps {past.steps(WINDOW)}"


def clip_high(past: Past) -> str:
    share = past.mean("policy/clipfrac_avg", SHORT)
    return (
        f"the clip binds on {100 * share:.0f} % of tokens, mean of steps {past.steps(SHORT)}"
        if share > 0.3
        else ""
    )


def clip_zero(past: Past) -> str:
    shares, moved = (
        past.last("policy/clipfrac_avg", LONG),
        past.mean("objective/kl_per_token", LONG),
    )
    several = past.config["ppo.epochs"] * past.config["ppo.minibatches"] > 1
    if not (several and set(shares) == {0.0} and abs(moved) < 3e-4):
        return ""
    return (
        f"the clip binds on no token in steps {past.steps(LONG)}, and the KL to the reference is {moved:.2g} nats a "
        "token: the policy hardly moves"
    )


def entropy(past: Past) -> str:
    name = "policy/entropy_avg"
    first, now = figure(past.first, name), past.mean(name, SHORT)
    if not now < 0.1 * first:
        return ""
    return f"entropy {now:.2g} nats a token, mean of steps {past.steps(SHORT)}; it was {first:.2g} at the start"


def truncated(past: Past) -> str:
    share = past.mean("response/truncated", SHORT)
    if not share > 0.5:
        return ""
    return (
        f"{100 * share:.0f} % of responses have not ended within ppo.response_length="
        f"{past.config['ppo.response_length']} tokens, steps {past.steps(SHORT)}"
    )


def one_length(past: Past) -> str:
    """All of one length, though not because all are cut off; and not from the start, when it may be the task's, but that
    nothing is said at all is never right."""
    mean, longest = (
        past.last("response/length_mean", SHORT),
        past.last("response/length_max", SHORT),
    )
    same = (
        all(abs(a - b) < 1e-3 for a, b in zip(mean, longest, strict=True))
        and len({round(x) for x in longest}) == 1
    )
    began = (
        figure(past.first, "response/length_max") - figure(past.first, "response/length_mean")
        < 1e-3
    )
    if not (
        same and past.mean("response/truncated", SHORT) < 0.5 and (not began or longest[0] == 1)
    ):
        return ""
    words = "just the end token" if longest[0] == 1 else f"{longest[0]:.0f} tokens long"
    return f"every response is {words}, steps {past.steps(SHORT)}"


def over_optimised(past: Past) -> str:
    true, scores = past.last("objective/true_score", WINDOW), past.last("objective/scores", WINDOW)
    if past.best is None:
        return ""
    steps, best_true, best_scores = past.best
    mean, best, score, then = map(statistics.fmean, (true, best_true, scores, best_scores))
    error = math.sqrt((statistics.variance(true) + statistics.variance(best_true)) / WINDOW)
    if not (best - mean > max(0.05, 4 * error) and score >= then):
        return ""
    return (
        f"the true score fell from {best:.3g} (steps {steps}) to {mean:.3g} (steps {past.steps(WINDOW)}), the learned "
        f"score went from {then:.3g} to {score:.3g}"
    )


def no_signal(past: Past) -> str:
    spread, scores = past.last("objective/scores_std", SHORT), past.last("objective/scores", SHORT)
    if not all(s <= 1e-5 * max(1.0, abs(x)) for s, x in zip(spread, scores, strict=True)):
        return ""
    return f"all responses of a rollout have one score, {scores[-1]:.3g}, steps {past.steps(SHORT)}"


def alignment_tax(past: Past) -> str:
    if len(past.evaluations) < 2:
        return ""
    (first, began), (last, now) = (
        (row["step"], figure(row, "pretrain_loss")) for row in past.evaluations
    )
    if not now > began + 0.2:
        return ""
    return f"the loss on held-out pretraining text rose from {began:.3g} (after {first} steps) to {now:.3g} (after {last})"


def chance(past: Past) -> str:
    over = 0.75 * past.config["steps"] or 200
    if not past.rows or past.rows[-1]["step"] + 1 < over:
        return ""
    right = past.mean("accuracy", LONG) + past.mean("ties", LONG) / 2
    if not right < 0.52:
        return ""
    return f"accuracy {100 * right:.1f} %, a tie half right, over steps {past.steps(LONG)}"


def loss(past: Past) -> str:
    now = past.mean("loss", WINDOW)
    if not now > past.lowest + 0.5:
        return ""
    return f"loss {now:.3g}, mean of steps {past.steps(WINDOW)}; it had been {past.lowest:.3g}"


PPO, RANKING = ("ppo",), ("ranking",)
RULES = [
    Rule(
        "kl",
        PPO,
        kl,
        f"mean `objective/kl_per_token` of {SHORT} steps over 0.5 nats; or over 0.2 and three times that of {WINDOW} steps "
        "before",
        "the policy leaves what the reference would write, and with it what the reward model can judge",
        "raise ppo.kl_coef, lower optimiser.learning_rate or ppo.epochs, stop earlier",
    ),
    Rule(
        "explained_variance",
        PPO,
        explained_variance,
        f"mean `value/explained_variance` below 0 over {WINDOW} steps, in all of which the policy learns and scores "
        "differ",
        "the value model predicts returns worse than their mean would, and advantages are mostly its errors",
        "raise ppo.value_warmup_steps, change value_optimiser.learning_rate, start parents.value from the reward model",
    ),
    Rule(
        "clip_high",
        PPO,
        clip_high,
        f"mean `policy/clipfrac_avg` of {SHORT} steps over 0.3",
        "the updates of a rollout go further than its samples can tell",
        "lower optimiser.learning_rate, ppo.epochs or ppo.minibatches",
    ),
    Rule(
        "clip_zero",
        PPO,
        clip_zero,
        f"`policy/clipfrac_avg` 0 in {LONG} steps running, with more than one update a rollout, and mean "
        "`objective/kl_per_token` within 3e-4 of 0",
        "the learning rate is too small, and the policy stays where it began",
        "raise optimiser.learning_rate, ppo.epochs or ppo.minibatches",
    ),
    Rule(
        "entropy",
        PPO,
        entropy,
        f"mean `policy/entropy_avg` of {SHORT} steps under a tenth of step 0's",
        "the policy has settled on one response to a prompt, and explores no more",
        "raise ppo.kl_coef, lower optimiser.learning_rate, set ppo.top_p=1, look at samples.jsonl",
    ),
    Rule(
        "truncated",
        PPO,
        truncated,
        f"mean `response/truncated` of {SHORT} steps over a half",
        "the limit is too short for the task, or the policy does not know its end token; each of these scores "
        "ppo.truncated_score, whatever it says",
        "raise ppo.response_length, train parents.policy longer on conversations, look at samples.jsonl",
    ),
    Rule(
        "one_length",
        PPO,
        one_length,
        f"all responses of {SHORT} steps of one length, though not all cut off, and those of step 0 were not; or all of "
        "them nothing but the end token",
        "the policy has collapsed onto one form, which the reward pays for whatever the prompt",
        "look at samples.jsonl, mend the reward, raise ppo.kl_coef, lower optimiser.learning_rate",
    ),
    Rule(
        "over_optimised",
        PPO,
        over_optimised,
        f"mean `objective/true_score` of {WINDOW} steps below that of its best {WINDOW} by 0.05 and by four standard errors, "
        "mean `objective/scores` not below what it was then",
        "the policy finds what the reward overrates (Goodhart's law)",
        "set steps to where the true score was best, raise ppo.kl_coef, train parents.reward on more and cleaner "
        "comparisons",
    ),
    Rule(
        "no_signal",
        PPO,
        no_signal,
        f"`objective/scores_std` 0, to rounding, in {SHORT} steps running",
        "the reward tells no response from another; what is learnt is the value model's errors",
        "look at samples.jsonl, mend ppo.reward_fn or parents.reward, take prompts that are neither too hard nor too easy",
    ),
    Rule(
        "alignment_tax",
        PPO,
        alignment_tax,
        "`pretrain_loss` of an evaluation over that of the first one by 0.2 nats",
        "the policy forgets what pretraining gave it",
        "raise ppo.pretrain_coef and ppo.pretrain_ratio, raise ppo.kl_coef, lower optimiser.learning_rate",
    ),
    Rule(
        "chance",
        RANKING,
        chance,
        f"mean `accuracy` and half of `ties` of {LONG} steps below 0.52, with three quarters of the run over (with "
        "steps=0: 200 steps)",
        "the labels do not depend on the text (chosen and rejected mixed up), or the learning rate is far off",
        "look at samples.jsonl and data.train, change optimiser.learning_rate, run PMP first",
    ),
    Rule(
        "loss",
        ("lm", "ranking"),
        loss,
        f"mean `loss` of {WINDOW} steps over its lowest so far (that of step 0, or of {WINDOW} steps) by 0.5 nats",
        "the learning rate is too high, or the data change on the way",
        "lower optimiser.learning_rate, raise optimiser.warmup_steps, lower optimiser.clip_norm",
    ),
]


class Adviser:
    """Says each kind of warning once, at the step at which it first holds."""

    def __init__(self, config: dict):
        """`config` is flat, {dotted field: value}, as `records.read` gives it."""
        self.past, self.rules = (
            Past(config),
            [rule for rule in RULES if config["stage"] in rule.stages],
        )

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
        return [
            Warning(rule.kind, step, said, rule.meaning, rule.remedy)
            for rule, said in found
            if said
        ]


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
