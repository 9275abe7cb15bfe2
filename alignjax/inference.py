"""Load a run, or a Hugging Face checkpoint, and let it generate, stream or score responses.

    policy = inference.load("runs/ppo")
    reward = inference.load("runs/rm")
    responses = policy.generate(["copy : cat box"], samples=2)
    scores = reward.score(["copy : cat box"] * 2, [response.tokens for response in responses])

`alignjax.chat` and `alignjax.evaluate` are built on this. Its counterpart is `train.fit`, which
makes runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from alignjax import config as configs
from alignjax.algorithms import rewards
from alignjax.config import UserError
from alignjax.data import chat, encoding, tokenizer_files
from alignjax.data.ends import end_tokens, replace_end, without_end
from alignjax.machine import sharding
from alignjax.machine.precision import precision_of
from alignjax.models import scoring, transformer
from alignjax.sampling import rollout
from alignjax.sampling.prefill import Prefix
from alignjax.sampling.types import Prompts, SamplingSettings
from alignjax.weights import hf, locations, roles
from alignjax.weights.imported import ends_of
from alignjax.weights.score_place import ending_of

# Prompts of a call of `generate` for each slot. With more, an interruption loses more responses;
# with fewer, slots wait more often for the last responses of a call.
PROMPTS_PER_SLOT = 8
STREAM_TOKENS = 4  # tokens that a call of a stream decodes

GENERATE = jax.jit(rollout.generate, static_argnames="settings")
BEGIN = jax.jit(rollout.begin, static_argnames="settings")
PROCEED = jax.jit(rollout.proceed, static_argnames="settings", donate_argnames="slots")
SCORES = jax.jit(scoring.sequence_scores, static_argnums=0)

# The text of a user's turn, or messages, each with a role and content.
Prompt = str | list[dict[str, str]]


class Response(NamedTuple):
    """A sampled response."""

    text: str  # without the end token
    tokens: list[int]  # with the end token, if the response has one
    truncated: bool  # no end token within max_tokens


class LoadedModel:
    """A model with its parameters on a mesh, as `load` returns it.

    Attributes:
        name: what errors call it: the run or checkpoint as the caller named it.
        architecture: its `config.Model`.
        ends: the tokens that end a response; empty for a reward model.
        ending: the tokens that a reward model reads behind a reply, see `weights.score_place`.
        uses_chat_template: whether prompts go through the tokenizer's chat template.
        max_length: how many tokens prompt and response may have together.
    """

    def __init__(
        self,
        architecture: configs.Model,
        params: dict,
        tokenizer: chat.PreTrainedTokenizerBase,
        mesh: jax.sharding.Mesh,
        ends: Sequence[int],
        uses_chat_template: bool = True,
        ending: Sequence[int] = (),
        name: str = "the model",
    ):
        self.name = name
        self.architecture = architecture
        self.params = params
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.ends = tuple(ends)
        self.ending = tuple(ending)
        self.uses_chat_template = uses_chat_template
        self.max_length = architecture.max_length

    @property
    def max_tokens(self) -> int:
        """Return the default length of a response: 256, or a quarter of `max_length`."""
        return max(1, min(256, self.max_length // 4))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        temperature: float = 1.0,
        top_p: float = 0.9,
        samples: int = 1,
        max_tokens: int | None = None,
        seed: int = 0,
        slots: int = 64,
    ) -> list[Response]:
        """Sample `samples` responses to each prompt; the responses to a prompt are adjacent.

        A response depends only on the seed, its prompt's place in the list and its number among
        that prompt's samples. Temperature 0 takes the most probable token. `slots` responses
        decode at once. `max_tokens` defaults to the property of that name.

        Raises UserError for a reward model, and for a prompt that together with `max_tokens`
        exceeds the model's `max_length`.
        """
        settings = self.sampling_settings(temperature, top_p, max_tokens, samples)
        if samples < 1 or slots < 1:
            raise UserError(f"samples={samples}, slots={slots}: both must be at least 1")
        encoded = self.encode_to_fit(prompts, settings.response_length)
        if not encoded:
            return []
        prompts_at_once = -(-slots // samples)
        most = min(PROMPTS_PER_SLOT * prompts_at_once, round_up(len(encoded), 1))
        settings = dataclasses.replace(settings, slots=min(slots, most * samples))
        lengths = {number: len(tokens) for number, tokens in enumerate(encoded)}
        responses = {}
        for numbers in group_by_length(lengths, most, prompts_at_once):
            rows = self.generate_tokens(
                [encoded[number] for number in numbers],
                numbers,
                most,
                key=jax.random.key(seed),
                settings=settings,
            )
            for place, number in enumerate(numbers):
                rows_of_prompt = rows[place * samples : (place + 1) * samples]
                responses[number] = [self.make_response(row) for row in rows_of_prompt]
        return [response for number in lengths for response in responses[number]]

    def stream(
        self,
        prompt: Prompt,
        *,
        temperature: float = 1.0,
        top_p: float = 0.9,
        max_tokens: int | None = None,
        seed: int = 0,
        number: int = 0,
    ) -> Generator[str, None, Response]:
        """Yield the text of one response in pieces, as it is decoded, and return the Response.

        It is the response that `generate` gives to the prompt at the place `number` of its list.
        No piece ends within a character. The compiled programs depend only on the prompt's
        length, rounded up by `round_up`, and on the settings.
        """
        settings = self.sampling_settings(temperature, top_p, max_tokens)
        (prompt_tokens,) = self.encode_to_fit([prompt], settings.response_length)
        width = round_up(len(prompt_tokens))
        prompts = Prompts(
            tokens=encoding.pad([prompt_tokens], width, left=True),
            lengths=np.array([len(prompt_tokens)], np.int32),
            index=jnp.full(1, number, jnp.int32),
        )
        begin = functools.partial(self.run, BEGIN, self.params)
        proceed = functools.partial(self.run, PROCEED, self.params)
        constant = {
            "prompts": prompts,
            "key": jax.random.key(seed),
            "settings": settings,
        }
        slots = begin(**constant)
        slots, upcoming = proceed(slots=slots, new_tokens=0, **constant)
        shown = ""
        live = True
        while live:
            output = upcoming
            # The device decodes the next tokens while the host turns these into text. After the
            # response has ended there are none.
            slots, upcoming = proceed(slots=slots, new_tokens=STREAM_TOKENS, **constant)
            (tokens,) = sharding.on_host(output.tokens)
            (length,) = sharding.on_host(output.lengths)
            (live,) = sharding.on_host(output.live)
            self.check_finite("logits", sharding.on_host(output.logprobs))
            text = self.text_of(tokens[:length], ended=not live)
            # The replacement character may stand for half a character: wait for the rest.
            complete = text.rstrip("\ufffd") if live else text
            if len(complete) > len(shown):
                yield complete[len(shown) :]
                shown = complete
        return self.make_response(tokens[:length])

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str | list[int]],
        *,
        microbatch_tokens: int = 4096,
        cut_beginning: bool = False,
    ) -> list[float]:
        """Return a reward model's score of each response to its prompt.

        A response is either text, or tokens of the model's own tokenizer: PPO scores the tokens
        that its policy sampled, whose text may be encoded as other tokens. Text gets the ending
        that the model was trained to read. So do tokens with an end token, in its place; tokens
        without one are a response that was cut off, and are read as they are. About
        `microbatch_tokens` tokens are read at once. With `cut_beginning`, the beginning of a
        sequence that is longer than `max_length` is not read.

        Raises UserError for a language model, and for sequences longer than `max_length`.
        """
        if self.ends:
            raise UserError(
                "score: this needs a reward model, a run of stage 'ranking', but this is a "
                "language model"
            )
        if len(prompts) != len(responses):
            raise UserError(f"score: {len(prompts)} prompts for {len(responses)} responses")
        sequences = []
        encoded_responses = self.encode_responses(prompts, responses)
        for prompt, response in zip(self.encode(prompts), encoded_responses, strict=True):
            sequence = prompt + response
            sequences.append(sequence[-self.max_length :] if cut_beginning else sequence)
        longest = max(map(len, sequences), default=0)
        if longest > self.max_length:
            raise UserError(
                f"score: prompt and response have {longest} tokens, over the model's "
                f"max_length={self.max_length}"
            )
        score = functools.partial(self.run, SCORES, self.architecture, self.params)
        scores = rewards.score_sequences(
            score, sequences, round_up(longest), microbatch_tokens, self.mesh
        )
        self.check_finite("scores", scores)
        return scores.tolist()

    def check_finite(self, what: str, figures: float | Float[np.ndarray, "..."]) -> None:
        """Raise UserError if a figure that the model computed is not finite.

        A model whose parameters are not finite cannot be loaded, so the computation overflows.
        """
        if not np.isfinite(figures).all():
            dtype = self.architecture.dtype
            advice = "" if dtype == "float32" else "; try float32"
            raise UserError(f"{self.name}: the model's {what} overflow in {dtype}{advice}")

    def sampling_settings(
        self, temperature: float, top_p: float, max_tokens: int | None, samples: int = 1
    ) -> SamplingSettings:
        """Return checked settings for the sampler; UserError if the model or a value is unfit."""
        if not self.ends:
            raise UserError(
                "generate: this needs a language model, but this is a reward model, which scores"
            )
        response_length = self.max_tokens if max_tokens is None else max_tokens
        if response_length < 1 or not 0 <= temperature < np.inf or not 0 < top_p <= 1:
            raise UserError(
                f"max_tokens={response_length} must be at least 1, temperature={temperature} not "
                f"below 0, top_p={top_p} in (0, 1]"
            )
        configs.check_extendable(self.architecture)
        return SamplingSettings(
            model=dataclasses.replace(self.architecture),  # a copy: the settings are a key of jit
            samples_per_prompt=samples,
            response_length=response_length,
            temperature=temperature,
            top_p=top_p,
            end_tokens=self.ends,
        )

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the tokens of prompts, up to where the assistant's response begins."""
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list, not the text {prompts[:80]!r}")
        if self.uses_chat_template:
            return chat.encode_prompts(self.tokenizer, [as_messages(prompt) for prompt in prompts])
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(
                "messages need a chat template and a model that was trained with it; this model "
                "takes plain text"
            )
        return chat.encode_texts(self.tokenizer, prompts, begin=True)

    def encode_to_fit(self, prompts: Sequence[Prompt], response_length: int) -> list[list[int]]:
        """Encode prompts; UserError if one is empty or leaves no space for the response."""
        encoded = self.encode(prompts)
        for number, tokens in enumerate(encoded):
            if not 0 < len(tokens) <= self.max_length - response_length:
                raise UserError(
                    f"prompt {number} has {len(tokens)} tokens and its response may have "
                    f"{response_length}: a prompt must not be empty, and their sum must not "
                    f"exceed the model's max_length={self.max_length}"
                )
        return encoded

    def encode_responses(
        self, prompts: Sequence[Prompt], responses: Sequence[str | list[int]]
    ) -> list[list[int]]:
        """Return the tokens of responses as a reward model reads them, see `score`."""
        texts = [response for response in responses if isinstance(response, str)]
        their_prompts = [
            as_messages(prompt)
            for prompt, response in zip(prompts, responses, strict=True)
            if isinstance(response, str)
        ]
        encoded_texts = iter(chat.encode_responses(self.tokenizer, their_prompts, texts))
        encoded = [
            next(encoded_texts) if isinstance(response, str) else list(response)
            for response in responses
        ]
        ends = end_tokens(self.tokenizer, {}, self.architecture.vocab_size)
        return [
            replace_end(tokens, self.ending) if tokens and tokens[-1] in ends else tokens
            for tokens in encoded
        ]

    def generate_tokens(
        self,
        prompts: list[Sequence[int]],
        numbers: list[int],
        most: int,
        *,
        key: jax.Array,
        settings: SamplingSettings,
        stops: np.ndarray | jax.Array | None = None,
        prefix: Prefix | None = None,
    ) -> list[np.ndarray]:
        """Return the tokens of the responses to encoded prompts, in one call of the sampler.

        The prompts follow the prefix, and none is empty. `numbers` are their places in the whole
        list of prompts, which key their randomness. The call has `most` rows of prompts, so that
        calls with fewer prompts need no new program.
        """
        filler = most - len(prompts)
        rows = [*prompts, *[(0,)] * filler]
        lengths = np.array([len(row) for row in rows], np.int32)
        batch = Prompts(
            tokens=encoding.pad(rows, round_up(lengths.max()), left=True),
            lengths=lengths,
            index=np.array(numbers + [0] * filler, np.int32),
        )
        sampled = self.run(
            GENERATE,
            self.params,
            sharding.shard_batch(batch, self.mesh),
            key,
            settings,
            prefix=prefix,
            stops=stops,
            wanted=jnp.int32(len(prompts)),
        )
        responses = sharding.on_host(sampled.tokens)[:, batch.tokens.shape[1] :]
        response_lengths = sharding.on_host(sampled.lengths)
        wanted = len(prompts) * settings.samples_per_prompt
        self.check_finite("logits", sharding.on_host(sampled.logprobs)[:wanted])
        return [
            response[:length]
            for response, length in zip(responses[:wanted], response_lengths[:wanted], strict=True)
        ]

    def make_response(self, tokens: np.ndarray) -> Response:
        """Return the Response that these tokens are."""
        return Response(
            text=self.text_of(tokens),
            tokens=tokens.tolist(),
            truncated=int(tokens[-1]) not in self.ends,
        )

    def text_of(self, tokens: np.ndarray, ended: bool = True) -> str:
        """Return the text of a response's tokens, without its end token.

        It is the content of a reply if prompts are conversations, see `chat.decode_response`.
        """
        if not self.uses_chat_template:
            return self.continuation_of(tokens)
        return chat.decode_response(self.tokenizer, without_end(tokens, self.ends), ended)

    def continuation_of(self, tokens: np.ndarray) -> str:
        """Return the text that tokens add to any prompt, white space included."""
        return chat.decode_continuation(self.tokenizer, without_end(tokens, self.ends))

    def run(self, program: Callable, *arguments: Any, **keywords: Any) -> Any:
        """Call a compiled program on the mesh; float32 is multiplied as such on any device."""
        precision = precision_of(self.architecture.dtype)
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(precision):
            return program(*arguments, **keywords)


def load(
    run: str | Path,
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    max_length: int | None = None,
    chat_template: str = "",
    unfinished: bool = False,
) -> LoadedModel:
    """Load the model of a run (a PPO run's policy), or of a Hugging Face checkpoint.

    A run of stage "ranking" or a sequence classifier is a reward model, which scores; all others
    generate. Raises UserError if the model cannot be loaded.

    Args:
        run: a directory, or hf://ORG/NAME.
        dtype: the type of the computation.
        mesh: defaults to one over all devices.
        max_length: defaults to the model's own. For a language model whose RoPE depends on the
            length of a sequence, the default ends where that begins.
        chat_template: "chatml" for a checkpoint that has no template.
        unfinished: load the newest checkpoint of a run that is not complete.
    """
    if dtype not in configs.CHOICES["model.dtype"]:
        choices = ", ".join(map(repr, configs.CHOICES["model.dtype"]))
        raise UserError(f"dtype={dtype!r} must be one of {choices}")
    directory = locations.local_directory(str(run))
    stored = locations.read_config(directory)
    is_run = locations.is_run(directory)
    if is_run and not unfinished and not (directory / "summary.json").exists():
        raise UserError(
            f"{run}: this run is not complete; repeat the command that started it to continue"
        )
    architecture = dataclasses.replace(
        locations.architecture(directory), dtype=dtype, remat="nothing", attention="auto"
    )
    is_reward = is_reward_model(directory)
    if max_length:
        architecture.max_length = int(max_length)
    elif architecture.rope_varies and not is_reward:
        architecture.max_length = architecture.rope_original_length
    source = locations.tokenizer_source(directory)
    tokenizer_directory = directory / "tokenizer" if is_run else source
    tokenizer = chat.load_tokenizer(tokenizer_directory, chat_template)
    tokenizer_files.check_fits(tokenizer, architecture.vocab_size)
    mesh = mesh or sharding.make_mesh(configs.Mesh())
    return LoadedModel(
        architecture,
        load_params(architecture, "scalar" if is_reward else "lm", mesh, directory),
        tokenizer,
        mesh,
        () if is_reward else ends_of(directory, tokenizer, architecture.vocab_size),
        uses_chat_template(stored, tokenizer),
        ending=ending_of(directory, tokenizer) if is_reward else (),
        name=str(run),
    )


def load_params(
    architecture: configs.Model, head: str, mesh: jax.sharding.Mesh, directory: Path
) -> dict:
    """Return parameters on the mesh, of a run or a Hugging Face checkpoint."""
    with jax.set_mesh(mesh):
        params = roles.load_trained(architecture, head, mesh, directory)
        if architecture.dtype != "float32" or transformer.joins_products():
            lay_out = jax.jit(transformer.for_sampling, static_argnums=0, donate_argnums=1)
            params = lay_out(architecture, params)
    return params


def is_reward_model(directory: Path) -> bool:
    """Return whether a run or a Hugging Face checkpoint is a reward model."""
    if locations.is_run(directory):
        return locations.read_config(directory)["stage"] == "ranking"
    return hf.head_of(directory) == "scalar"


def uses_chat_template(stored: dict, tokenizer: chat.PreTrainedTokenizerBase) -> bool:
    """Return whether a model expects conversations.

    That is so if there is a chat template, unless its config.json says that it was trained on
    plain text.
    """
    return bool(tokenizer.chat_template) and stored.get("data.kind") != "text"


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """Return a prompt as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def group_by_length(lengths: dict[int, int], most: int, slots: int) -> Iterator[list[int]]:
    """Yield the requests of {request: length}, longest first, in groups of at most `most`.

    A new group begins once the slots are filled and the lengths have halved, because a call reads
    and stores as many places of each prompt as its longest prompt has.
    """
    group = []
    for request in sorted(lengths, key=lengths.get, reverse=True):
        is_full = len(group) == most
        if is_full or (len(group) >= slots and 2 * lengths[request] <= lengths[group[0]]):
            yield group
            group = []
        group.append(request)
    yield group


def round_up(count: int, least: int = 8) -> int:
    """Return the next of 8, 12, 16, 24, 32, 48, ..., so that few programs are compiled."""
    count = max(int(count), least)
    power = 1 << (count - 1).bit_length()
    three_quarters = power * 3 // 4
    return three_quarters if count <= three_quarters else power
