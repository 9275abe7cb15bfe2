"""A run, or a Hugging Face checkpoint, to be asked: loaded, it generates and streams responses, or scores them.

    policy, reward = inference.load("runs/ppo"), inference.load("runs/rm")
    responses = policy.generate(["copy : cat box"], samples=2)
    scores = reward.score(["copy : cat box"] * 2, [response.tokens for response in responses])

`alignjax.chat` and `alignjax.evaluate` stand on this; `train.fit` is the other half, which makes runs.
"""

import functools
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import config as configs
from alignjax.algorithms import rewards
from alignjax.config import UserError
from alignjax.data import chat, encoding
from alignjax.machine import sharding
from alignjax.models import scoring, transformer
from alignjax.sampling import rollout
from alignjax.weights import locations, roles

CALL = 8  # prompts of a call for each slot: what an interruption loses, and how seldom slots wait for the last
AT_ONCE = 4  # tokens of a stream's call

SETTINGS = ("response_length", "temperature", "top_p", "end")
GENERATE = jax.jit(
    rollout.generate, static_argnums=0, static_argnames=(*SETTINGS, "samples", "slots")
)
BEGIN = jax.jit(rollout.begin, static_argnums=0, static_argnames=SETTINGS)
PROCEED = jax.jit(
    rollout.proceed,
    static_argnums=0,
    donate_argnums=2,
    static_argnames=("prompt_width", *SETTINGS[1:]),
)
SCORES = jax.jit(scoring.sequence_scores, static_argnums=0)

Prompt = (
    str | list[dict[str, str]]
)  # the words of a user's turn, or messages, each with a role and content


class Response(NamedTuple):
    text: str  # without the end token
    tokens: list[int]  # with the end token, if it has ended
    truncated: bool  # not ended within max_tokens


class Model:
    """A model with its parameters on a mesh: what `load` gives.

    `architecture` is its config.Model; `ends` are the tokens that end a response, none of a reward model; `converses` says
    whether prompts go through the tokenizer's chat template.
    """

    def __init__(
        self,
        architecture: configs.Model,
        params: dict,
        tokenizer: chat.PreTrainedTokenizerBase,
        mesh: jax.sharding.Mesh,
        ends: list[int],
        converses: bool = True,
    ):
        self.architecture, self.params, self.tokenizer, self.mesh = (
            architecture,
            params,
            tokenizer,
            mesh,
        )
        self.ends, self.converses = ends, converses
        self.max_length = architecture.max_length  # tokens of prompt and response together

    @property
    def max_tokens(self) -> int:
        """Of a response, where nothing else is asked: 256, or a quarter of what the model may read."""
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
        """`samples` responses to each prompt, those of a prompt adjacent; `slots` of them are decoded at once.

        A response depends on the seed, its prompt's place in the list and its number among that prompt's samples alone.
        Temperature 0 takes the likeliest token. UserError for a reward model, and for a prompt that with `max_tokens` (see
        `Model.max_tokens`) is longer than the model may read.
        """
        length, settings = self.settings(temperature, top_p, max_tokens)
        if samples < 1 or slots < 1:
            raise UserError(f"samples={samples}, slots={slots}: both must be at least 1")
        asked = self.fitting(prompts, length)
        if not asked:
            return []
        at_once = -(-slots // samples)  # prompts
        most, found = min(CALL * at_once, size(len(asked), 1)), [[]] * len(asked)
        for mine in calls({i: len(ids) for i, ids in enumerate(asked)}, most, at_once):
            ids = self.answer(
                [asked[i] for i in mine],
                mine,
                most,
                slots=min(slots, most * samples),
                samples=samples,
                key=jax.random.key(seed),
                response_length=length,
                **settings,
            )
            for k, i in enumerate(mine):
                found[i] = [self.response(row) for row in ids[k * samples : (k + 1) * samples]]
        return sum(found, [])

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
        """The text of one response in pieces, as it is decoded; the generator's value at its end is the Response.

        It is the response that `generate` gives to the prompt at the place `number` of its list. No piece ends within a
        character. Its programs depend on the prompt's length, rounded up as `size` does, and on the settings alone.
        """
        length, settings = self.settings(temperature, top_p, max_tokens)
        (ids,) = self.fitting([prompt], length)
        row, key = encoding.pad([ids], size(len(ids)), left=True), jax.random.key(seed)
        index = jnp.full(1, number, jnp.int32)
        state = self.run(
            BEGIN,
            row,
            np.array([len(ids)], np.int32),
            index,
            key,
            response_length=length,
            **settings,
        )
        more = functools.partial(
            self.run, PROCEED, index=index, key=key, prompt_width=row.shape[1], **settings
        )
        said, live, (state, ahead) = "", True, more(state, tokens=0)
        while live:
            # The next tokens are on their way while these are read; once the response has ended there are none.
            now, (state, ahead) = ahead, more(state, tokens=AT_ONCE)
            (tokens,), (count,), (live,) = map(sharding.on_host, now)
            text = chat.decode_response(self.tokenizer, tokens[:count])
            whole = (
                text.rstrip("\ufffd") if live else text
            )  # what stands for half a character waits for the rest
            if len(whole) > len(said):
                yield whole[len(said) :]
                said = whole
        return self.response(tokens[:count])

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str | list[int]],
        *,
        microbatch_tokens: int = 4096,
    ) -> list[float]:
        """A reward model's score of each response to its prompt; about `microbatch_tokens` tokens are read at once.

        A response is text, which is read with the end token behind it, or tokens of the model's own tokenizer, which are
        read as they are: PPO scores what its policy has sampled so, and a text may be other tokens than were sampled.
        UserError for a language model, and for more tokens than the model may read.
        """
        if self.ends:
            raise UserError(
                "score: a reward model is wanted, a run of stage 'ranking'; this is a language model"
            )
        if len(prompts) != len(responses):
            raise UserError(f"score: {len(prompts)} prompts for {len(responses)} responses")
        texts = [response for response in responses if isinstance(response, str)]
        ends = iter(chat.encode_responses(self.tokenizer, texts))
        said = [
            next(ends) if isinstance(response, str) else list(response) for response in responses
        ]
        sequences = [ids + more for ids, more in zip(self.encode(prompts), said, strict=True)]
        longest = max(map(len, sequences), default=0)
        if longest > self.max_length:
            raise UserError(
                f"score: {longest} tokens of prompt and response, but the model may read {self.max_length}"
            )
        score = functools.partial(self.run, SCORES)
        return rewards.score_sequences(
            score, sequences, size(longest), microbatch_tokens, self.mesh
        ).tolist()

    def settings(
        self, temperature: float, top_p: float, max_tokens: int | None
    ) -> tuple[int, dict]:
        """(tokens of a response, what `rollout` takes besides), looked through."""
        if not self.ends:
            raise UserError(
                "generate: a language model is wanted; this is a reward model, which scores"
            )
        length = self.max_tokens if max_tokens is None else max_tokens
        if length < 1 or not 0 <= temperature < np.inf or not 0 < top_p <= 1:
            raise UserError(
                f"max_tokens={length} must be at least 1, temperature={temperature} not below 0, "
                f"top_p={top_p} in (0, 1]"
            )
        stops = np.zeros((1, self.architecture.vocab_size), np.int16)
        stops[:, self.ends] = 1
        return length, {
            "temperature": temperature,
            "top_p": top_p,
            "end": self.ends[0],
            "stops": stops,
        }

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of prompts, up to where the assistant begins."""
        if isinstance(prompts, str):
            raise UserError(f"a list of prompts is wanted, not {prompts[:80]!r} alone")
        if self.converses:
            asked = [[{"role": "user", "content": x}] if isinstance(x, str) else x for x in prompts]
            return chat.encode_prompts(self.tokenizer, asked)
        if not all(isinstance(x, str) for x in prompts):
            raise UserError(
                "messages need a chat template, and a model that was trained on it: plain text is wanted"
            )
        return self.tokenizer(list(prompts))["input_ids"] if prompts else []

    def fitting(self, prompts: Sequence[Prompt], room: int) -> list[list[int]]:
        """As `encode`; UserError unless there are tokens, and `room` more may follow."""
        found = self.encode(prompts)
        for i, ids in enumerate(found):
            if not 0 < len(ids) <= self.max_length - room:
                raise UserError(
                    f"prompt {i} has {len(ids)} tokens, and up to {room} may follow: at least 1, and no more than "
                    f"the model may read are wanted, max_length={self.max_length}"
                )
        return found

    def answer(
        self,
        prompts: list,
        numbers: list[int],
        most: int,
        *,
        key,
        samples: int = 1,
        prefix=None,
        **settings,
    ) -> list[np.ndarray]:
        """The tokens of the responses to prompts (tokens behind the prefix, none empty) of these numbers, in rows of `most`."""
        lengths = np.array([len(ids) for ids in prompts] + [1] * (most - len(prompts)), np.int32)
        index = np.array(numbers + [0] * (most - len(prompts)), np.int32)
        tokens = encoding.pad(
            [*prompts, *[(0,)] * (most - len(prompts))], size(lengths.max()), left=True
        )
        batch = sharding.shard_batch((tokens, lengths, index), self.mesh)
        sampled = self.run(
            GENERATE,
            *batch,
            key,
            prefix=prefix,
            wanted=jnp.int32(len(prompts)),
            samples=samples,
            **settings,
        )
        out, counts = (
            sharding.on_host(sampled.tokens)[:, tokens.shape[1] :],
            sharding.on_host(sampled.lengths),
        )
        return [
            row[:count] for row, count in zip(out[: len(prompts) * samples], counts, strict=False)
        ]

    def response(self, ids: np.ndarray) -> Response:
        return Response(
            chat.decode_response(self.tokenizer, ids), ids.tolist(), int(ids[-1]) not in self.ends
        )

    def run(self, program, *arguments, **settings):
        """program(architecture, parameters, ...) on the mesh; what is float32 is multiplied as such on any device."""
        precision = "highest" if self.architecture.dtype == "float32" else "default"
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(precision):
            return program(self.architecture, self.params, *arguments, **settings)


def load(
    run: str | Path,
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    max_length: int | None = None,
    chat_template: str = "",
    unfinished: bool = False,
) -> Model:
    """The model of a run (a PPO run's policy), or of a Hugging Face checkpoint: a directory or hf://ORG/NAME.

    A run of stage "ranking", or a sequence classifier, is a reward model, which scores; others generate. `dtype` is of the
    computation. The mesh is over all devices if none is given. `chat_template` "chatml" is for a checkpoint that has none;
    `unfinished` takes a run's newest checkpoint though the run is not complete. UserError for what can't be loaded.
    """
    if dtype not in configs.CHOICES["model.dtype"]:
        raise UserError(
            f"dtype={dtype!r} must be one of {', '.join(map(repr, configs.CHOICES['model.dtype']))}"
        )
    directory = locations.local_directory(str(run))
    stored, ours = locations.read_config(directory), locations.is_run(directory)
    if ours and not unfinished and not (directory / "summary.json").exists():
        raise UserError(f"{run}: this run is not complete; the command that began it goes on")
    architecture = locations.architecture(directory)
    architecture.dtype, architecture.remat, architecture.attention = dtype, "nothing", "auto"
    architecture.max_length = int(max_length or architecture.max_length)
    tokenizer = chat.load_tokenizer(directory / "tokenizer" if ours else directory, chat_template)
    mesh = mesh or sharding.make_mesh(configs.Mesh())
    head = "scalar" if scores(stored) else "lm"
    with jax.set_mesh(mesh):
        if ours or head == "lm":
            params = roles.load(architecture, head, mesh, jax.random.key(0), directory)
        else:
            params = roles.read_hf(architecture, head, mesh, directory)
        if "head" not in params and head == "scalar":
            raise UserError(f"{directory}: a sequence classifier without score.weight")
        if dtype != "float32" and head == "lm":  # a score is read off in float32, as in training
            params = jax.jit(transformer.rounded, static_argnums=0, donate_argnums=1)(
                architecture, params
            )
    converses = talks(stored, tokenizer)
    return Model(
        architecture,
        params,
        tokenizer,
        mesh,
        [] if head == "scalar" else ends(stored, tokenizer),
        converses,
    )


def scores(stored: dict) -> bool:
    """Whether this config.json is a reward model's."""
    kinds = stored.get("architectures") or [""]
    return stored.get("stage") == "ranking" or kinds[0].endswith("ForSequenceClassification")


def talks(stored: dict, tokenizer) -> bool:
    """Whether a model converses: there is a chat template, and it wasn't trained on plain text, as its config.json says."""
    return bool(tokenizer.chat_template) and stored.get("data.kind") != "text"


def ends(stored: dict, tokenizer) -> list[int]:
    """What ends a response: the tokenizer's end of text, what ends the assistant's turn where there is a template, and
    what ended a document where a run was trained on plain text."""
    turn = [chat.end_token(tokenizer)] if tokenizer.chat_template else []
    document = [encoding.closing(tokenizer)] if stored.get("data.kind") == "text" else []
    found = [
        token
        for token in dict.fromkeys((tokenizer.eos_token_id, *turn, *document))
        if token is not None
    ]
    if not found:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has neither an eos_token nor a chat template"
        )
    return found


def calls(lengths: dict[int, int], most: int, slots: int):
    """The requests of {request: length}, longest first, in calls of at most `most`. Where slots are filled and lengths have
    halved there is a new one, for what a call reads and keeps of a prompt is as wide as its longest."""
    call = []
    for i in sorted(lengths, key=lengths.get, reverse=True):
        if len(call) == most or (len(call) >= slots and 2 * lengths[i] <= lengths[call[0]]):
            yield call
            call = []
        call.append(i)
    yield call


def size(n: int, least: int = 8) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...: lengths are rounded up to these, that few programs are compiled."""
    n = max(int(n), least)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power
