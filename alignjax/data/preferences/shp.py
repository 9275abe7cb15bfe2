"""Stanford's SHP: two comments on one post of Reddit, ordered by their scores."""

from collections import Counter
from dataclasses import dataclass

from alignjax.config import UserError
from alignjax.data.preferences.base import Comparisons, Source, fault, field

# The hub states a sha256 for the large files alone, and we have none of them: what is found is recorded.
URL = "https://huggingface.co/datasets/stanfordnlp/SHP/resolve/main/"
SUBREDDITS = (
    "askacademia",
    "askanthropology",
    "askbaking",
    "askcarguys",
    "askculinary",
    "askdocs",
    "askengineers",
    "askhistorians",
    "askhr",
    "askphilosophy",
    "askphysics",
    "askscience",
    "asksciencefiction",
    "asksocialscience",
    "askvet",
    "changemyview",
    "explainlikeimfive",
    "legaladvice",
)


@dataclass(frozen=True)
class Options:
    """The first two are the dataset card's advice ("Evaluating"), for training alone: other splits are never filtered."""

    min_score_ratio: float = (
        2.0  # the higher comment's score over the lower's, in train; 1 is every row
    )
    pairs_per_post: int = (
        5  # of a post's rows that pass, the first so many in the file's order, in train; 0 is all
    )
    history_chars: int = (
        0  # the post is cut to so many characters, the comments never are; 0 is no cut
    )


class SHP(Comparisons):
    """Which of two comments on a post Reddit's users scored higher (Ethayarajh et al. 2022). Reddit's terms.

    The prompt is the post, one user's message; `ratio` is the score ratio, against which accuracy is to be reported.
    Empty and equal comments are dropped.
    """

    name = "shp"
    Options = Options
    HOMEPAGE = "https://huggingface.co/datasets/stanfordnlp/SHP"

    def sources(self):
        return {
            split: {
                f"{name}/{split}.json": Source(f"{URL}{name}/{split}.json") for name in SUBREDDITS
            }
            for split in ("train", "validation", "test")
        }

    def compare(self, rows, split: str, dropped: Counter):
        options, of_post = self.builder_config.options, Counter()
        for row in rows:
            ratio, label, post = (
                field(row, "score_ratio", float),
                field(row, "labels", int),
                field(row, "post_id", str),
            )
            if label not in (0, 1):
                raise UserError(f"{row.where}: labels: 0 or 1 wanted, {label} found")
            history, a, b = (
                field(row, name, str) for name in ("history", "human_ref_A", "human_ref_B")
            )
            chosen, rejected = (text.strip() for text in ((a, b) if label else (b, a)))
            reason = fault(chosen, rejected)
            if split == "train" and not reason:
                if ratio < options.min_score_ratio:
                    reason = f"score_ratio below {options.min_score_ratio:g}"
                elif of_post[post] == options.pairs_per_post > 0:
                    reason = f"more than {options.pairs_per_post} of one post"
            if reason:
                dropped[reason] += 1
                continue
            of_post[post] += 1
            prompt = history.strip()[: options.history_chars or None]
            yield row.id, [{"role": "user", "content": prompt}], chosen, rejected, float(ratio)
