"""The sources of a response's score: reward models, functions and endpoints, by name.

A reward model with the policy's tokenizer and template reads the policy's own tokens, see
`experience.read_roles`. One with another tokenizer reads text: the prompt's messages and the
decoded response, tokenised as in its own training. Functions and endpoints read text too, see
`reward_functions` and `reward_endpoints`. The score is the weighted sum of all of them, see
`experience_making.combine_scores`. A response that does not end gets `ppo.truncated_score`
whatever its scores.

A policy may have several end tokens. Whichever of them was sampled, a reward model reads the
ending of its own training, see `weights.score_place`: a score depends on what a response says.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignjax.algorithms.endings import closing_length
from alignjax.algorithms.experience import TokenReward, TokenRewards, longest_sequence
from alignjax.config import (
    RUNTIME_FIELDS,
    Config,
    Model,
    UserError,
    kind_of_source,
    reward_table,
    role_of,
)
from alignjax.data import chat, encoding, packing, templates, tokenising, tokenizer_files
from alignjax.data.ends import replace_end
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.models.scoring import PackedTokens
from alignjax.weights import locations, roles
from alignjax.weights.role_reader import RoleReader
from alignjax.weights.score_place import ending_of

# (rows of the prompts, responses) -> a score of each response
TextReward = Callable[[list[dict], list[str]], np.ndarray]
# (packed tokens, ends) -> scores at the ends
ScoreFunction = Callable[[PackedTokens, Any], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """All sources of the score of a run."""

    readers: TokenRewards = ()
    params: Mapping[str, dict]  # role of each reader -> its parameters
    text_rewards: Mapping[str, TextReward]  # by name

    def check_prompts(self, rows: list[dict]) -> None:
        """Raise UserError if a text-based reward model cannot encode the prompt of a row."""
        for text_reward in self.text_rewards.values():
            if isinstance(text_reward, TextRewardModel):
                text_reward.encode_prompts(rows)

    def score_texts(self, rows: list[dict], responses: list[str]) -> dict[str, np.ndarray]:
        """Return the scores of the responses, as float32, by each text-based reward."""
        return {
            name: text_reward(rows, responses) for name, text_reward in self.text_rewards.items()
        }


@dataclass(frozen=True, kw_only=True)
class TextRewardModel:
    """A reward model with a tokenizer of its own as a text-based reward."""

    score: ScoreFunction
    tokenizer: PreTrainedTokenizerBase
    ending: tuple[int, ...]  # the tokens in the place of the end token
    max_tokens: int  # of a sequence; the beginning of a longer one is not read
    microbatch_tokens: int
    mesh: jax.sharding.Mesh

    def __call__(self, rows: list[dict], responses: list[str]) -> np.ndarray:
        """Return the scores of the responses to the prompts of the rows."""
        prompts = self.encode_prompts(rows)
        messages = [row["prompt"] for row in rows]
        encoded = chat.encode_responses(self.tokenizer, messages, responses)
        sequences = [
            replace_end(prompt + response, self.ending)[-self.max_tokens :]
            for prompt, response in zip(prompts, encoded, strict=True)
        ]
        return score_sequences(
            self.score, sequences, self.max_tokens, self.microbatch_tokens, self.mesh
        )

    def encode_prompts(self, rows: list[dict]) -> list[list[int]]:
        """Return the tokens of the prompts; UserError names the row that cannot be encoded."""
        return tokenising.naming_rows(self.encode_named_prompts, rows)

    def encode_named_prompts(self, rows: list[dict]) -> list[list[int]]:
        return chat.encode_prompts(self.tokenizer, [row["prompt"] for row in rows])


@dataclass(frozen=True, kw_only=True)
class LoadedRewardModel:
    """A reward model with its frozen parameters."""

    model: Model
    params: dict
    tokenizer: PreTrainedTokenizerBase
    ending: tuple[int, ...]  # of what it reads


def build(
    config: Config,
    mesh: jax.sharding.Mesh,
    parents: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    text_rewards: Mapping[str, TextReward],
    end_tokens: tuple[int, ...] = (),
    *,
    reader: RoleReader | None = None,
) -> Rewards:
    """Build the rewards that the config asks for.

    Args:
      config: of the run.
      mesh: of training.
      parents: role -> directory, see `config.parent_specs`.
      tokenizer: of the policy.
      text_rewards: the functions and endpoints, by name.
      end_tokens: of the policy.
      reader: reads the reward models, which may share their base with other roles.

    Raises:
      UserError: for a language model, and for a reward model that cannot read sequences as long as
        a prompt and its response.
    """
    reader = reader or RoleReader(config, mesh, parents)
    readers = []
    params = {}
    text_rewards = dict(text_rewards)
    for name in reward_table(config):
        if name in text_rewards:
            continue
        role = role_of(config, name)
        loaded = load_model(config, parents[role], role, reader)
        if not same_tokens(loaded.tokenizer, tokenizer):
            text_rewards[name] = as_text_reward(config, mesh, loaded)
            continue
        # If all responses end as the reward model reads them, it reads what was sampled.
        ending = None if loaded.ending == end_tokens else loaded.ending
        readers.append(TokenReward(name=name, role=role, model=loaded.model, ending=ending))
        params[role] = loaded.params
    return Rewards(readers=tuple(readers), params=params, text_rewards=text_rewards)


def planned_readers(config: Config) -> TokenRewards:
    """Return the reward models of a run that is only planned.

    All of them are taken to read the policy's tokens, and to have its architecture.
    """
    return tuple(
        TokenReward(name=name, role=role_of(config, name), model=dataclasses.replace(config.model))
        for name, source in reward_table(config).items()
        if kind_of_source(source.source) == "model"
    )


def load_model(config: Config, directory: Path, role: str, reader: RoleReader) -> LoadedRewardModel:
    """Read a reward model, and freeze its parameters."""
    tokenizer = parent_tokenizer(config, directory)
    ending = ending_of(directory, tokenizer)
    model = reward_architecture(config, directory, ending)
    params = reader.frozen(role, model)
    tokenizer_files.check_fits(tokenizer, model.vocab_size)
    return LoadedRewardModel(model=model, params=params, tokenizer=tokenizer, ending=ending)


def as_text_reward(
    config: Config, mesh: jax.sharding.Mesh, loaded: LoadedRewardModel
) -> TextRewardModel:
    """Return a reward model with a tokenizer of its own as a text-based reward."""
    chat.end_token(loaded.tokenizer)  # its template must be of use
    return TextRewardModel(
        score=bind_scorer(loaded.model, loaded.params),
        tokenizer=loaded.tokenizer,
        ending=loaded.ending,
        # Another tokenizer may make more tokens of a text: leave room for twice as many.
        max_tokens=min(loaded.model.max_length, 2 * longest_sequence(config)),
        microbatch_tokens=config.microbatch_tokens,
        mesh=mesh,
    )


def reward_architecture(config: Config, directory: Path, ending: tuple[int, ...]) -> Model:
    """Return the reward model's architecture, computed as the policy is.

    Raises:
      UserError: if it cannot read a whole prompt and response.
    """
    runtime = {name: getattr(config.model, name) for name in RUNTIME_FIELDS}
    model = dataclasses.replace(locations.architecture(directory), **runtime)
    longest = longest_sequence(config)
    closing = closing_length(ending)
    if model.max_length < longest + closing:
        what_else = f", and {closing} of its template," if closing else ""
        raise UserError(
            f"data.max_length + ppo.response_length={longest}{what_else} is over "
            f"max_length={model.max_length} of the reward model {directory}"
        )
    return model


def bind_scorer(model: Model, params: dict) -> ScoreFunction:
    """Return a compiled function from packed tokens and ends to scores.

    The parameters are arguments of the compiled function: closed over, they would become
    constants of the executable.
    """

    @jax.jit
    def score(params: dict, packed: PackedTokens, ends: jax.Array) -> jax.Array:
        return scoring.sequence_scores(model, roles.on_device(params), packed, ends)

    return lambda packed, ends: score(params, packed, ends)


def parent_tokenizer(config: Config, directory: Path) -> PreTrainedTokenizerBase:
    """Load a parent's tokenizer.

    A run has kept its own. For a Hugging Face checkpoint the config may name another, and it says
    how the chat template is used.
    """
    if locations.is_run(directory):
        return chat.load_tokenizer(directory / "tokenizer")
    source = directory
    if config.tokenizer:
        source = locations.local_directory(config.tokenizer, weights=False)
    tokenizer = chat.load_tokenizer(locations.tokenizer_source(source), config.chat_template)
    templates.set_options(tokenizer, config.template_date, config.special_tokens_in_content)
    return tokenizer


def score_sequences(
    score: ScoreFunction,
    sequences: list[list[int]],
    max_tokens: int,
    microbatch_tokens: int,
    mesh: jax.sharding.Mesh,
) -> np.ndarray:
    """Score sequences of up to `max_tokens` tokens at their ends, packed into microbatches."""
    count = len(sequences)
    tokens = encoding.pad(sequences, max_tokens)
    scores = np.zeros(count, np.float32)
    layouts = packing.pack(
        encoding.lengths_of(sequences),
        [[number] for number in range(count)],
        max_tokens,
        microbatch_tokens,
        sharding.row_shards(mesh),
    )
    for layout in layouts:
        packed = PackedTokens(
            tokens=layout.take(tokens), positions=layout.place, segments=layout.sequence + 1
        )
        ends = packing.padded(layout.ends(), count, 0)
        packed, ends = sharding.shard_batch((packed, ends), mesh)
        batch_scores = sharding.on_host(score(packed, ends))
        scores[layout.members] = batch_scores[: len(layout.members)]
    return scores


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers make the same tokens of a conversation.

    They do if the vocabulary, the chat template and how it is used are the same.
    """
    return (
        one.get_vocab() == other.get_vocab()
        and one.chat_template == other.chat_template
        and templates.options_of(one) == templates.options_of(other)
    )
