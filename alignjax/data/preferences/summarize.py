"""OpenAI's summarize_from_feedback: two summaries of one post."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from alignjax.config import UserError
from alignjax.data.preferences.base import Comparisons, Source, fault, field

# No checksum of these is published: the sha256 that is found is recorded with the prepared set.
URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons/"
FILES = [f"batch{i}.json" for i in (*range(3, 21), 22)] + [
    "edit_b2_eval_test.json",
    "batch0_cnndm.json",
    "cnndm0.json",
    "cnndm2.json",
]
SPLITS = {
    "train": "train",
    "validation": "valid1",
    "test": "valid2",
}  # final figures are on valid2, says the README
SUP4 = {f"batch{i}" for i in range(3, 11)}


@dataclass(frozen=True)
class Options:
    """The layouts are the authors' own: tldr_task and cnndm_task in utils/experiment_helpers.py of their repository."""

    cnndm: Literal["drop", "keep"] = (
        "drop"  # rows about news articles, which are evaluations, in valid1 and valid2
    )
    layout: Literal["full", "post"] = (
        "full"  # subreddit, title and post; or the post alone; then "TL;DR:"
    )
    train: Literal["all", "sup4"] = (
        "all"  # every row of the split, or the paper's final training set: batches 3 to 10
    )


class Summarize(Comparisons):
    """Comparisons of two summaries (Stienon et al. 2020, arXiv:2009.01325). CC-BY-4.0, by secondary sources.

    The prompt is one user's message, and a summary is stripped. Empty and equal summaries are dropped.
    """

    name = "summarize"
    Options = Options
    HOMEPAGE = "https://github.com/openai/summarize-from-feedback"

    def sources(self):
        return {split: {name: Source(URL + name) for name in FILES} for split in SPLITS}

    def of_split(self, row, split: str) -> bool:
        found = field(row, "split", str)
        if found not in SPLITS.values():
            raise UserError(
                f"{row.where}: split: one of {', '.join(SPLITS.values())} wanted, {found!r} found"
            )
        return found == SPLITS[split]

    def compare(self, rows, split: str, dropped: Counter):
        options = self.builder_config.options
        for row in rows:
            choice = field(row, "choice", int)
            if choice not in (0, 1):
                raise UserError(f"{row.where}: choice: 0 or 1 wanted, {choice} found")
            article = field(row, "info.article", str, optional=True)
            prompt = (
                prompt_of(row, options.layout)
                if article is None
                else f"Article:\n{article.strip()}\n\nTL;DR:"
            )
            texts = [field(row, f"summaries.{i}.text", str).strip() for i in (0, 1)]
            chosen, rejected = texts[choice], texts[1 - choice]
            reason = fault(chosen, rejected)
            if article is not None and options.cnndm == "drop":
                reason = "about a news article"
            elif (
                split == "train"
                and options.train == "sup4"
                and field(row, "batch", str) not in SUP4
            ):
                reason = "not of batches 3 to 10"
            if reason:
                dropped[reason] += 1
            else:
                yield row.id, [{"role": "user", "content": prompt}], chosen, rejected, 0.0


def prompt_of(row, layout: str) -> str:
    post = field(row, "info.post", str).strip()
    if layout == "post":
        return f"{post}\n\nTL;DR:"
    subreddit, title = (field(row, f"info.{name}", str).strip() for name in ("subreddit", "title"))
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
