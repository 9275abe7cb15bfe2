"""How a policy does on what is held out, at the end of a run and while it goes on; and its responses as text.

Letters: b prompts, n samples of each.
"""

import numpy as np

from alignjax.config import Config
from alignjax.data import chat, encoding, toy
from alignjax.machine import sharding
from alignjax.sampling.types import Rollout

NO_FIGURES = "prompt", "responses", "tokens", "log_ratio"  # of an entry of `describe`


def texts_of(tokenizer, sampled: Rollout) -> list[str]:
    """The responses [b*n] as text, without their end tokens."""
    tokens, lengths = sharding.on_host(sampled.tokens), sharding.on_host(sampled.lengths)
    r = sampled.logprobs.shape[1]
    return [
        chat.decode_response(tokenizer, row[-r:][:length])
        for row, length in zip(tokens, lengths, strict=True)
    ]


def describe(
    config: Config,
    tokenizer,
    rows: list[dict],
    index,
    sampled: Rollout,
    said: dict,
    detailed: int = 0,
) -> list[dict]:
    """Each prompt rows[index[b]] with its responses as text and their figures, which `said` has of [b*n]; the true score
    where the world has one; of the first `detailed` prompts also each token of a response as text, with its log-ratio."""
    figures = {k: sharding.on_host(v).tolist() for k, v in said.items() if k not in NO_FIGURES}
    n, texts, out = config.ppo.samples_per_prompt, texts_of(tokenizer, sampled), []
    for i, number in enumerate(index):
        prompt, mine = rows[number]["prompt"][-1]["content"], slice(i * n, (i + 1) * n)
        out.append(
            {"prompt": prompt, "responses": texts[mine], **{k: v[mine] for k, v in figures.items()}}
        )
        if config.data.train.startswith("toy/"):
            out[-1]["true_score"] = [toy.true_score(prompt, text) for text in texts[mine]]
    if detailed:
        by_token(tokenizer, out[:detailed], n, sampled, sharding.on_host(said["log_ratio"]))
    return out


def by_token(tokenizer, entries: list[dict], n: int, sampled: Rollout, log_ratio) -> None:
    """Give the first entries their responses' tokens as text, and of log_ratio[b*n r] those of each token, to 4 digits."""
    tokens, lengths = (
        sharding.on_host(sampled.tokens)[:, -log_ratio.shape[1] :],
        sharding.on_host(sampled.lengths),
    )
    for i, entry in enumerate(entries):
        mine = range(i * n, (i + 1) * n)
        entry["tokens"] = [chat.pieces(tokenizer, tokens[k, : lengths[k]]) for k in mine]
        entry["log_ratio"] = [
            [round(x, 4) for x in log_ratio[k, : lengths[k]].tolist()] for k in mine
        ]


def means(entries: list[dict]) -> dict[str, float]:
    """Each figure's mean over all responses of the entries."""
    return {
        name: float(np.mean([entry[name] for entry in entries]))
        for name in entries[0]
        if name not in NO_FIGURES
    }


def evaluate(
    answer,
    loss,
    prompts: dict,
    text: dict | None,
    batch: int,
    limit: int | None = None,
    detailed: int = 0,
):
    """Figures, and an entry for each prompt, of the first `limit` prompts (None: all) and as many rows of text, if any.

    answer(batch of prompts, how many of them in detail) -> entries, as `describe`; loss(text) -> nats a target. Prompts come
    in whole batches, as they do in training, so that its programs serve: the last one is filled up with the first prompts.
    """
    entries, n = [], len(prompts["index"][:limit])
    for first in range(0, n, batch):
        rows = {name: x[np.arange(first, first + batch) % n] for name, x in prompts.items()}
        entries += answer(encoding.narrowed(rows), max(min(detailed, n) - first, 0))[: n - first]
    figures = means(entries)
    figures["entropy"] /= figures["length"]
    if text is not None:
        figures["pretrain_loss"] = loss({name: x[:limit] for name, x in text.items()})
    return figures, entries


def beside(before: list[dict], after: list[dict]) -> list[dict]:
    """Rows of responses.jsonl: each prompt with the entries of the reference and of the policy for it."""
    return [
        {"prompt": old["prompt"]}
        | {
            side: {k: v for k, v in entry.items() if k != "prompt"}
            for side, entry in (("before", old), ("after", new))
        }
        for old, new in zip(before, after, strict=True)
    ]


def compared(before: dict, after: dict) -> dict:
    figures = {
        f"{k}/{side}": v
        for side, found in (("before", before), ("after", after))
        for k, v in found.items()
    }
    return figures | gap_closed(figures)


def gap_closed(figures: dict) -> dict:
    """The share of the way from the true score before to the best one, where there is a true score."""
    if "true_score/after" not in figures:
        return {}
    before, after = figures["true_score/before"], figures["true_score/after"]
    return {"gap_closed": (after - before) / (1 - before)}


def table(figures: dict) -> list[tuple[str, str]]:
    words = {
        "true_score": "true score (best 1)",
        "score": "reward model's score",
        "kl": "KL to the reference, nats",
        "length": "response length, tokens",
        "truncated": "share cut off",
        "entropy": "entropy, nats a token",
        "pretrain_loss": "loss on pretraining text, nats",
    }
    lines = [
        (text, f"{figures[f'{name}/before']:8.3f} -> {figures[f'{name}/after']:.3f}")
        for name, text in words.items()
        if f"{name}/before" in figures
    ]
    if "gap_closed" in figures:
        lines.insert(
            1, ("gap from SFT to the best, closed", f"{100 * figures['gap_closed']:8.0f} %")
        )
    return lines
