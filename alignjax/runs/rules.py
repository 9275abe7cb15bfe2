"""The rules behind the warnings: each looks at a bounded window of a run's figures.

A rule is a function that takes the `History` of a run and returns what it observed, with its
figures, or "" if it does not hold. docs/metrics.md has the table of the rules.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# How many steps a rule looks at.
SHORT = 5
WINDOW = 10
LONG = 20

PPO = ("ppo",)
RANKING = ("ranking",)
DPO = ("dpo",)


@dataclass(frozen=True, kw_only=True)
class BestWindow:
    """The WINDOW steps with the highest mean true score so far."""

    steps: str  # their numbers, in words
    true_scores: list[float]
    scores: list[float]


class History:
    """The figures of a run so far, as far as the rules need them.

    A missing figure is NaN, for which no rule holds.
    """

    def __init__(self, config: dict[str, Any]):
        """Begin a history; `config` is flat, {dotted field: value}."""
        self.config = config
        self.first: dict[str, Any] = {}  # the row of the first step
        self.rows: deque[dict[str, Any]] = deque(maxlen=LONG)
        self.evaluations: tuple[dict[str, Any], ...] = ()  # the first and the last one
        self.best: BestWindow | None = None
        self.lowest_loss = math.inf  # of the first step, or the mean of WINDOW steps

    def add_step(self, row: dict[str, Any]) -> None:
        """Add a row of metrics.jsonl."""
        self.first = self.first or row
        self.rows.append(row)
        self._update_best()
        for loss in (figure(self.first, "loss"), self.mean("loss", WINDOW)):
            if loss < self.lowest_loss:  # false for NaN
                self.lowest_loss = loss

    def add_evaluation(self, row: dict[str, Any]) -> None:
        """Add a row of evaluations.jsonl."""
        self.evaluations = (*self.evaluations[:1], row)

    def last(self, name: str, count: int, before: int = 0) -> list[float]:
        """Return a figure of the last `count` steps, or of as many `before` steps earlier.

        Returns [NaN] if there are not that many steps.
        """
        rows = list(self.rows)[: len(self.rows) - before][-count:]
        return [figure(row, name) for row in rows] if len(rows) == count else [math.nan]

    def mean(self, name: str, count: int, before: int = 0) -> float:
        """Return the mean of `last`."""
        return statistics.fmean(self.last(name, count, before))

    def steps(self, count: int) -> str:
        """Return the numbers of the last `count` steps, in words."""
        return f"{self.rows[-count]['step']} to {self.rows[-1]['step']}"

    def _update_best(self) -> None:
        true_scores = self.last("objective/true_score", WINDOW)
        if math.isnan(sum(true_scores)):
            return
        if self.best is None or sum(true_scores) > sum(self.best.true_scores):
            self.best = BestWindow(
                steps=self.steps(WINDOW),
                true_scores=true_scores,
                scores=self.last("objective/scores", WINDOW),
            )


def figure(row: dict[str, Any], name: str) -> float:
    """Return a figure of a row, NaN if it is missing or null."""
    value = row.get(name)
    return math.nan if value is None else value


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of warning."""

    kind: str
    stages: tuple[str, ...]
    observe: Callable[[History], str]  # what was seen, "" if the rule does not hold
    condition: str  # the rule in words, for docs/metrics.md
    meaning: str  # what it usually means
    remedy: str  # what to try


RULES: list[Rule] = []


def rule(
    *, kind: str, stages: tuple[str, ...], condition: str, meaning: str, remedy: str
) -> Callable[[Callable[[History], str]], Callable[[History], str]]:
    """Add the decorated function to RULES."""

    def add(observe: Callable[[History], str]) -> Callable[[History], str]:
        RULES.append(
            Rule(
                kind=kind,
                stages=stages,
                observe=observe,
                condition=condition,
                meaning=meaning,
                remedy=remedy,
            )
        )
        return observe

    return add


@rule(
    kind="kl",
    stages=PPO,
    condition=f"mean `objective/kl_per_token` of {SHORT} steps is above 0.5 nats",
    meaning=(
        "the policy moves away from the reference, into text that the reward model cannot judge"
    ),
    remedy="raise ppo.kl_coef, lower optimiser.learning_rate or ppo.epochs, stop earlier",
)
def kl_is_high(history: History) -> str:
    """Observe a KL to the reference that is high."""
    name = "objective/kl_per_token"
    now = history.mean(name, SHORT)
    if not now > 0.5:
        return ""
    earlier = history.mean(name, SHORT, before=WINDOW)
    comparison = "" if math.isnan(earlier) else f", {earlier:.3g} a token {WINDOW} steps earlier"
    per_response = history.mean("objective/kl", SHORT)
    return (
        f"KL to the reference is {per_response:.3g} nats a response, {now:.3g} a token in the "
        f"last {SHORT} steps{comparison}"
    )


@rule(
    kind="explained_variance",
    stages=PPO,
    condition=(
        f"mean `value/explained_variance` is below 0 over {WINDOW} steps, in all of which the "
        "policy learns and the scores differ"
    ),
    meaning=(
        "the value model predicts returns worse than their mean would, so the advantages are "
        "mostly its errors"
    ),
    remedy=(
        "raise ppo.value_warmup_steps, change value_optimiser.learning_rate, start parents.value "
        "from the reward model"
    ),
)
def values_explain_nothing(history: History) -> str:
    """Observe values that predict returns worse than a constant."""
    explained = history.mean("value/explained_variance", WINDOW)
    # A run writes this once the policy learns, that is after the warm-up of the values.
    policy_learns = not math.isnan(sum(history.last("policy/approxkl_avg", WINDOW)))
    # If all scores are equal, returns differ only by rounding.
    scores_differ = min(history.last("objective/scores_std", WINDOW)) > 1e-5
    if not (explained < 0 and scores_differ and policy_learns):
        return ""
    return (
        f"the explained variance of the values is {explained:.3g}, "
        f"mean of steps {history.steps(WINDOW)}"
    )


@rule(
    kind="clip_high",
    stages=PPO,
    condition=f"mean `policy/clipfrac_avg` of {SHORT} steps is above 0.3",
    meaning="the updates of a rollout go further than its samples justify",
    remedy="lower optimiser.learning_rate, ppo.epochs or ppo.minibatches",
)
def clip_binds_often(history: History) -> str:
    """Observe updates of which the clip cuts off a large part."""
    share = history.mean("policy/clipfrac_avg", SHORT)
    if not share > 0.3:
        return ""
    return f"the clip binds on {100 * share:.0f} % of tokens, mean of steps {history.steps(SHORT)}"


@rule(
    kind="clip_zero",
    stages=PPO,
    condition=(
        f"`policy/clipfrac_avg` is 0 in {LONG} successive steps with more than one update per "
        "rollout, and mean `objective/kl_per_token` is within 3e-4 of 0"
    ),
    meaning="the learning rate is too small, and the policy stays where it started",
    remedy="raise optimiser.learning_rate, ppo.epochs or ppo.minibatches",
)
def clip_never_binds(history: History) -> str:
    """Observe a policy that hardly moves."""
    shares = history.last("policy/clipfrac_avg", LONG)
    kl_per_token = history.mean("objective/kl_per_token", LONG)
    # The first update of a rollout is never clipped, because its ratio is 1.
    has_later_updates = history.config["ppo.epochs"] * history.config["ppo.minibatches"] > 1
    if not (has_later_updates and set(shares) == {0.0} and abs(kl_per_token) < 3e-4):
        return ""
    return (
        f"the clip binds on no token in steps {history.steps(LONG)}, and the KL to the reference "
        f"is {kl_per_token:.2g} nats a token: the policy hardly moves"
    )


@rule(
    kind="entropy",
    stages=PPO,
    condition=f"mean `policy/entropy_avg` of {SHORT} steps is below a tenth of its value at step 0",
    meaning="the policy has settled on one response to each prompt and no longer explores",
    remedy=(
        "raise ppo.kl_coef, lower optimiser.learning_rate, set ppo.top_p=1, look at samples.jsonl"
    ),
)
def entropy_collapsed(history: History) -> str:
    """Observe an entropy that is a small part of what it was."""
    name = "policy/entropy_avg"
    at_start = figure(history.first, name)
    now = history.mean(name, SHORT)
    if not now < 0.1 * at_start:
        return ""
    return (
        f"entropy is {now:.2g} nats a token, mean of steps {history.steps(SHORT)}; "
        f"it was {at_start:.2g} at the start"
    )


@rule(
    kind="truncated",
    stages=PPO,
    condition=f"mean `response/truncated` of {SHORT} steps is above one half",
    meaning=(
        "the limit is too short for the task, or the policy does not know its end token; each "
        "truncated response scores ppo.truncated_score, whatever it says"
    ),
    remedy=(
        "raise ppo.response_length, train parents.policy longer on conversations, look at "
        "samples.jsonl"
    ),
)
def responses_do_not_end(history: History) -> str:
    """Observe responses most of which reach the length limit."""
    share = history.mean("response/truncated", SHORT)
    if not share > 0.5:
        return ""
    limit = history.config["ppo.response_length"]
    return (
        f"{100 * share:.0f} % of responses do not end within ppo.response_length={limit} tokens, "
        f"steps {history.steps(SHORT)}"
    )


@rule(
    kind="one_length",
    stages=PPO,
    condition=(
        f"all responses of {SHORT} steps have one length, most of them are not truncated, and "
        "those of step 0 had several lengths; or all of them are just the end token"
    ),
    meaning="the policy has collapsed onto one form, which the reward pays for whatever the prompt",
    remedy=(
        "look at samples.jsonl, correct the reward, raise ppo.kl_coef, lower "
        "optimiser.learning_rate"
    ),
)
def responses_have_one_length(history: History) -> str:
    """Observe responses that are all equally long, for no reason but the policy's.

    A task may ask for one length, so one length from the start on is no fault. Empty responses
    always are.
    """
    means = history.last("response/length_mean", SHORT)
    longest = history.last("response/length_max", SHORT)
    for mean, maximum in zip(means, longest, strict=True):
        if not abs(mean - maximum) < 1e-3:
            return ""
    one_length = len({round(length) for length in longest}) == 1
    mostly_ended = history.mean("response/truncated", SHORT) < 0.5
    first_maximum = figure(history.first, "response/length_max")
    first_mean = figure(history.first, "response/length_mean")
    from_the_start = first_maximum - first_mean < 1e-3
    empty = longest[0] == 1
    if not (one_length and mostly_ended and (not from_the_start or empty)):
        return ""
    length = "just the end token" if empty else f"{longest[0]:.0f} tokens long"
    return f"every response is {length}, steps {history.steps(SHORT)}"


@rule(
    kind="over_optimised",
    stages=PPO,
    condition=(
        f"mean `objective/true_score` of {WINDOW} steps is below that of its best {WINDOW} steps "
        "by 0.05 and by four standard errors, and mean `objective/scores` is not below its value "
        "then"
    ),
    meaning="the policy exploits what the reward overrates (Goodhart's law)",
    remedy=(
        "set steps to where the true score was best, raise ppo.kl_coef, train parents.reward on "
        "more and cleaner comparisons"
    ),
)
def true_score_falls(history: History) -> str:
    """Observe a true score that falls while the learned score does not."""
    best = history.best
    if best is None:
        return ""
    true_scores = history.last("objective/true_score", WINDOW)
    true_now = statistics.fmean(true_scores)
    true_best = statistics.fmean(best.true_scores)
    score_now = history.mean("objective/scores", WINDOW)
    score_best = statistics.fmean(best.scores)
    variance = statistics.variance(true_scores) + statistics.variance(best.true_scores)
    standard_error = math.sqrt(variance / WINDOW)
    if not (true_best - true_now > max(0.05, 4 * standard_error) and score_now >= score_best):
        return ""
    return (
        f"the true score fell from {true_best:.3g} (steps {best.steps}) to {true_now:.3g} (steps "
        f"{history.steps(WINDOW)}), while the learned score went from {score_best:.3g} to "
        f"{score_now:.3g}"
    )


@rule(
    kind="no_signal",
    stages=PPO,
    condition=f"`objective/scores_std` is 0, up to rounding, in {SHORT} successive steps",
    meaning=(
        "the reward does not distinguish responses, so the policy learns nothing from it; with a "
        "value model it learns that model's errors"
    ),
    remedy=(
        "look at samples.jsonl, correct ppo.reward_fn or parents.reward, choose prompts that are "
        "neither too hard nor too easy"
    ),
)
def scores_are_equal(history: History) -> str:
    """Observe rollouts whose responses all have one score."""
    deviations = history.last("objective/scores_std", SHORT)
    scores = history.last("objective/scores", SHORT)
    for deviation, score in zip(deviations, scores, strict=True):
        if not deviation <= 1e-5 * max(1.0, abs(score)):
            return ""
    return (
        f"all responses of a rollout have one score, {scores[-1]:.3g}, steps {history.steps(SHORT)}"
    )


@rule(
    kind="alignment_tax",
    stages=PPO,
    condition="`pretrain_loss` of an evaluation is above that of the first evaluation by 0.2 nats",
    meaning="the policy forgets what it learned in pretraining",
    remedy=(
        "raise ppo.pretrain_coef and ppo.pretrain_ratio, raise ppo.kl_coef, lower "
        "optimiser.learning_rate"
    ),
)
def text_loss_rises(history: History) -> str:
    """Observe a loss on pretraining text that has risen since the first evaluation."""
    if len(history.evaluations) < 2:
        return ""
    first, last = history.evaluations
    loss_then = figure(first, "pretrain_loss")
    loss_now = figure(last, "pretrain_loss")
    if not loss_now > loss_then + 0.2:
        return ""
    return (
        f"the loss on held-out pretraining text rose from {loss_then:.3g} (after {first['step']} "
        f"steps) to {loss_now:.3g} (after {last['step']})"
    )


@rule(
    kind="chance",
    stages=(*RANKING, *DPO),
    condition=(
        f"mean `accuracy` plus half of `ties` (dpo: mean `rewards/accuracies`) of {LONG} steps is "
        "below 0.52 after three quarters of the run (with steps=0, after 200 steps)"
    ),
    meaning=(
        "the labels do not depend on the text (chosen and rejected are mixed up), or the learning "
        "rate is far off"
    ),
    remedy="look at samples.jsonl and data.train, change optimiser.learning_rate, run PMP first",
)
def accuracy_is_chance(history: History) -> str:
    """Observe a reward model, or the implicit reward of DPO, that still guesses late in its run."""
    late = 0.75 * history.config["steps"] or 200
    if not history.rows or history.rows[-1]["step"] + 1 < late:
        return ""
    if history.config["stage"] == "dpo":
        correct = history.mean("rewards/accuracies", LONG)
        ties = ""
    else:
        correct = history.mean("accuracy", LONG) + history.mean("ties", LONG) / 2
        ties = ", with a tie counted as half,"
    if not correct < 0.52:
        return ""
    return f"accuracy is {100 * correct:.1f} %{ties} over steps {history.steps(LONG)}"


@rule(
    kind="displaced",
    stages=DPO,
    condition=(
        f"mean `rewards/chosen` of {LONG} steps is below 0, and further from 0 than mean "
        "`rewards/margins`"
    ),
    meaning=(
        "both responses become less probable, the rejected one a little more so: the policy moves "
        "to other responses than those of the comparisons"
    ),
    remedy=(
        "raise dpo.beta, lower optimiser.learning_rate or steps, train parents.policy on the "
        "chosen responses"
    ),
)
def chosen_is_displaced(history: History) -> str:
    """Observe chosen responses that become less probable by more than the margin grows."""
    chosen = history.mean("rewards/chosen", LONG)
    margin = history.mean("rewards/margins", LONG)
    if not (chosen < 0 and -chosen > margin):
        return ""
    return (
        f"the implicit reward of chosen responses is {chosen:.3g}, the margin {margin:.3g}, means "
        f"of steps {history.steps(LONG)}"
    )


@rule(
    kind="loss",
    stages=("lm", "ranking"),
    condition=(
        f"mean `loss` of {WINDOW} steps is above its lowest value so far (at step 0, or the mean "
        f"of {WINDOW} steps) by 0.5 nats"
    ),
    meaning="the learning rate is too high, or the data change during the run",
    remedy=(
        "lower optimiser.learning_rate, raise optimiser.warmup_steps, lower optimiser.clip_norm"
    ),
)
def loss_rises(history: History) -> str:
    """Observe a loss that is well above what it was."""
    now = history.mean("loss", WINDOW)
    if not now > history.lowest_loss + 0.5:
        return ""
    return (
        f"loss is {now:.3g}, mean of steps {history.steps(WINDOW)}; "
        f"it had been {history.lowest_loss:.3g}"
    )
