"""Anthropic's HH: transcripts that differ in the assistant's last reply."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from alignjax.data import transcripts
from alignjax.data.preferences.base import Comparisons, Config, Source, fault, field

GITHUB = {
    "helpful": "https://media.githubusercontent.com/media/anthropics/hh-rlhf/master/",  # kept in Git LFS
    "harmless": "https://raw.githubusercontent.com/anthropics/hh-rlhf/master/",
}
# From the repository's Git LFS pointers. harmless-base lies in git itself, which states no sha256.
SHA256 = {
    "helpful-base/train": "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
    "helpful-base/test": "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    "helpful-online/train": "0994d18b82083f5c084ce04071b683958a724df8c7215ab1d851986642d36a2a",
    "helpful-online/test": "39a475cc7e0df972902f8e3a0972726fce826ac65369bda8c671de4330c60a10",
    "helpful-rejection-sampled/train": "0cea2d2ab2187624ec1314e8cc6fb579f0fa987b3a33e8102b7556ed4d255f64",
    "helpful-rejection-sampled/test": "abc35dbc56015db1dae0faa484514ccbc3eee0133bfcd557fc69250619b028bb",
}
SUBSETS = {
    "hh_helpful_base": "helpful-base",
    "hh_helpful_online": "helpful-online",
    "hh_helpful_rejection_sampled": "helpful-rejection-sampled",
    "hh_harmless_base": "harmless-base",
}


@dataclass(frozen=True)
class Options:
    """Rows that published filters drop (RLHFlow's HH-RLHF-Helpful-standard) and the DPO authors' get_hh keeps."""

    same_role: Literal["drop", "keep"] = (
        "drop"  # two turns of one role in a row, which many chat templates refuse
    )
    empty: Literal["drop", "keep"] = "drop"  # a reply without text


class HH(Comparisons):
    """Human preferences about helpfulness and harmlessness (Bai et al. 2022, arXiv:2204.05862). MIT.

    The prompt is the shared part of both transcripts, up to the assistant's last turn. Rows whose transcripts differ
    earlier, whose replies are equal, or whose prompt does not end with the human's turn are dropped.
    """

    name = "hh"
    Options = Options
    HOMEPAGE = "https://github.com/anthropics/hh-rlhf"
    BUILDER_CONFIGS = [
        Config(name=subset.replace("-", "_"), dataset=name, options=Options())
        for name, subset in SUBSETS.items()
    ]

    def sources(self):
        subset = SUBSETS[self.builder_config.dataset]
        base = GITHUB[subset.partition("-")[0]]
        return {
            split: {
                f"{subset}/{split}.jsonl.gz": Source(
                    f"{base}{subset}/{split}.jsonl.gz", SHA256.get(f"{subset}/{split}", "")
                )
            }
            for split in ("train", "test")
        }

    def compare(self, rows, split: str, dropped: Counter):
        options = self.builder_config.options
        for row in rows:
            texts = [field(row, side, str) for side in ("chosen", "rejected")]
            both = [transcripts.parse(text) for text in texts]
            if None in both:
                reason = "not a transcript of Human and Assistant"
            elif options.same_role == "drop" and any(map(repeats, both)):
                reason = "two turns of one role in a row"
            else:
                replies = [messages[-1]["content"] for messages in both]
                reason = transcripts.difference_fault(*both) or fault(*replies)
            if reason and not (reason == "an empty reply" and options.empty == "keep"):
                dropped[reason] += 1
            else:
                yield row.id, both[0][:-1], *replies, 0.0


def repeats(messages: list[dict]) -> bool:
    return any(a["role"] == b["role"] for a, b in zip(messages, messages[1:], strict=False))
