"""An evaluation by itself: whole batches of prompts, of which the first few count."""

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
        (None, [[0, 1], [2, 4], [7, 0]], 6),  # the first prompt fills up the last batch
        (99, [[0, 1], [2, 4], [7, 0]], 6),
        (4, [[0, 1], [2, 4]], 4),
        (1, [[0, 0]], 1),
    ],
)
def test_prompts_are_answered_in_whole_batches_and_each_counts_once(limit, batches, rows):
    answered = []
    texts = []
    details = []

    def answer(batch, detailed):
        answered.append(batch["index"].tolist())
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

    def text_loss(text):
        texts.append(text)
        return 2.5

    result = heldout.evaluate(answer, text_loss, PROMPTS, TEXT, 2, limit, 3)
    index = PROMPTS["index"][:limit]
    assert details == ([3, 1, 0][: len(batches)] if len(index) > 1 else [1])
    assert answered == batches
    assert [entry["prompt"] for entry in result.rows] == [str(i) for i in index]
    expected = {
        "score": index.mean() + 0.5,
        "length": 3.0,
        "truncated": 0.5,
        "entropy": 1.5,
        "pretrain_loss": 2.5,
    }
    if limit is None:
        # The means of the prompts are 0.5, 1.5, 2.5, 4.5 and 7.5.
        half = pytest.approx(1.96 * np.sqrt(7.7 / 5))
        expected |= {"score_interval": half, "length_interval": 0.0, "truncated_interval": 0.0}
    assert result.figures == expected
    assert {name: len(array) for name, array in texts[0].items()} == {"tokens": rows, "mask": rows}
    without_text = heldout.evaluate(answer, None, PROMPTS, None, 2, limit)
    assert "pretrain_loss" not in without_text.figures


def test_the_gap_is_closed_where_the_best_is_reached():
    assert heldout.gap_closed({"true_score/before": 0.6, "true_score/after": 0.8}) == {
        "gap_closed": pytest.approx(0.5)
    }
    assert heldout.gap_closed({"score/before": 0.6, "score/after": 0.8}) == {}
