"""A benchmark as tasks of lm-evaluation-harness: what all of them share.

A benchmark has up to two settings: "zero", where our tasks ask by an instruction and a question, let the model write,
and take the answer out of what it wrote; and "few", where the harness' own tasks show examples first. Replies are
greedy. The harness keeps each reply in its samples: `resps` is what was written, `filtered_resps` the extracted
answer, and the metric's value for this document stands beside them.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import lm_eval.tasks
from lm_eval.api.filter import Filter

from alignjax.config import UserError, nearest

HARNESS = Path(lm_eval.tasks.__file__).parent
ENDS = [
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
]  # written out by a model whose tokenizer doesn't know them as ends


class Headline(NamedTuple):
    """A group's figure that stands in the table."""

    metric: str
    filter: str
    share: bool = (
        True  # a share of the documents, each right or wrong; else a mean of what lies between
    )


@dataclass(frozen=True)
class Benchmark:
    """`task(setting, subject, folder)` is one task's config; `folder` has the local files, "" means the hub's data set."""

    name: str
    title: str
    shots: int  # in the few-shot setting
    headline: dict[str, Headline]  # setting -> figure; its keys are the settings that there are
    task: Callable[[str, str, str], dict]
    subjects: tuple[str, ...]
    source: str = ""  # where the local files are to be had and where they go; "" if there are none
    harness: dict[str, str] = field(
        default_factory=dict
    )  # setting -> folder of the tasks it takes from the harness
    more: tuple[
        tuple[str, Headline], ...
    ] = ()  # further figures and their titles, in a table of its own
    weight_by_size: bool = True  # the average is over documents, not over subjects

    def group(
        self, setting: str, data_dir: Path | None = None, subjects: tuple[str, ...] = ()
    ) -> dict:
        """A group for `registry.load`, such as mmlu-5shot, of all subjects or of those that are named.

        UserError for a setting or a subject that there isn't.
        """
        if setting not in self.headline:
            raise UserError(f"{self.name}: no such setting{nearest(setting, tuple(self.headline))}")
        for subject in subjects:
            if subject not in self.subjects:
                raise UserError(
                    f"{self.name}:{subject}: no such subject{nearest(subject, self.subjects)}"
                )
        folder = str(Path(data_dir) / self.name) if data_dir else ""
        figures = [self.headline[setting], *(figure for _, figure in self.more)]
        return {
            "group": f"{self.name}-{self.shots if setting == 'few' else 0}shot",
            "task": [
                self.task(setting, subject, folder)
                for subject in dict.fromkeys(subjects) or self.subjects
            ],
            "aggregate_metric_list": [
                {
                    "metric": x.metric,
                    "filter_list": [x.filter],
                    "weight_by_size": self.weight_by_size,
                    "aggregation": "mean",
                }
                for x in figures
            ],
        }


class Extraction(Filter):
    """A harness filter that takes the answer out of the one reply to each document."""

    @abstractmethod
    def answer(self, reply: str, doc: dict): ...

    def apply(self, resps, docs):
        return [self.answer(replies[0], doc) for replies, doc in zip(resps, docs, strict=True)]


def greedy(max_gen_toks: int, *until: str) -> dict:
    return {
        "until": [*ENDS, *until],
        "do_sample": False,
        "temperature": 0.0,
        "max_gen_toks": max_gen_toks,
    }


def answered(
    extraction: type[Extraction],
    verdict: Callable,
    *metrics: str,
    name: str = "extract",
    **arguments,
) -> dict:
    """The part of a task's config that judges replies: `verdict(doc, [answer])` gives the metrics, each averaged."""
    return {
        "output_type": "generate_until",
        "filter_list": [{"name": name, "filter": [{"function": extraction, **arguments}]}],
        "process_results": verdict,
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics
        ],
        "metadata": {"version": 1.0},
    }


def published(read: Callable, folder: str, **arguments) -> dict:
    """The part of a task's config that has its data set read from local files; nothing without a folder: the hub's."""
    return (
        {"custom_dataset": read, "dataset_kwargs": {"folder": folder, **arguments}}
        if folder
        else {}
    )


def subjects_of(folder: str, prefix: str) -> tuple[str, ...]:
    """The subjects that the harness has a task for, by the names of its files."""
    return tuple(
        sorted(p.stem.removeprefix(prefix) for p in (HARNESS / folder).glob(f"{prefix}[a-z]*.yaml"))
    )
