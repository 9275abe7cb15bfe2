"""Anthropic's HH: transcripts that differ in the assistant's last reply."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from alignjax.data import transcripts
from alignjax.data.preferences.base import Comparisons, Config, Pair, Source
from alignjax.data.preferences.rows import Row, fault, field

GITHUB = {
    # helpful is kept in Git LFS, harmless in git itself.
    "helpful": "https://media.githubusercontent.com/media/anthropics/hh-rlhf/master/",
    "harmless": "https://raw.githubusercontent.com/anthropics/hh-rlhf/master/",
}
# From the repository's Git LFS pointers. Git itself, where harmless-base is, states no sha256.
SHA256 = {
    "helpful-base/train": "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
    "helpful-base/test": "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    "helpful-online/train": "0994d18b82083f5c084ce04071b683958a724df8c7215ab1d851986642d36a2a",
    "helpful-online/test": "39a475cc7e0df972902f8e3a0972726fce826ac65369bda8c671de4330c60a10",
    "helpful-rejection-sampled/train": (
        "0cea2d2ab2187624ec1314e8cc6fb579f0fa987b3a33e8102b7556ed4d255f64"
    ),
    "helpful-rejection-sampled/test": (
        "abc35dbc56015db1dae0faa484514ccbc3eee0133bfcd557fc69250619b028bb"
    ),
}
SUBSETS = {
    "hh_helpful_base": "helpful-base",
    "hh_helpful_online": "helpful-online",
    "hh_helpful_rejection_sampled": "helpful-rejection-sampled",
    "hh_harmless_base": "harmless-base",
}


@dataclass(frozen=True)
class Options:
    """Which rows to drop.

    Published filters (RLHFlow's HH-RLHF-Helpful-standard) drop them, and get_hh of DPO's authors
    keeps them.
    """

    # Two turns of one role in a row, which many chat templates refuse.
    same_role: Literal["drop", "keep"] = "drop"
    empty: Literal["drop", "keep"] = "drop"  # a reply without text


class HH(Comparisons):
    """Human preferences about helpfulness and harmlessness (Bai et al. 2022, arXiv:2204.05862).

    MIT licence. The prompt is the shared part of both transcripts, up to the assistant's last turn.
    Rows whose transcripts differ earlier, whose replies are equal, or whose prompt does not end
    with the human's turn are dropped.
    """

    name = "hh"
    Options = Options
    HOMEPAGE = "https://github.com/anthropics/hh-rlhf"
    BUILDER_CONFIGS = [
        Config(name=subset.replace("-", "_"), dataset=name, options=Options())
        for name, subset in SUBSETS.items()
    ]

    def sources(self) -> dict[str, dict[str, Source]]:
        """Return one file for each split."""
        subset = SUBSETS[self.builder_config.dataset]
        base_url = GITHUB[subset.partition("-")[0]]
        sources = {}
        for split in ("train", "test"):
            name = f"{subset}/{split}"
            file = f"{name}.jsonl.gz"
            sources[split] = {file: Source(base_url + file, SHA256.get(name, ""))}
        return sources

    def compare(self, rows: Iterator[Row], split: str, dropped: Counter) -> Iterator[Pair]:
        """Yield the last replies of each two transcripts."""
        keep_empty = self.builder_config.options.empty == "keep"
        for row in rows:
            chosen = transcripts.parse(field(row, "chosen", str))
            rejected = transcripts.parse(field(row, "rejected", str))
            reason = self.fault(chosen, rejected)
            if reason and not (reason == "an empty reply" and keep_empty):
                dropped[reason] += 1
                continue
            yield Pair(
                id=row.id,
                prompt=chosen[:-1],
                chosen=chosen[-1]["content"],
                rejected=rejected[-1]["content"],
            )

    def fault(self, chosen: list[dict] | None, rejected: list[dict] | None) -> str:
        """Return why two transcripts are no comparison, or ""."""
        if chosen is None or rejected is None:
            return "not a transcript of Human and Assistant"
        if self.builder_config.options.same_role == "drop" and (
            repeats_role(chosen) or repeats_role(rejected)
        ):
            return "two turns of one role in a row"
        return transcripts.difference_fault(chosen, rejected) or fault(
            chosen[-1]["content"], rejected[-1]["content"]
        )


def repeats_role(messages: list[dict]) -> bool:
    """Return whether two messages in a row have the same role."""
    roles = [message["role"] for message in messages]
    return any(role == following for role, following in zip(roles, roles[1:], strict=False))
