"""OpenAI's summarize_from_feedback: two summaries of one post."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from alignjax.config import UserError
from alignjax.data.preferences.base import Comparisons, Pair, Source
from alignjax.data.preferences.rows import Row, fault, field

# No checksums of these files are published: those of the downloads are kept with the prepared set.
URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons/"
BATCHES = (*range(3, 21), 22)
FILES = [f"batch{number}.json" for number in BATCHES] + [
    "edit_b2_eval_test.json",
    "batch0_cnndm.json",
    "cnndm0.json",
    "cnndm2.json",
]
# Final figures are on valid2, says the README.
SPLITS = {"train": "train", "validation": "valid1", "test": "valid2"}
SUP4 = {f"batch{number}" for number in range(3, 11)}


@dataclass(frozen=True)
class Options:
    """Which rows, and how a post becomes a prompt.

    The layouts are the authors' own: tldr_task and cnndm_task in utils/experiment_helpers.py of
    their repository.
    """

    # Rows about news articles, which are evaluations, in valid1 and valid2.
    cnndm: Literal["drop", "keep"] = "drop"
    # Subreddit, title and post, or the post alone; then "TL;DR:".
    layout: Literal["full", "post"] = "full"
    # Every row of the split, or the paper's final training set, batches 3 to 10.
    train: Literal["all", "sup4"] = "all"


class Summarize(Comparisons):
    """Comparisons of two summaries (Stienon et al. 2020, arXiv:2009.01325).

    CC-BY-4.0, according to secondary sources. The prompt is one message of the user, and a summary
    is stripped. Empty and equal summaries are dropped.
    """

    name = "summarize"
    Options = Options
    HOMEPAGE = "https://github.com/openai/summarize-from-feedback"

    def sources(self) -> dict[str, dict[str, Source]]:
        """Return all files for each split: a file holds rows of several."""
        return {split: {name: Source(URL + name) for name in FILES} for split in SPLITS}

    def of_split(self, row: Row, split: str) -> bool:
        """Return whether a row belongs to a split, by its own field."""
        own_split = field(row, "split", str)
        if own_split not in SPLITS.values():
            raise UserError(
                f"{row.where}: split: expected one of {', '.join(SPLITS.values())}, "
                f"found {own_split!r}"
            )
        return own_split == SPLITS[split]

    def compare(self, rows: Iterator[Row], split: str, dropped: Counter) -> Iterator[Pair]:
        """Yield the two summaries of each row."""
        for row in rows:
            choice = field(row, "choice", int)
            if choice not in (0, 1):
                raise UserError(f"{row.where}: choice: expected 0 or 1, found {choice}")
            article = field(row, "info.article", str, optional=True)
            if article is None:
                prompt = prompt_of_post(row, self.builder_config.options.layout)
            else:
                prompt = f"Article:\n{article.strip()}\n\nTL;DR:"
            summaries = [field(row, f"summaries.{i}.text", str).strip() for i in (0, 1)]
            chosen = summaries[choice]
            rejected = summaries[1 - choice]
            reason = self.filter_reason(row, split, article) or fault(chosen, rejected)
            if reason:
                dropped[reason] += 1
                continue
            yield Pair(
                id=row.id,
                prompt=[{"role": "user", "content": prompt}],
                chosen=chosen,
                rejected=rejected,
            )

    def filter_reason(self, row: Row, split: str, article: str | None) -> str:
        """Return why the options drop a row, or ""."""
        options = self.builder_config.options
        if article is not None and options.cnndm == "drop":
            return "about a news article"
        if split == "train" and options.train == "sup4":
            if field(row, "batch", str) not in SUP4:
                return "not of batches 3 to 10"
        return ""


def prompt_of_post(row: Row, layout: str) -> str:
    """Return the prompt of a Reddit post."""
    post = field(row, "info.post", str).strip()
    if layout == "post":
        return f"{post}\n\nTL;DR:"
    subreddit = field(row, "info.subreddit", str).strip()
    title = field(row, "info.title", str).strip()
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
