"""Answer the requests of an evaluation: log-likelihoods, and responses to prompts.

Requests may be many and of any length. Those that begin alike, such as questions after the same
examples, share the reading of what they have in common. The rest is packed into rows, or decoded
in slots, of a few shapes.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from alignjax import inference
from alignjax.config import Model, UserError
from alignjax.data import encoding, packing
from alignjax.evals import stops
from alignjax.evals.families import Family, Tokens, group_families
from alignjax.evals.trees import Continuation, Question, Tree, build_tree, locate_targets
from alignjax.inference import PROMPTS_PER_SLOT, group_by_length, round_up
from alignjax.machine import sharding
from alignjax.machine.sharding import constrain
from alignjax.models import transformer, vocabulary
from alignjax.sampling.prefill import Prefix, read_prefix
from alignjax.sampling.types import SamplingSettings


class Likelihood(NamedTuple):
    """How likely a continuation is."""

    logprob: float  # in nats
    is_greedy: bool  # each of its tokens is the most probable one


class Candidate(NamedTuple):
    """A response to a prompt."""

    text: str  # up to the first stop string
    truncated: bool  # neither a stop string nor an end token within the most tokens


@dataclass(frozen=True, kw_only=True)
class ResponseSettings:
    """How to respond to prompts. Temperature 0 is greedy."""

    stop_strings: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1  # responses to each prompt


class Requests:
    """Answers requests with a model.

    It decodes `slots` responses at once, and reads about `tokens` tokens at once.
    """

    def __init__(self, model: inference.LoadedModel, tokens: int = 4096, slots: int = 64):
        self.model = model
        self.tokens = tokens
        self.slots = slots
        self.stop_tables = {}  # by stop strings

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, Likelihood]]:
        """Yield the number and the likelihood of each pair (context, continuation) of tokens.

        Neither part may be empty. A pair that is longer than the model may read loses its
        beginning. The order is that in which the answers come.
        """
        continuations = defaultdict(list)  # by context
        for number, (context, continuation) in enumerate(pairs):
            whole = (*context, *continuation)[-self.model.max_length - 1 :]
            targets = min(len(continuation), len(whole) - 1)
            continuations[whole[:-targets]].append(Continuation(number, whole[-targets:]))
        contexts = list(continuations)
        # A family must save half a microbatch, because its own last one is half full on average.
        for family in group_families(contexts, worth=self.tokens // 2):
            questions = [
                Question(contexts[member], continuations[contexts[member]])
                for member in family.members
            ]
            yield from self.family_likelihoods(questions, family.shared)

    def family_likelihoods(
        self, questions: list[Question], shared: int
    ) -> Iterator[tuple[int, Likelihood]]:
        """Yield the likelihoods of questions whose contexts share their first tokens."""
        prefix = self.read_prefix(questions[0].context[:shared])
        trees = [
            build_tree(
                question.context[shared:],
                [continuation.tokens for continuation in question.continuations],
            )
            for question in questions
        ]
        columns = pad_trees(trees)
        lengths = np.array([len(tree.tokens) for tree in trees])
        shards = sharding.row_shards(self.model.mesh)
        groups = [[number] for number in range(len(trees))]
        for layout in packing.pack(lengths, groups, round_up(lengths.max()), self.tokens, shards):
            layout = add_empty_rows(layout, self.tokens, shards)
            targets = locate_targets(layout, questions, trees)
            places, labels = targets.arrays(round_up(max(map(len, targets.rows))))
            batch = {**columns.batch(layout, shared), "places": places, "labels": labels}
            logprobs, is_best = self.read_targets(batch, prefix)
            for span in targets.spans:
                at = (span.row, span.columns)
                logprob = float(logprobs[at].astype(np.float64).sum())
                self.model.check_finite("logits", logprob)
                yield span.request, Likelihood(logprob, bool(is_best[at].all()))

    def read_targets(
        self, batch: dict[str, np.ndarray], prefix: Prefix | None
    ) -> tuple[Float[np.ndarray, "rows targets"], Bool[np.ndarray, "rows targets"]]:
        """Run the compiled `read_targets` on the mesh."""
        results = self.model.run(
            READ_TARGETS,
            self.model.architecture,
            self.model.params,
            sharding.shard_batch(batch, self.model.mesh),
            prefix,
        )
        logprobs, is_best = map(sharding.on_host, results)
        return logprobs, is_best

    def responses(
        self, prompts: Sequence[Sequence[int]], settings: ResponseSettings
    ) -> Iterator[tuple[int, str]]:
        """Yield the number of each prompt (tokens) and the text of the response to it."""
        for number, candidates in self.candidates(prompts, settings):
            yield number, candidates[0].text

    def candidates(
        self, prompts: Sequence[Sequence[int]], settings: ResponseSettings
    ) -> Iterator[tuple[int, list[Candidate]]]:
        """Yield the number of each prompt (tokens) and all responses to it.

        A response ends before the first stop string, at an end token, or after
        `settings.max_tokens` tokens. A prompt that leaves no room for these loses its beginning.
        """
        room = self.model.max_length - settings.max_tokens
        if room < 1:
            raise UserError(
                f"responses may have up to {settings.max_tokens} tokens, but the model's "
                f"max_length is {self.model.max_length}, which leaves no room for a prompt"
            )
        fitted_prompts = [tuple(prompt[-room:]) for prompt in prompts]
        # A family must save the tokens of all slots, because they run empty at its end.
        worth = self.slots * settings.max_tokens
        for family in group_families(fitted_prompts, worth=worth):
            yield from self.family_responses(fitted_prompts, family, settings)

    def family_responses(
        self, prompts: list[Tokens], family: Family, settings: ResponseSettings
    ) -> Iterator[tuple[int, list[Candidate]]]:
        """Yield the responses to the prompts of a family."""
        prefix = self.read_prefix(prompts[family.members[0]][: family.shared])
        rests = {number: prompts[number][family.shared :] for number in family.members}
        lengths = {number: len(rest) for number, rest in rests.items()}
        prompts_at_once = -(-self.slots // settings.samples)
        most = min(PROMPTS_PER_SLOT * prompts_at_once, round_up(len(rests)))
        for members in group_by_length(lengths, most, prompts_at_once):
            part = {number: rests[number] for number in members}
            responses = self.answer(part, most, prefix, settings)
            for place, number in enumerate(members):
                yield number, responses[place * settings.samples : (place + 1) * settings.samples]

    def answer(
        self,
        prompts: dict[int, Tokens],
        most: int,
        prefix: Prefix | None,
        settings: ResponseSettings,
    ) -> list[Candidate]:
        """Return responses to {number: prompt after the prefix}, those to a prompt adjacent.

        `most` is the number of rows that the compiled program has.
        """
        # If all responses are as long, the slots are filled in so many rounds; each round then
        # gets equally many prompts.
        count = len(prompts) * settings.samples
        rounds = -(-count // self.slots)
        sampling = SamplingSettings(
            model=dataclasses.replace(self.model.architecture),  # a copy: jit keeps it as a key
            samples_per_prompt=settings.samples,
            response_length=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            end_tokens=self.model.ends,
            slots=round_up(-(-count // rounds)),
        )
        ids = self.model.generate_tokens(
            list(prompts.values()),
            list(prompts),
            most,
            key=jax.random.key(0),
            settings=sampling,
            stops=self.stop_table(settings.stop_strings),
            prefix=prefix,
        )
        return [self.candidate(tokens, settings.stop_strings) for tokens in ids]

    def candidate(self, tokens: np.ndarray, stop_strings: tuple[str, ...]) -> Candidate:
        """Return the response that these tokens are."""
        whole = self.model.continuation_of(tokens)
        text = stops.cut_at_stop(whole, stop_strings)
        has_ended = text != whole or int(tokens[-1]) in self.model.ends
        return Candidate(text=text, truncated=not has_ended)

    def read_prefix(self, tokens: Tokens) -> Prefix | None:
        """Read what all members of a family begin with."""
        if not tokens:
            return None
        row = encoding.pad([tokens], round_up(len(tokens)), left=True)[0]
        return self.model.run(
            READ_PREFIX, self.model.params, row, len(tokens), model=self.model.architecture
        )

    def stop_table(self, stop_strings: tuple[str, ...]) -> Int[Array, "states vocabulary"]:
        """Return the transition table of stop strings, made once."""
        if stop_strings not in self.stop_tables:
            table = stops.transition_table(list(stop_strings), self.token_texts)
            self.stop_tables[stop_strings] = jnp.asarray(table)
        return self.stop_tables[stop_strings]

    @functools.cached_property
    def token_texts(self) -> list[str]:
        """Return the text of each token of the vocabulary."""
        return stops.texts_of_tokens(self.model.tokenizer, self.model.architecture.vocab_size)


@dataclass(frozen=True, kw_only=True)
class TreeColumns:
    """The columns of several trees, padded to the longest."""

    tokens: Int[np.ndarray, "trees longest"]
    positions: Int[np.ndarray, "trees longest"]
    branches: Int[np.ndarray, "trees longest"]

    def batch(self, layout: packing.Layout, shared: int) -> dict[str, np.ndarray]:
        """Return the model's inputs for a microbatch, after a prefix of `shared` tokens.

        A token sees its own segment and its trunk's. Where no tree has branches, one segment
        says it all.
        """
        segments_of_tree = self.branches.max() + 1
        trunks = np.where(layout.real, layout.sequence * segments_of_tree + 1, 0)
        segments = trunks + layout.take(self.branches)
        if segments_of_tree > 1:
            segments = np.stack([segments, trunks], axis=-1)
        return {
            "tokens": layout.take(self.tokens),
            "positions": np.where(layout.real, layout.take(self.positions) + shared, 0),
            "segments": segments,
        }


def pad_trees(trees: list[Tree]) -> TreeColumns:
    """Return the columns of trees as arrays."""
    longest = max(len(tree.tokens) for tree in trees)
    return TreeColumns(
        tokens=encoding.pad([tree.tokens for tree in trees], longest),
        positions=encoding.pad([tree.positions for tree in trees], longest),
        branches=encoding.pad([tree.branches for tree in trees], longest),
    )


def add_empty_rows(layout: packing.Layout, tokens: int, shards: int) -> packing.Layout:
    """Add rows of pads, so that microbatches have few shapes.

    A microbatch gets the rows that `tokens` tokens fill, or a half, a quarter ... of them,
    rounded up to a multiple of the devices that rows lie over.
    """
    used, width = layout.place.shape
    rows = max(tokens // width, 1)
    while rows // 2 >= used and rows > 1:
        rows //= 2
    empty = max(-(-rows // shards) * shards, used) - used
    padding = ((0, empty), (0, 0))
    return packing.Layout(
        np.pad(layout.sequence, padding, constant_values=-1),
        np.pad(layout.place, padding, constant_values=0),
    )


def read_targets(
    model: Model, params: dict, batch: dict[str, Array], prefix: Prefix | None
) -> tuple[Float[Array, "rows targets"], Bool[Array, "rows targets"]]:
    """Return the log-probability of each target, and whether it is the most probable token.

    A target is the token batch["labels"] after the place batch["places"] of its row. The
    log-probability is in nats.
    """
    before = None if prefix is None else prefix.cache
    activations = transformer.apply(
        model, params, batch["tokens"], batch["positions"], batch["segments"], prefix=before
    )
    hidden = activations.hidden
    hidden = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
    labels = batch["labels"]
    flat_targets = (hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1))
    score = functools.partial(score_targets, model, params)
    at_once = max(vocabulary.ELEMENTS // model.vocab_size, 1)  # rows of logits in memory
    if labels.size > at_once:
        logprobs, is_best = jax.lax.map(score, flat_targets, batch_size=at_once)
    else:
        logprobs, is_best = score(flat_targets)
    return logprobs.reshape(labels.shape), is_best.reshape(labels.shape)


def score_targets(
    model: Model,
    params: dict,
    targets: tuple[Float[Array, "targets width"], Int[Array, " targets"]],
) -> tuple[Float[Array, " targets"], Bool[Array, " targets"]]:
    """Return the log-probabilities of (hidden states, labels), and which are the largest."""
    hidden, labels = targets
    logits = constrain(constrain(transformer.logits(model, params, hidden), tensor=1))
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1), chosen >= logits.max(axis=1)


READ_TARGETS = jax.jit(read_targets, static_argnums=0)
READ_PREFIX = jax.jit(read_prefix, static_argnames="model")
