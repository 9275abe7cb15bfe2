"""The charts of the report page: a catalogue, and what of it a set of runs can show."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart over the steps of training."""

    title: str
    unit: str
    # Metric -> its label. A name that ends with "*" stands for all metrics that begin so, each
    # labelled by the rest of its name.
    lines: Mapping[str, str]
    # The figure of evaluations.jsonl that belongs here. Its value before training, in the summary,
    # is drawn as a dashed line.
    heldout: str = ""
    # Figures of the summary that begin with one of these are dashed lines, a parent's too.
    ends: tuple[str, ...] = ()
    log: bool = False  # a logarithmic axis
    rare: bool = False  # left out where all values are 0


CHARTS = (
    Chart(
        title="Score",
        unit="of the reward model",
        lines={"objective/scores": "score"},
        heldout="score",
    ),
    Chart(
        title="True score",
        unit="best 1",
        lines={"objective/true_score": "true score"},
        heldout="true_score",
    ),
    Chart(
        title="KL to the reference",
        unit="nats per response",
        lines={"objective/kl": "KL"},
        heldout="kl",
    ),
    Chart(
        title="KL to the reference",
        unit="nats per token",
        lines={"objective/kl_per_token": "KL"},
    ),
    Chart(
        title="Entropy",
        unit="nats per token",
        lines={"policy/entropy_avg": "entropy", "entropy": "entropy"},
        heldout="entropy",
    ),
    Chart(
        title="Entropy",
        unit="nats per response, estimated from the samples",
        lines={"objective/entropy": "entropy"},
    ),
    Chart(
        title="Reward with KL penalty",
        unit="normalised score",
        lines={
            "objective/rlhf_reward": "reward",
            "objective/non_score_reward": "penalty alone",
        },
    ),
    Chart(
        title="Running scores",
        unit="mean and deviation",
        lines={
            "reward/running_mean": "mean",
            "reward/running_std": "deviation",
            "objective/scores_std": "deviation of the step",
        },
    ),
    Chart(
        title="Clip fractions",
        unit="share of tokens",
        lines={"policy/clipfrac_avg": "policy", "val/clipfrac_avg": "value"},
    ),
    Chart(
        title="Explained variance",
        unit="of the returns, by the values",
        lines={"value/explained_variance": "explained"},
    ),
    Chart(
        title="Ratio",
        unit="new to old policy, mean",
        lines={"val/ratio": "ratio"},
    ),
    Chart(
        title="Ratio",
        unit="variance",
        lines={"val/ratio_var": "variance"},
    ),
    Chart(
        title="Change of the policy",
        unit="approximate KL of an update",
        lines={"policy/approxkl_avg": "KL"},
    ),
    Chart(
        title="Response length",
        unit="tokens",
        lines={"response/length_mean": "mean", "response/length_max": "longest"},
        heldout="length",
    ),
    Chart(
        title="Truncated",
        unit="share of responses",
        lines={"response/truncated": "truncated"},
        heldout="truncated",
    ),
    Chart(
        title="Loss",
        unit="nats per target",
        lines={"loss": "loss"},
        ends=("heldout_loss", "loss/"),
    ),
    Chart(
        title="Accuracy",
        unit="share of pairs",
        lines={"accuracy": "in training", "rewards/accuracies": "of implicit rewards, in training"},
        ends=("accuracy/",),
    ),
    Chart(
        title="Margin",
        unit="chosen minus rejected score",
        lines={"margin": "margin", "mean_reward": "mean score"},
    ),
    Chart(
        title="Implicit rewards",
        unit="beta times the log-ratio to the reference",
        lines={
            "rewards/chosen": "chosen",
            "rewards/rejected": "rejected",
            "rewards/margins": "margin",
        },
        ends=("margin/",),
    ),
    Chart(
        title="Log-probabilities",
        unit="nats per response",
        lines={"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    Chart(
        title="Policy loss",
        unit="clipped objective",
        lines={"loss/policy_avg": "policy"},
    ),
    Chart(
        title="Value loss",
        unit="squared error",
        lines={"loss/value_avg": "value"},
    ),
    Chart(
        title="Loss on pretraining text",
        unit="nats per token",
        lines={"loss/pretrain_avg": "pretraining"},
        heldout="pretrain_loss",
    ),
    Chart(
        title="Gradient norm",
        unit="before clipping",
        lines={
            "grad_norm": "all",
            "policy/grad_norm": "policy",
            "pretrain/grad_norm": "pretraining text",
        },
    ),
    Chart(
        title="Gradient norm of the value model",
        unit="before clipping",
        lines={"value/grad_norm": "value"},
    ),
    Chart(
        title="Pretraining gradient",
        unit="its norm divided by that of the policy's gradient",
        lines={"pretrain/grad_norm_ratio": "ratio"},
    ),
    Chart(
        title="Learning rate",
        unit="",
        lines={"lr": "policy"},
    ),
    Chart(
        title="Skipped updates",
        unit="not finite",
        lines={"skipped": "all", "policy/skipped": "policy", "value/skipped": "value"},
        rare=True,
    ),
    Chart(
        title="Ties",
        unit="share of pairs",
        lines={"ties": "ties"},
        rare=True,
    ),
    Chart(
        title="Sampler compared with scorer",
        unit="difference of log p",
        lines={"sampler/drift_mean": "mean", "sampler/drift_max": "largest"},
    ),
    Chart(
        title="Time per step",
        unit="seconds",
        lines={"timing/seconds": "step", "timing/evaluation_seconds": "evaluation"},
        log=True,
    ),
    Chart(
        title="Time by phase",
        unit="seconds",
        lines={"timing/phases/*": ""},
        log=True,
    ),
    Chart(
        title="Episodes",
        unit="per second",
        lines={"timing/eps": "episodes"},
    ),
    Chart(
        title="Compiled programs",
        unit="so far",
        lines={"timing/compilations": "programs"},
    ),
)
REWARD_MEAN = "objective/rewards/"  # begins the metric of one of several rewards
NOT_DRAWN = {"step", "episode", "val/num_eos_tokens", "timing/step"}


def page_charts(runs: list[dict]) -> list[dict]:
    """Return the charts of the page for runs as `content.describe` gives them.

    First the charts of the catalogue that some run has data for, then one chart for each metric
    that no chart names.
    """
    names = metric_names(runs) - NOT_DRAWN
    charts = []
    known = set()
    first, *others = CHARTS  # the score, followed by what it is made of
    for chart in (first, *reward_charts(names), *others):
        lines = labelled_lines(chart, names)
        known |= set(lines)
        if chart.rare and not any_value(runs, lines):
            continue
        heldout = chart.heldout if has_heldout(runs, chart.heldout) else ""
        if lines or heldout:
            charts.append(page_chart(chart, lines, heldout, list(dashed_lines(chart, runs))))
    for name in sorted(names - known):
        chart = Chart(title=name, unit="", lines={name: name})
        charts.append(page_chart(chart, chart.lines, "", []))
    return charts


def reward_charts(names: set[str]) -> Iterator[Chart]:
    """Yield a chart for each of several rewards, with its score on held-out prompts."""
    for name in sorted(name for name in names if name.startswith(REWARD_MEAN)):
        reward = name.removeprefix(REWARD_MEAN)
        lines = {
            name: "score",
            f"objective/rewards_std/{reward}": "deviation",
            f"reward/running_mean/{reward}": "running mean",
            f"reward/running_std/{reward}": "running deviation",
        }
        yield Chart(
            title=f"Reward {reward}",
            unit="its own score",
            lines=lines,
            heldout=f"score/{reward}",
        )


def metric_names(runs: list[dict]) -> set[str]:
    """Return the metrics that some run has a value of."""
    return {name for run in runs for name, curve in run["series"].items() if curve["steps"]}


def labelled_lines(chart: Chart, names: set[str]) -> dict[str, str]:
    """Return {metric: label} of a chart's lines, for the metrics among `names`."""
    lines = {}
    for name, label in chart.lines.items():
        if name.endswith("*"):
            prefix = name.removesuffix("*")
            matching = sorted(metric for metric in names if metric.startswith(prefix))
            lines |= {metric: metric.removeprefix(prefix) for metric in matching}
        elif name in names:
            lines[name] = label
    return lines


def any_value(runs: list[dict], names: Mapping[str, str]) -> bool:
    """Return whether some value of these metrics is not 0."""
    return any(
        sum(run["series"][name]["values"])
        for run in runs
        for name in names
        if name in run["series"]
    )


def has_heldout(runs: list[dict], figure: str) -> bool:
    return any(figure in run["heldout"] for run in runs)


def page_chart(chart: Chart, lines: Mapping[str, str], heldout: str, marks: list[dict]) -> dict:
    """Return a chart as the page's script reads it."""
    return {
        "title": chart.title,
        "unit": chart.unit,
        "lines": dict(lines),
        "heldout": heldout,
        "log": chart.log,
        "marks": marks,
    }


def dashed_lines(chart: Chart, runs: list[dict]) -> Iterator[dict]:
    """Yield a chart's dashed lines as {"run": number, "words": label, "value"}.

    They are the figure on held-out data before training, and figures at the end of a run and, for
    comparison, at the end of its parents.
    """
    for number, run in enumerate(runs):
        before = run["summary"].get(f"{chart.heldout}/before")
        if before is not None and chart.heldout != "kl":  # the KL before training is 0
            yield {"run": number, "words": "before training, held-out", "value": before}
        names = [name for name in run["summary"] if name.startswith(chart.ends)]
        ends = [("at the end", run["summary"])]
        if run["stage"] == "ranking":  # language models learn from different texts than parents
            ends += [(parent["spec"], parent["summary"]) for parent in run["parents"]]
        for source, summary in ends:
            for name in names:
                if name in summary:
                    data = name.partition("/")[2] or "held-out"
                    yield {"run": number, "words": f"{source}, {data}", "value": summary[name]}
