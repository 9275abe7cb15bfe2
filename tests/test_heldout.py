"""An evaluation by itself: whole batches of prompts, the first so many of which count, and their means."""

import numpy as np
import pytest

from alignjax.algorithms import heldout

PROMPTS = {
    "prompts": np.arange(5 * 16).reshape(5, 16),
    "lengths": np.full(5, 16),
    "index": np.array([0, 1, 2, 4, 7]),
}
TEXT = {"tokens": np.arange(12).reshape(6, 2), "mask": np.ones((6, 2))}


@pytest.mark.parametrize(
    "limit, batches, rows",
    [
        (None, [[0, 1], [2, 4], [7, 0]], 6),  # the last is filled up with the first
        (99, [[0, 1], [2, 4], [7, 0]], 6),
        (4, [[0, 1], [2, 4]], 4),
        (1, [[0, 0]], 1),
    ],
)
def test_the_first_prompts_are_asked_in_whole_batches_and_each_counts_once(limit, batches, rows):
    asked, read, details = [], [], []

    def answer(batch, detailed):
        asked.append(batch["index"].tolist())
        details.append(detailed)
        assert batch["prompts"].shape == (2, 16)
        return [
            {
                "prompt": str(i),
                "responses": ["a", "b"],
                "score": [float(i), i + 1.0],
                "length": [2, 4],
                "truncated": [True, False],
                "entropy": [3.0, 6.0],
            }
            for i in batch["index"]
        ]

    figures, entries = heldout.evaluate(
        answer, lambda text: read.append(text) or 2.5, PROMPTS, TEXT, 2, limit, 3
    )
    assert (
        details == [3, 1, 0][: len(batches)]
        if len(index := PROMPTS["index"][:limit]) > 1
        else details == [1]
    )
    index = PROMPTS["index"][:limit]
    assert asked == batches and [entry["prompt"] for entry in entries] == [str(i) for i in index]
    assert figures == {
        "score": index.mean() + 0.5,
        "length": 3.0,
        "truncated": 0.5,
        "entropy": 1.5,
        "pretrain_loss": 2.5,
    }
    assert {name: len(x) for name, x in read[0].items()} == {"tokens": rows, "mask": rows}
    assert "pretrain_loss" not in heldout.evaluate(answer, None, PROMPTS, None, 2, limit)[0]


def test_the_gap_is_closed_where_the_best_is_reached():
    assert heldout.gap_closed({"true_score/before": 0.6, "true_score/after": 0.8}) == {
        "gap_closed": pytest.approx(0.5)
    }
    assert heldout.gap_closed({"score/before": 0.6, "score/after": 0.8}) == {}
