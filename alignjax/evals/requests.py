"""What a language model is asked by an evaluation: log-likelihoods of continuations, and responses to prompts.

Requests come in any number and of any length. Those that begin alike, as the questions behind one set of examples do,
share the reading of what they have in common; the rest is packed in rows, or decoded in slots, of few shapes.
Letters: v vocabulary, w prefix, k targets of a row; rows, m: see `data.packing`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import inference
from alignjax.config import Model, UserError
from alignjax.data import encoding, packing
from alignjax.evals import stops
from alignjax.inference import PROMPTS_PER_SLOT, group_by_length, round_up
from alignjax.machine import sharding
from alignjax.machine.sharding import constrain
from alignjax.models import transformer, vocabulary
from alignjax.sampling.prefill import Prefix, read_prefix
from alignjax.sampling.types import SamplingSettings


class Family(NamedTuple):
    """Sequences that begin with the same `common` tokens; 0 of those that have no family."""

    common: int
    members: list[int]


class Requests:
    """Of a model: `slots` responses are decoded at once, about `tokens` tokens are read."""

    def __init__(self, model: inference.LoadedModel, tokens: int = 4096, slots: int = 64):
        self.model, self.tokens, self.slots, tokenizer, ends = (
            model,
            tokens,
            slots,
            model.tokenizer,
            model.end_tokens,
        )
        self.words = functools.cache(
            lambda: stops.words_of(tokenizer, model.architecture.vocab_size)
        )
        self.stops = functools.cache(
            lambda strings: jnp.asarray(stops.table(list(strings), ends, self.words()))
        )

    def loglikelihoods(self, pairs, done: Callable) -> None:
        """done(i, log p in nats, whether each token was the most probable) of the continuation in pairs[i].

        Pairs are tokens (context, continuation), neither empty; what is longer than the model may read loses its beginning.
        """
        asked = {}  # context -> [(request, continuation)]
        for i, (context, continuation) in enumerate(pairs):
            whole = (*context, *continuation)[-self.model.max_length - 1 :]
            targets = min(len(continuation), len(whole) - 1)
            asked.setdefault(whole[:-targets], []).append((i, whole[-targets:]))
        contexts = list(asked)
        # Those that are read by themselves leave a microbatch half full at their end.
        for family in families(contexts, self.tokens // 2):
            self.read_family(
                [(contexts[i], asked[contexts[i]]) for i in family.members], family.common, done
            )

    def read_family(self, asked: list[tuple], common: int, done) -> None:
        """`loglikelihoods` of (context, [(request, continuation)]) of a family."""
        prefix = self.prefix(asked[0][0][:common])
        trees = [
            tree(context[common:], [continuation for _, continuation in mine])
            for context, mine in asked
        ]
        lengths, shards = (
            np.array([len(x.tokens) for x in trees]),
            sharding.row_shards(self.model.mesh),
        )
        tokens, positions, branches = (
            encoding.pad(column, lengths.max()) for column in list(zip(*trees, strict=True))[:3]
        )
        branched = branches.max() + 1
        for layout in packing.pack(
            lengths, [[i] for i in range(len(trees))], round_up(lengths.max()), self.tokens, shards
        ):
            layout = fill_up(layout, max(self.tokens // layout.place.shape[1], 1), shards)
            rows, owners = [[] for _ in layout.place], []
            for row, column in zip(*np.nonzero(layout.real & (layout.place == 0)), strict=True):
                i = layout.sequence[row, column]
                for (request, _), spots in zip(asked[i][1], trees[i].spots, strict=True):
                    owners.append(
                        (request, row, slice(len(rows[row]), len(rows[row]) + len(spots)))
                    )
                    rows[row] += [(column + at, label) for at, label in spots]
            spots = np.zeros((2, len(rows), round_up(max(map(len, rows)))), np.int32)
            for i, row in enumerate(rows):
                spots[:, i, : len(row)] = np.array(row, np.int32).reshape(-1, 2).T
            trunk = np.where(layout.real, layout.sequence * branched + 1, 0)
            segments = trunk + layout.take(branches)
            batch = {
                "tokens": layout.take(tokens),
                "positions": np.where(layout.real, layout.take(positions) + common, 0),
                "segments": np.stack([segments, trunk], axis=-1) if branched > 1 else segments,
                "at": spots[0],
                "labels": spots[1],
            }
            model = self.model
            batch = sharding.shard_batch(batch, model.mesh)
            found = model.run(READ, model.architecture, model.params, batch, prefix)
            logprobs, greedy = map(sharding.on_host, found)
            for request, row, places in owners:
                done(
                    request,
                    float(logprobs[row, places].astype(np.float64).sum()),
                    bool(greedy[row, places].all()),
                )

    def responses(
        self, prompts, done: Callable, *, strings=(), length=256, temperature=0.0, top_p=1.0
    ) -> None:
        """done(i, text) of the response to prompts[i] (tokens): up to the first of the stop strings, an end token, or
        `length` tokens. Prompts that leave no room for these lose their beginning. Temperature 0 is greedy."""
        room = self.model.max_length - length
        if room < 1:
            raise UserError(
                f"responses of up to {length} tokens wanted, but the model's max_length is {self.model.max_length}"
            )
        prompts = [tuple(prompt[-room:]) for prompt in prompts]
        settings = SamplingSettings(
            model=dataclasses.replace(self.model.architecture),
            samples_per_prompt=1,
            response_length=length,
            temperature=temperature,
            top_p=top_p,
            end_token=self.model.end_tokens[0],
        )
        table = self.stops(tuple(strings))
        # Those that are answered by themselves leave slots empty at their end.
        for family in families(prompts, self.slots * length):
            prefix = self.prefix(prompts[family.members[0]][: family.common])
            rest = {i: len(prompts[i]) - family.common for i in family.members}
            most = min(PROMPTS_PER_SLOT * self.slots, round_up(len(rest)))
            for mine in group_by_length(rest, most, self.slots):
                for i, text in zip(
                    mine,
                    self.answer(prompts, family.common, prefix, mine, most, settings, table),
                    strict=True,
                ):
                    done(i, stops.cut(text, strings))

    def answer(
        self,
        prompts,
        common: int,
        prefix,
        members: list[int],
        most: int,
        settings: SamplingSettings,
        table,
    ) -> list[str]:
        """The responses to some prompts of a family, as text, stop strings included."""
        rounds = -(-len(members) // self.slots)  # if all are as long: each with as many
        ids = self.model.generate_tokens(
            [prompts[i][common:] for i in members],
            members,
            most,
            prefix=prefix,
            key=jax.random.key(0),
            settings=dataclasses.replace(settings, slots=round_up(-(-len(members) // rounds))),
            stops=table,
        )
        return self.model.tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def prefix(self, tokens) -> Prefix | None:
        if not tokens:
            return None
        row = encoding.pad([tokens], round_up(len(tokens)), left=True)[0]
        return self.model.run(
            READ_PREFIX, self.model.params, row, len(tokens), model=self.model.architecture
        )


def read(model: Model, params, batch: dict, prefix: Prefix | None):
    """(log p, whether it is the most probable) of labels[rows k] behind the tokens at `at`[rows k], in nats."""
    before = None if prefix is None else prefix.cache
    hidden, _ = transformer.apply(
        model, params, batch["tokens"], batch["positions"], batch["segments"], prefix=before
    )
    hidden = jnp.take_along_axis(hidden, batch["at"][..., None], axis=1)

    def some(part):
        hidden, labels = part
        logits = constrain(constrain(transformer.logits(model, params, hidden), tensor=1))
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), chosen >= logits.max(axis=1)

    flat = hidden.reshape(-1, hidden.shape[-1]), batch["labels"].reshape(-1)
    n = max(vocabulary.ELEMENTS // model.vocab_size, 1)  # so many rows of logits at a time
    found = jax.lax.map(some, flat, batch_size=n) if len(flat[1]) > n else some(flat)
    return tuple(x.reshape(batch["labels"].shape) for x in found)


READ = jax.jit(read, static_argnums=0)
READ_PREFIX = jax.jit(read_prefix, static_argnames="model")


class Tree(NamedTuple):
    """A context with its continuations as one sequence: each of these sees the context and itself."""

    tokens: list[
        int
    ]  # the context, then each continuation without its last token, which nothing is asked behind
    positions: list[int]
    branches: list[int]  # 0 is the context, i > 0 the i-th continuation that has tokens here
    spots: list[
        list[tuple[int, int]]
    ]  # of each continuation: (the place before a target, the target)


def tree(context: tuple, continuations: list[tuple]) -> Tree:
    n = len(context)
    out = Tree(list(context), list(range(n)), [0] * n, [])
    for targets in continuations:
        start, branch = len(out.tokens), out.branches[-1] + 1
        places = [n - 1, *range(start, start + len(targets) - 1)]
        out.spots.append(list(zip(places, targets, strict=True)))
        out.tokens.extend(targets[:-1])
        out.positions.extend(range(n, n + len(targets) - 1))
        out.branches.extend([branch] * (len(targets) - 1))
    return out


def families(sequences: list[tuple], worth: int) -> list[Family]:
    """Sequences (tuples of tokens), each in a Family, of whose members each is longer than what they have in common.

    Neighbours in order belong together if what they share is half of the longer one, and if that saves the reading of
    `worth` tokens.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    alone, out, group, common = [], [], order[:1], 0

    def close():
        if common * (len(group) - 1) >= worth:
            out.append(Family(common, group))
        else:
            alone.extend(group)

    for last, i in zip(order, order[1:], strict=False):
        shared = min(
            alike(sequences[last], sequences[i]), len(sequences[last]) - 1, len(sequences[i]) - 1
        )
        if 2 * shared >= max(len(sequences[last]), len(sequences[i])):
            group, common = [*group, i], min(shared, common) if len(group) > 1 else shared
        else:
            close()
            group = [i]
    close()
    return [*out, *([Family(0, alone)] if alone else [])]


def alike(a: tuple, b: tuple) -> int:
    """How many tokens two sequences have in common before they differ."""
    n = min(len(a), len(b))
    differs = np.array(a[:n]) != np.array(b[:n])
    return int(differs.argmax()) if differs.any() else n


def fill_up(layout: packing.Layout, most: int, shards: int) -> packing.Layout:
    """With rows of pads: `most` rows, or a half, a quarter ... of them, of the devices' multiple."""
    rows, used = most, len(layout.place)
    while rows // 2 >= used and rows > 1:
        rows //= 2
    more = max(-(-rows // shards) * shards, used) - used
    widen = lambda x, fill: np.pad(x, ((0, more), (0, 0)), constant_values=fill)
    return packing.Layout(widen(layout.sequence, -1), widen(layout.place, 0))
