"""Evaluation of a policy on held-out prompts and text, during a run and at its end."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms import intervals
from alignjax.algorithms.stage import Evaluation
from alignjax.config import Config
from alignjax.data import chat, encoding, toy
from alignjax.machine import sharding
from alignjax.sampling.types import Rollout

NOT_AVERAGED = ("prompt", "responses", "tokens", "log_ratio")  # parts of an entry
LABELS = {
    "true_score": "true score, sampled (best 1)",
    "true_score_greedy": "true score, greedy",
    "right_words": "right words, sampled",
    "right_words_greedy": "right words, greedy",
    "score": "score, sampled",
    "kl": "KL to the reference, nats",
    "length": "response length, tokens",
    "truncated": "share cut off",
    "entropy": "entropy, nats a token",
    "pretrain_loss": "loss on pretraining text, nats",
}


def response_texts(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """Return the responses of a rollout as text, without their end tokens."""
    truncated = sharding.on_host(rollout.truncated)
    contents = [
        tokens if is_truncated else tokens[:-1]
        for tokens, is_truncated in zip(response_tokens(rollout), truncated, strict=True)
    ]
    return [chat.decode_response(tokenizer, content) for content in contents]


def response_tokens(rollout: Rollout) -> list[np.ndarray]:
    """Return the tokens of each response, its end token included, on the host."""
    response_length = rollout.logprobs.shape[1]
    rows = sharding.on_host(rollout.tokens)[:, -response_length:]
    lengths = sharding.on_host(rollout.lengths)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def describe(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    index: np.ndarray,
    rollout: Rollout,
    figures: dict[str, jax.Array],
    detailed: int = 0,
) -> list[dict]:
    """Return an entry for each prompt: the prompt, its responses as text, their figures.

    Args:
      config: of the run.
      tokenizer: of the policy.
      rows: rows of the prompts' data set.
      index: number of each prompt's row.
      rollout: the responses, those of a prompt adjacent.
      figures: name -> a figure of each response, and `log_ratio` of each token.
      detailed: the first so many entries also have each token of their responses as text, with
        its log-ratio to four digits.

    The embedded world also grades each response.
    """
    samples = config.ppo.samples_per_prompt
    texts = response_texts(tokenizer, rollout)
    values = {
        name: sharding.on_host(figure).tolist()
        for name, figure in figures.items()
        if name not in NOT_AVERAGED
    }
    entries = []
    for place, number in enumerate(index):
        prompt = rows[number]["prompt"][-1]["content"]
        samples_of_prompt = slice(place * samples, (place + 1) * samples)
        entry = {"prompt": prompt, "responses": texts[samples_of_prompt]}
        entry |= {name: value[samples_of_prompt] for name, value in values.items()}
        if has_true_score(config):
            entry |= grades(prompt, entry["responses"])
        entries.append(entry)
    if detailed:
        log_ratio = sharding.on_host(figures["log_ratio"])
        add_tokens(tokenizer, entries[:detailed], samples, rollout, log_ratio)
    return entries


def grades(prompt: str, responses: Sequence[str]) -> dict[str, list[float]]:
    """Return how the embedded world grades responses: true scores, and right words or not."""
    return {
        "true_score": [toy.true_score(prompt, response) for response in responses],
        "right_words": [float(toy.has_right_words(prompt, response)) for response in responses],
    }


def add_tokens(
    tokenizer: PreTrainedTokenizerBase,
    entries: list[dict],
    samples: int,
    rollout: Rollout,
    log_ratio: np.ndarray,
) -> None:
    """Add to the first entries the tokens of their responses as text, and their log-ratios."""
    tokens = response_tokens(rollout)
    for place, entry in enumerate(entries):
        numbers = range(place * samples, (place + 1) * samples)
        entry["tokens"] = [chat.pieces(tokenizer, tokens[number]) for number in numbers]
        entry["log_ratio"] = [
            [round(x, 4) for x in log_ratio[number, : len(tokens[number])].tolist()]
            for number in numbers
        ]


def means(entries: list[dict]) -> dict[str, float]:
    """Return the mean of each figure over all responses of the entries."""
    return {
        name: float(np.mean([entry[name] for entry in entries]))
        for name in entries[0]
        if name not in NOT_AVERAGED
    }


def half_widths(entries: list[dict]) -> dict[str, float]:
    """Return half the 95 % interval of each mean over the responses of the entries.

    Entropy has none, since it is a mean over tokens. A single prompt has none at all.
    """
    if len(entries) < 2:
        return {}
    return {
        f"{name}_interval": intervals.half_width([entry[name] for entry in entries])
        for name in entries[0]
        if name not in (*NOT_AVERAGED, "entropy")
    }


def evaluate(
    answer: Callable[[dict, int], list[dict]],
    text_loss: Callable[[dict], float] | None,
    prompts: dict,
    text: dict | None,
    batch_size: int,
    limit: int | None = None,
    detailed: int = 0,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate on the first `limit` prompts (None: all) and as many rows of text, if any.

    An evaluation on all prompts also has half the 95 % interval of each mean.

    Args:
      answer: (batch of prompts, how many of them in detail) -> entries, as `describe` has them.
      text_loss: text -> loss in nats a target.
      prompts: arrays of prompts, as `encoding.encode` makes them.
      text: arrays of held-out text, or None.
      batch_size: prompts that are answered at once. Prompts come in whole batches, as in
        training, so that its compiled programs serve: the first prompts fill up the last batch.
      limit: how many prompts count.
      detailed: how many entries get the details of `describe`.
      after_batch: is called after each batch, and may end the evaluation by an error.
    """
    entries = []
    count = len(prompts["index"][:limit])
    for first, batch in whole_batches(prompts, batch_size, count):
        detailed_here = max(min(detailed, count) - first, 0)
        entries += answer(encoding.narrowed(batch), detailed_here)[: count - first]
        after_batch()
    figures = means(entries)
    figures["entropy"] /= figures["length"]
    if limit is None:
        figures |= half_widths(entries)
    if text is not None:
        figures["pretrain_loss"] = text_loss({name: array[:limit] for name, array in text.items()})
    return Evaluation(figures=figures, rows=entries)


def whole_batches(
    prompts: dict, batch_size: int, count: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield (number of the first prompt, batch); the first prompts fill up the last batch."""
    for first in range(0, count, batch_size):
        wrapped = np.arange(first, first + batch_size) % count
        yield first, {name: array[wrapped] for name, array in prompts.items()}


def count_batches(prompts: dict, batch_size: int) -> int:
    """Return how many batches an evaluation on all prompts has."""
    return -(-len(prompts["index"]) // batch_size)


def has_true_score(config: Config) -> bool:
    """Return whether a run's held-out prompts are of the embedded world."""
    prompts = config.dpo.prompts if config.stage == "dpo" else config.data.train
    return prompts.startswith("toy/")


def side_by_side(before: list[dict], after: list[dict]) -> list[dict]:
    """Return rows of responses.jsonl: each prompt with the entries of reference and policy."""
    rows = []
    for old, new in zip(before, after, strict=True):
        row = {"prompt": old["prompt"]}
        for side, entry in (("before", old), ("after", new)):
            row[side] = {name: value for name, value in entry.items() if name != "prompt"}
        rows.append(row)
    return rows


def compare(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return the figures of both sides by name, and the share of the gap that is closed."""
    figures = {f"{name}/before": value for name, value in before.items()}
    figures |= {f"{name}/after": value for name, value in after.items()}
    return figures | gap_closed(figures)


def gap_closed(figures: dict[str, float]) -> dict[str, float]:
    """Return the share of the way from the true score before to the best one, if there is one."""
    if "true_score/after" not in figures:
        return {}
    before = figures["true_score/before"]
    after = figures["true_score/after"]
    return {"gap_closed": (after - before) / (1 - before)}


def cell(figures: dict[str, float], name: str, side: str) -> str:
    """Return a figure of one side, with half its 95 % interval if it has one."""
    text = f"{figures[f'{name}/{side}']:.3f}"
    half = figures.get(f"{name}_interval/{side}")
    return f"{text} ± {half:.3f}" if half else text


def table(figures: dict[str, float]) -> list[tuple[str, str]]:
    """Return the figures before and after training as (label, text) lines."""
    lines = lines_of(figures, LABELS)
    if "gap_closed" in figures:
        share = f"{100 * figures['gap_closed']:16.0f} %"
        lines.append(("gap from SFT to the best, closed", share))
    own_scores = [
        name.removesuffix("/before")
        for name in figures
        if name.startswith("score/")
        and name.endswith("/before")
        and name != "score/before"
        and not name.endswith("_interval/before")
    ]
    labels = {name: f"score by {name.removeprefix('score/')}" for name in own_scores}
    return lines + lines_of(figures, labels)


def lines_of(figures: dict[str, float], labels: dict[str, str]) -> list[tuple[str, str]]:
    """Return a line for each of the labelled figures that there are."""
    return [
        (label, f"{cell(figures, name, 'before'):>16} -> {cell(figures, name, 'after')}")
        for name, label in labels.items()
        if f"{name}/before" in figures
    ]
