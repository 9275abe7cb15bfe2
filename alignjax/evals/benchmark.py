"""Define a benchmark as tasks of lm-evaluation-harness: the parts that all benchmarks share.

A benchmark has up to two settings. In "zero", our own tasks ask with an instruction and a
question, let the model write, and extract the answer from what it wrote. In "few", the harness's
own tasks show examples first. Replies are greedy. The harness keeps each reply in its samples:
`resps` holds the text, `filtered_resps` the extracted answer, and the values of the metrics for
this document stand next to them.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.tasks
from lm_eval.api.filter import Filter

from alignjax.config import UserError, nearest

HARNESS = Path(lm_eval.tasks.__file__).parent

# A model writes these out as text if its tokenizer does not know them as end tokens.
END_STRINGS = ["<|im_end|>", "<|endoftext|>", "</s>"]

Task = dict[str, Any]  # the config of a task of the harness


class Figure(NamedTuple):
    """A figure of a group of tasks that stands in the table."""

    metric: str
    filter: str
    # True: the share of documents that are right. False: a mean of values between 0 and 1.
    is_share: bool = True


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark of the report, or of the embedded world."""

    name: str
    title: str
    shots: int  # examples in the few-shot setting
    headline: dict[str, Figure]  # by setting; its keys are the settings that exist
    # make_task(setting, subject, folder): the folder holds local files; "" means the hub's data
    make_task: Callable[[str, str, str], Task]
    subjects: tuple[str, ...]
    source: str = ""  # where to get the local files and where to put them; "" if there are none
    harness_folders: dict[str, str] = field(default_factory=dict)  # the harness's tasks, by setting
    more_figures: tuple[tuple[str, Figure], ...] = ()  # (title, figure), for a table of its own
    weight_by_size: bool = True  # average over documents; if False, over subjects

    def group(
        self, setting: str, data_dir: Path | str | None = None, subjects: tuple[str, ...] = ()
    ) -> dict:
        """Return a group such as mmlu-5shot for `registry.load`, of all or some subjects.

        Raises UserError for an unknown setting or subject.
        """
        if setting not in self.headline:
            hint = nearest(setting, tuple(self.headline))
            raise UserError(f"{self.name}: there is no setting {setting!r}{hint}")
        for subject in subjects:
            if subject not in self.subjects:
                hint = nearest(subject, self.subjects)
                raise UserError(f"{self.name}:{subject}: there is no such subject{hint}")
        folder = str(Path(data_dir) / self.name) if data_dir else ""
        chosen_subjects = dict.fromkeys(subjects) or self.subjects
        return {
            "group": self.group_name(setting),
            "task": [self.make_task(setting, subject, folder) for subject in chosen_subjects],
            "aggregate_metric_list": [
                self.aggregation(figure)
                for figure in (self.headline[setting], *(figure for _, figure in self.more_figures))
            ],
        }

    def group_name(self, setting: str) -> str:
        """Return the name of a setting's group, such as mmlu-5shot."""
        return f"{self.name}-{self.shots_of(setting)}shot"

    def shots_of(self, setting: str) -> int:
        """Return the number of examples that a setting shows."""
        return self.shots if setting == "few" else 0

    def aggregation(self, figure: Figure) -> dict:
        """Return the harness's config for averaging a figure over the tasks of a group."""
        return {
            "metric": figure.metric,
            "filter_list": [figure.filter],
            "weight_by_size": self.weight_by_size,
            "aggregation": "mean",
        }


class Extraction(Filter):
    """A filter of the harness that extracts the answer from the one reply to each document."""

    @abstractmethod
    def answer(self, reply: str, doc: dict) -> Any:
        """Return the answer that a reply gives."""

    def apply(self, resps: list[list[str]], docs: list[dict]) -> list:
        """Return the answer of each document's reply."""
        return [self.answer(replies[0], doc) for replies, doc in zip(resps, docs, strict=True)]


def greedy_generation(max_tokens: int, *stop_strings: str) -> dict:
    """Return the generation settings of a greedy reply."""
    return {
        "until": [*END_STRINGS, *stop_strings],
        "do_sample": False,
        "temperature": 0.0,
        "max_gen_toks": max_tokens,
    }


def judged_replies(
    extraction: type[Filter],
    judge: Callable[[dict, list], dict],
    *metrics: str,
    name: str = "extract",
    **arguments: str,
) -> Task:
    """Return the part of a task's config that judges replies.

    `extraction(**arguments)` is the filter, called `name`. `judge(doc, [answer])` returns the
    metrics, which are averaged.
    """
    return {
        "output_type": "generate_until",
        "filter_list": [{"name": name, "filter": [{"function": extraction, **arguments}]}],
        "process_results": judge,
        "metric_list": [mean_of(metric) for metric in metrics],
        "metadata": {"version": 1.0},
    }


def mean_of(metric: str) -> dict:
    """Return the config of a metric that is averaged over documents."""
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def local_data(read: Callable, folder: str, **arguments: str) -> Task:
    """Return the part of a task's config that reads the data set from local files.

    Without a folder the part is empty, and the harness takes the hub's data set.
    """
    if not folder:
        return {}
    return {"custom_dataset": read, "dataset_kwargs": {"folder": folder, **arguments}}


def harness_subjects(folder: str, prefix: str) -> tuple[str, ...]:
    """Return the subjects that the harness has a task for, from the names of its files."""
    files = (HARNESS / folder).glob(f"{prefix}[a-z]*.yaml")
    return tuple(sorted(file.stem.removeprefix(prefix) for file in files))
