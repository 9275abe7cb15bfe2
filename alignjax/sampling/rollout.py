"""Sample responses: prefill each prompt once, then decode in slots that are refilled.

Convention: sampling keeps the smallest set of tokens with mass `top_p`. The log-probabilities that
PPO uses, in its ratio and its KL, come from `models.scoring` and are those of the full
distribution at the sampling temperature. This is on purpose: with the kept set alone, the ratio
would jump as tokens enter and leave the set. The log-probabilities returned here are those of the
full distribution too; they serve only as a check on the scorer.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from alignjax.machine.sharding import constrain
from alignjax.models import transformer
from alignjax.models.transformer import Params
from alignjax.sampling.cache import CacheKind, choose_cache
from alignjax.sampling.prefill import Prefix, prefill, prompt_mask
from alignjax.sampling.slots import (
    SlotPlan,
    Slots,
    empty_slots,
    last_tokens,
    plan_slots,
    retire,
)
from alignjax.sampling.top_p import sample_tokens
from alignjax.sampling.types import Prompts, Rollout, SamplingSettings, StreamOutput

StopTable = Int[Array, "states vocabulary"]


def generate(
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    settings: SamplingSettings,
    *,
    prefix: Prefix | None = None,
    stops: StopTable | None = None,
    wanted: Int[Array, ""] | None = None,
) -> Rollout:
    """Sample `settings.samples_per_prompt` responses to each prompt.

    The randomness of a sample is keyed only by `key` (made of the run's seed and step), its
    prompt's index, its number among the prompt's samples and its place in the response. It does
    not depend on the batch, the slots, the order or the devices.

    `settings.slots` samples decode at once (0: all of them). When about an eighth of the slots
    have ended, the next prompts take their place.

    Args:
        prefix: the tokens that all prompts begin with, from `read_prefix`.
        stops: an automaton that ends responses besides the end tokens: `stops[state, token]` is
            the state after a token. A response starts in state 0, and ends in the state
            `len(stops)`. `Rollout.truncated` considers the end tokens only.
        wanted: how many of the prompts, from the first on, are to be answered. It may be traced.
            None answers all.
    """
    decoder = make_decoder(params, prompts, key, settings, prefix, stops, wanted)
    progress = Progress(slots=decoder.free_slots(), next_prompt=jnp.int32(0))
    if decoder.fills_all_slots:
        progress = decoder.take_turn(progress)
    else:
        progress = jax.lax.while_loop(decoder.has_prompts_left, decoder.take_turn, progress)
    return decoder.collect(progress.slots)


def begin(
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    settings: SamplingSettings,
    *,
    stops: StopTable | None = None,
) -> Slots:
    """Return the slots in which every response has its first token; `proceed` adds more tokens.

    The responses are those of `generate` with one sample of each prompt, all decoded at once.
    """
    decoder = make_decoder(params, prompts, key, settings, stops=stops)
    response_ids = jnp.arange(len(prompts.lengths))
    return decoder.fill(decoder.free_slots(), None, response_ids, prompts)


def proceed(
    params: Params,
    slots: Slots,
    prompts: Prompts,
    key: Key[Array, ""],
    settings: SamplingSettings,
    *,
    new_tokens: int | Int[Array, ""],
    stops: StopTable | None = None,
) -> tuple[Slots, StreamOutput]:
    """Return the slots of `begin` after up to `new_tokens` more tokens, and their responses.

    The slots may be donated to the next call before the responses are read, which is why these
    are returned separately.
    """
    decoder = make_decoder(params, prompts, key, settings, stops=stops)
    is_wanted = functools.partial(has_live_before, slots.clock + new_tokens)
    slots = jax.lax.while_loop(is_wanted, decoder.decode_token, slots)
    output = StreamOutput(
        tokens=slots.tokens, lengths=slots.lengths, live=slots.live, logprobs=slots.logprobs
    )
    return slots, output


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Progress:
    """A rollout under way."""

    slots: Slots
    next_prompt: Int[Array, ""]  # the first prompt that has not entered a slot


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoder:
    """Everything that stays the same during a rollout. The methods are the rollout's phases."""

    params: Params
    layers: Params | list[Params]  # as `transformer.decode` takes them
    cache: CacheKind
    prompts: Prompts
    keys: Key[Array, " responses"]
    settings: SamplingSettings
    plan: SlotPlan
    prefix: Prefix | None
    stops: StopTable | None
    wanted: int | Int[Array, ""]  # prompts that are to be answered

    @property
    def num_responses(self) -> int:
        """Return how many responses the rollout has."""
        return len(self.keys)

    @property
    def prompt_width(self) -> int:
        """Return the width of the left-padded prompts, without their prefix."""
        return self.prompts.tokens.shape[1]

    @property
    def fills_all_slots(self) -> bool:
        """Return whether all prompts enter their slots at the same time."""
        return self.plan.prompts_per_fill == len(self.prompts.lengths)

    def free_slots(self) -> Slots:
        """Return the slots before the first prompt."""
        return empty_slots(self.settings, self.num_responses, self.plan.slots, self.cache)

    def has_prompts_left(self, progress: Progress) -> Bool[Array, ""]:
        """Return whether some prompt has not entered a slot."""
        return progress.next_prompt < self.wanted

    def take_turn(self, progress: Progress) -> Progress:
        """Fill free slots with the next prompts, and decode until as many slots are free again.

        If there is no prompt to follow, decode until all responses have ended.
        """
        slots = self.fill_free(progress.slots, progress.next_prompt)
        next_prompt = progress.next_prompt + self.plan.prompts_per_fill
        filled = self.plan.prompts_per_fill * self.settings.samples_per_prompt
        enough = jnp.where(next_prompt < self.wanted, self.plan.slots - filled, 0)
        is_wanted = functools.partial(has_more_live_than, enough)
        slots = jax.lax.while_loop(is_wanted, self.decode_token, slots)
        return Progress(slots=slots, next_prompt=next_prompt)

    def fill_free(self, slots: Slots, first_prompt: Int[Array, ""]) -> Slots:
        """Put the prompts from `first_prompt` on into the first free slots."""
        samples = self.settings.samples_per_prompt
        num_prompts = len(self.prompts.lengths)
        num_filled = self.plan.prompts_per_fill * samples
        where = None
        if not self.fills_all_slots:
            where = jnp.argsort(slots.live, stable=True)[:num_filled]
        rows = (first_prompt + jnp.arange(self.plan.prompts_per_fill)) % num_prompts
        response_ids = first_prompt * samples + jnp.arange(num_filled)
        # The last fill may have more slots than prompts are left.
        exists = response_ids < self.wanted * samples
        response_ids = jnp.where(exists, response_ids, self.num_responses)
        prompts = jax.tree.map(lambda column: column[rows], self.prompts)
        return self.fill(slots, where, response_ids, prompts)

    def fill(
        self,
        slots: Slots,
        where: Int[Array, " filled"] | None,
        response_ids: Int[Array, " filled"],
        prompts: Prompts,
    ) -> Slots:
        """Prefill prompts, draw their first tokens, and put them into the slots `where`.

        With None they fill all slots. The responses that the slots held are retired.
        """
        settings = self.settings
        num_filled = len(response_ids)
        samples = num_filled // len(prompts.lengths)
        prefilled = prefill(
            self.params, prompts.tokens, prompts.lengths, settings.model, self.prefix
        )
        real = prompt_mask(prompts.lengths, self.prompt_width, self.prefix)
        places = jnp.zeros(num_filled, jnp.int32)
        last_hidden = jnp.repeat(prefilled.hidden[:, -1], samples, axis=0)
        tokens, logprobs = self.draw(response_ids, places, last_hidden)
        first_states = jnp.zeros(num_filled, jnp.int32)
        stop_states, ended = self.follow_stops(first_states, tokens)
        goes_on = ~ended & ~jnp.isnan(logprobs) & (settings.response_length > 1)
        live = (response_ids < self.num_responses) & goes_on
        lengths = jnp.ones(num_filled, jnp.int32)
        tokens = first_column(tokens, settings.response_length)
        logprobs = first_column(logprobs, settings.response_length)
        prompt_lengths = jnp.repeat(prompts.lengths, samples)
        return Slots(
            response_ids=put_rows(slots.response_ids, where, response_ids),
            live=put_rows(slots.live, where, live),
            lengths=put_rows(slots.lengths, where, lengths),
            stop_states=put_rows(slots.stop_states, where, stop_states),
            tokens=put_rows(slots.tokens, where, tokens),
            logprobs=put_rows(slots.logprobs, where, logprobs),
            prompt_lengths=put_rows(slots.prompt_lengths, where, prompt_lengths),
            cache=self.cache.fill(slots.cache, where, prefilled.key_values, real),
            clock=slots.clock,
            finished=slots.finished if where is None else retire(slots, where),
        )

    def decode_token(self, slots: Slots) -> Slots:
        """Decode one more token in every live slot."""
        settings = self.settings
        response_length = settings.response_length
        mask = prompt_mask(slots.prompt_lengths, self.prompt_width, self.prefix)
        reader = self.cache.reader(mask, slots.clock, slots.lengths)
        positions = slots.prompt_lengths + slots.lengths - 1
        if self.prefix is not None:
            positions += self.prefix.length
        decoded = transformer.decode(
            settings.model,
            self.params,
            self.layers,
            last_tokens(slots.tokens, slots.lengths),
            positions,
            slots.cache,
            reader.attend,
        )
        tokens, logprobs = self.draw(slots.response_ids, slots.lengths, decoded.hidden)
        here = (jnp.arange(response_length) == slots.lengths[:, None]) & slots.live[:, None]
        lengths = slots.lengths + slots.live
        stop_states, ended = self.follow_stops(slots.stop_states, tokens)
        goes_on = ~ended & ~jnp.isnan(logprobs) & (lengths < response_length)
        return dataclasses.replace(
            slots,
            live=slots.live & goes_on,
            lengths=lengths,
            stop_states=stop_states,
            clock=slots.clock + 1,
            tokens=jnp.where(here, tokens[:, None], slots.tokens),
            logprobs=jnp.where(here, logprobs[:, None], slots.logprobs),
            cache=self.cache.write(slots.cache, slots.clock, decoded.key_values, tokens),
        )

    def draw(
        self,
        response_ids: Int[Array, " rows"],
        places: Int[Array, " rows"],
        hidden: Float[Array, "rows d_model"],
    ) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
        """Draw the tokens at `places` of responses, from the hidden states before them.

        Returns the tokens and their log-probabilities, which are NaN where the logits are not
        finite. Such a response ends there.
        """
        settings = self.settings
        logits = transformer.logits(settings.model, self.params, hidden)
        # Each device first makes its own part of the vocabulary, then they exchange the parts:
        # GSPMD would gather the kernel, in order to have whole rows at once.
        logits = constrain(constrain(logits, tensor=1))
        existing_ids = jnp.minimum(response_ids, self.num_responses - 1)
        keys = fold_in(self.keys[existing_ids], places)
        return sample_tokens(keys, logits, settings.temperature, settings.top_p)

    def follow_stops(
        self, states: Int[Array, " rows"], tokens: Int[Array, " rows"]
    ) -> tuple[Int[Array, " rows"], Bool[Array, " rows"]]:
        """Return the states of the stop table after these tokens, and which responses they end."""
        ended = is_one_of(tokens, self.settings.end_tokens)
        if self.stops is None:
            return states, ended
        states = self.stops[states, tokens].astype(jnp.int32)
        return states, ended | (states == len(self.stops))

    def collect(self, slots: Slots) -> Rollout:
        """Return the rollout, once no response is live."""
        samples = self.settings.samples_per_prompt
        finished = retire(slots, jnp.arange(self.plan.slots))
        last = last_tokens(finished.tokens, finished.lengths)
        prompts = jnp.repeat(self.prompts.tokens, samples, axis=0)
        return Rollout(
            tokens=jnp.concatenate([prompts, finished.tokens], axis=1),
            prompt_lengths=jnp.repeat(self.prompts.lengths, samples, axis=0),
            lengths=finished.lengths,
            logprobs=finished.logprobs,
            truncated=~is_one_of(last, self.settings.end_tokens),
        )


def make_decoder(
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    settings: SamplingSettings,
    prefix: Prefix | None = None,
    stops: StopTable | None = None,
    wanted: Int[Array, ""] | None = None,
) -> Decoder:
    """Return the decoder of a rollout; see `generate` for the arguments."""
    num_prompts, width = prompts.tokens.shape
    if prefix is not None:
        width += prefix.width
    plan = plan_slots(num_prompts, settings.samples_per_prompt, settings.slots)
    layers = transformer.for_decoding(settings.model, params)
    cache = choose_cache(
        settings,
        plan.slots,
        width,
        has_prefix=prefix is not None,
        by_layer=isinstance(layers, list),
    )
    return Decoder(
        params=params,
        layers=layers,
        cache=cache,
        prompts=prompts,
        keys=response_keys(key, prompts.index, settings.samples_per_prompt),
        settings=settings,
        plan=plan,
        prefix=prefix,
        stops=stops,
        wanted=num_prompts if wanted is None else wanted,
    )


def is_one_of(tokens: Int[Array, " rows"], some: tuple[int, ...]) -> Bool[Array, " rows"]:
    """Return which of the tokens are among some tokens, of which there is at least one."""
    return functools.reduce(jnp.logical_or, [tokens == token for token in some])


def has_more_live_than(enough: Int[Array, ""], slots: Slots) -> Bool[Array, ""]:
    """Return whether more slots than `enough` are live."""
    return slots.live.sum() > enough


def has_live_before(deadline: Int[Array, ""], slots: Slots) -> Bool[Array, ""]:
    """Return whether some slot is live and the clock has not reached the deadline."""
    return slots.live.any() & (slots.clock < deadline)


def response_keys(
    key: Key[Array, ""], index: Int[Array, " prompts"], samples_per_prompt: int
) -> Key[Array, " responses"]:
    """Return a key for each response, of its prompt's index and its number among the samples."""
    num_prompts = len(index)
    keys = jnp.broadcast_to(key, (num_prompts * samples_per_prompt,))
    keys = fold_in(keys, jnp.repeat(index, samples_per_prompt))
    return fold_in(keys, jnp.tile(jnp.arange(samples_per_prompt), num_prompts))


def fold_in(keys: Key[Array, " rows"], numbers: Int[Array, " rows"]) -> Key[Array, " rows"]:
    """Fold a number into each key."""
    return jax.vmap(jax.random.fold_in)(keys, numbers)


def first_column(values: Array, width: int) -> Array:
    """Return [rows width] with the values [rows] in its first column, and 0 elsewhere."""
    return jnp.zeros((len(values), width), values.dtype).at[:, 0].set(values)


def put_rows(old: Array, where: Int[Array, " filled"] | None, new: Array) -> Array:
    """Return the old rows with new ones at `where`; all rows are new if that is None."""
    return new if where is None else old.at[where].set(new)
