"""Stanford's SHP: two comments on one post of Reddit, ordered by their scores."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from alignjax.config import UserError
from alignjax.data.preferences.base import Comparisons, Pair, Source
from alignjax.data.preferences.rows import Row, fault, field

# The hub states a sha256 only for large files, and none of these is: that of the download is kept.
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
    """Filters of train; other splits are never filtered.

    The first two are the advice of the dataset's card ("Evaluating"), which is for training only.
    """

    min_score_ratio: float = 2.0  # the higher comment's score over the lower's; 1 is every row
    pairs_per_post: int = 5  # the first so many rows of a post that pass, in file order; 0 is all
    history_chars: int = 0  # cut the post (never the comments) to so many characters; 0 is no cut


class SHP(Comparisons):
    """Which of two comments on a post Reddit's users scored higher (Ethayarajh et al. 2022).

    Reddit's terms apply. The prompt is the post, as one message of the user; `ratio` is the score
    ratio, against which accuracy should be reported. Empty and equal comments are dropped.
    """

    name = "shp"
    Options = Options
    HOMEPAGE = "https://huggingface.co/datasets/stanfordnlp/SHP"

    def sources(self) -> dict[str, dict[str, Source]]:
        """Return one file for each subreddit and split."""
        sources = {}
        for split in ("train", "validation", "test"):
            names = [f"{subreddit}/{split}.json" for subreddit in SUBREDDITS]
            sources[split] = {name: Source(URL + name) for name in names}
        return sources

    def compare(self, rows: Iterator[Row], split: str, dropped: Counter) -> Iterator[Pair]:
        """Yield the comments of each row, the one with the higher score as chosen."""
        history_chars = self.builder_config.options.history_chars
        kept_of_post = Counter()
        for row in rows:
            pair = read_pair(row, history_chars)
            post = field(row, "post_id", str)
            reason = fault(pair.chosen, pair.rejected)
            if split == "train" and not reason:
                reason = self.filter_reason(pair.ratio, kept_of_post[post])
            if reason:
                dropped[reason] += 1
                continue
            kept_of_post[post] += 1
            yield pair

    def filter_reason(self, ratio: float, kept_of_post: int) -> str:
        """Return why the options drop a row of train, or ""."""
        options = self.builder_config.options
        if ratio < options.min_score_ratio:
            return f"score_ratio below {options.min_score_ratio:g}"
        if 0 < options.pairs_per_post == kept_of_post:
            return f"more than {options.pairs_per_post} of one post"
        return ""


def read_pair(row: Row, history_chars: int) -> Pair:
    """Return the comparison in a row."""
    ratio = field(row, "score_ratio", float)
    label = field(row, "labels", int)
    if label not in (0, 1):
        raise UserError(f"{row.where}: labels: expected 0 or 1, found {label}")
    history = field(row, "history", str)
    first = field(row, "human_ref_A", str).strip()
    second = field(row, "human_ref_B", str).strip()
    prompt = history.strip()[: history_chars or None]
    return Pair(
        id=row.id,
        prompt=[{"role": "user", "content": prompt}],
        chosen=first if label else second,
        rejected=second if label else first,
        ratio=float(ratio),
    )
