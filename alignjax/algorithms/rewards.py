"""Who gives a response its score: a reward model, a function of the user's, or both, each by its weight.

A reward model with the policy's tokenizer and template reads the policy's own tokens (`experience.read`). One with others
reads text: the prompt's messages and the decoded response, tokenised as its own training does, with its own end token. A
function reads text too:

    def reward(prompts, responses, **columns) -> scores

prompts are lists of messages, responses texts without their end token, columns the other fields of each prompt's row, all
lists of one length, n. The n scores are numbers; nothing is learnt from a rollout with one that is not finite. It must be
a pure function (a run that resumes calls it again, and each process of several calls it), and accept columns that it
doesn't use. A response that has not ended gets `ppo.truncated_score` all the same.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from alignjax.config import Config, Model, UserError
from alignjax.data import chat, encoding, packing
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.weights import locations, roles


class Reward(NamedTuple):
    model: Model  # of the reward model that reads the policy's tokens
    params: dict  # {"reward": its parameters}, or {} where there is none
    judges: list[
        Callable
    ]  # of those that read text: (rows[n], responses[n]) -> scores [n], by their weights

    def judged(self, rows: list[dict], responses: list[str]) -> np.ndarray:
        """[n] float32: the sum of what the readers of text say of each prompt's row and response."""
        return sum(
            (judge(rows, responses) for judge in self.judges), np.zeros(len(rows), np.float32)
        )


def build(config: Config, mesh, parents: dict[str, Path], tokenizer) -> Reward:
    """What the config asks for; UserError for a function that isn't there and a reward model that can't read so much."""
    p, judges = config.ppo, []
    if p.reward_fn:
        judges.append(
            functools.partial(called, p.reward_fn, function(p.reward_fn), p.reward_fn_weight)
        )
    if "reward" not in parents:
        return Reward(config.model, {}, judges)
    path, longest = parents["reward"], config.data.max_length + p.response_length
    same = {name: getattr(config.model, name) for name in ("dtype", "remat", "attention")}
    model = dataclasses.replace(locations.architecture(path), **same)
    if model.max_length < longest:
        raise UserError(
            f"data.max_length + ppo.response_length={longest} is over max_length={model.max_length} of the "
            f"reward model {path}"
        )
    params = roles.load(model, "scalar", mesh, jax.random.key(config.seed), path)
    params = roles.freeze(params, p.frozen_dtype, p.frozen_memory)
    own = tokenizer_of(config, path)
    if same_tokens(own, tokenizer):
        return Reward(model, {"reward": params}, judges)
    score = jax.jit(lambda params, batch: scoring.scores(model, roles.on_device(params), batch))
    # Another tokenizer may make more tokens of a text: room for twice as many.
    longest = min(model.max_length, 2 * longest)
    score = functools.partial(score, params)
    read = functools.partial(read_text, score, own, longest, config.microbatch_tokens, mesh)
    judges.append(lambda rows, responses: p.reward_weight * read(rows, responses))
    return Reward(model, {}, judges)


def tokenizer_of(config: Config, path: Path):
    """A parent's tokenizer: the one that a run has kept; for a Hugging Face directory as the config says."""
    if locations.is_run(path):
        return chat.load_tokenizer(path / "tokenizer")
    named = locations.local_directory(config.tokenizer, weights=False) if config.tokenizer else path
    return chat.load_tokenizer(named, config.chat_template)


def function(spec: str) -> Callable:
    """What "module:function" names; the working directory is looked in first."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"ppo.reward_fn={spec}: {error}") from None


def called(
    spec: str, reward_fn: Callable, weight: float, rows: list[dict], responses: list[str]
) -> np.ndarray:
    columns = {
        name: [row.get("columns", {}).get(name) for row in rows]
        for name in dict.fromkeys(name for row in rows for name in row.get("columns", {}))
    }
    scores = list(reward_fn([row["prompt"] for row in rows], responses, **columns))
    if len(scores) != len(rows):
        raise UserError(f"ppo.reward_fn={spec}: {len(scores)} scores for {len(rows)} responses")
    for row, response, score in zip(rows, responses, scores, strict=True):
        if not np.isscalar(score) or isinstance(score, str):
            raise UserError(
                f"ppo.reward_fn={spec}: score {score!r} for the response {response[:80]!r} to the prompt of "
                f"{row.get('where', 'the embedded world')}: a number wanted"
            )
    return weight * np.asarray(scores, np.float32)


def read_text(
    score, tokenizer, longest: int, budget: int, mesh, rows: list[dict], responses: list[str]
) -> np.ndarray:
    """[n]: scores of a reward model by its own tokens. Of what is over `longest` tokens the beginning goes unread."""
    prompts = chat.encode_prompts(tokenizer, [row["prompt"] for row in rows])
    ends = chat.encode_responses(tokenizer, responses)
    sequences = [
        (prompt + response)[-longest:] for prompt, response in zip(prompts, ends, strict=True)
    ]
    return read_tokens(score, sequences, longest, budget, mesh)


def read_tokens(score, sequences: list[list[int]], longest: int, budget: int, mesh) -> np.ndarray:
    """[n]: score(batch), read at the end of each sequence of up to `longest` tokens; about `budget` are read at once."""
    tokens, n, shards = encoding.pad(sequences, longest), len(sequences), sharding.row_shards(mesh)
    out = np.zeros(n, np.float32)
    for layout in packing.pack(
        encoding.lengths_of(sequences), [[i] for i in range(n)], longest, budget, shards
    ):
        batch = {
            "tokens": layout.take(tokens),
            "positions": layout.place,
            "segments": layout.sequence + 1,
            "ends": packing.padded(layout.ends(), n, 0),
        }
        found = sharding.on_host(score(sharding.shard_batch(batch, mesh)))
        out[layout.members] = found[: len(layout.members)]
    return out


def same_tokens(one, other) -> bool:
    """Whether two tokenizers make the same tokens of a conversation: the vocabulary and the chat template are the same."""
    return one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template
