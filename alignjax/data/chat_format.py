"""How a tokenizer and its chat template make tokens of a prompt and its response.

A turn is rendered twice: its prompt as PPO asks for it, and the conversation with the reply. What
the second text has beyond the first is the response: the reply as the template writes it, with
whatever the template puts before it, up to the token that ends the turn. So whoever trains on a
turn reads what PPO presents, whatever the template is.

A template may not begin the second text with the first one, because it asks for a reply in
another way than it repeats one: DeepSeek-R1's prompt opens a think block, which is left out of a
conversation. Then the response is the reply itself, less what the prompt has already written of
it, and the template's end of the turn.
"""

import functools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from alignjax.config import UserError
from alignjax.data import templates
from alignjax.data.control_tokens import ControlTokens, bracketed_tokens

# Words in no template, by which what it writes around contents is found.
USER_WORD = "xqzuser"
REPLY_WORD = "xqzreply"
USER = {"role": "user", "content": USER_WORD}
REPLY = {"role": "assistant", "content": REPLY_WORD}
# A template may want a system message.
OPENINGS = ([USER], [{"role": "system", "content": USER_WORD}, USER])
# Beginnings of responses, by which a tokenizer shows whether it encodes a continuation otherwise
# than a beginning; and texts after which a continuation may be encoded.
BEGINNINGS = ("Yes", "no", "3", "(a)", '"It', "- a", "\u00e9")
CONTEXTS = ("\n", ".", "a\n")


class Turn(NamedTuple):
    """The texts of a turn, with secret names for the template's control tokens."""

    prompt: str
    response: str  # through the end token


class EncodedTurn(NamedTuple):
    """The tokens of a turn."""

    prompt: list[int]
    response: list[int]  # through the end token


class EncodedConversation(NamedTuple):
    """The tokens of a conversation, and 1 for each token that is trained on, 0 for the others."""

    tokens: list[int]
    trained: list[int]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a template writes for a conversation of known words."""

    opening: list[dict]  # the messages before the reply
    prompt: str  # up to where the assistant begins
    whole: str  # with a reply
    history: str  # with a reply and another turn of the user; "" if the template refuses that

    @property
    def after_reply(self) -> str:
        """Return what the template writes after the reply."""
        return self.whole.rpartition(REPLY_WORD)[2]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What stands around a reply in the text of its tokens."""

    before: str
    after: str

    def content(self, text: str, ended: bool = True) -> str:
        """Return the content of a reply whose tokens have this text.

        If it has not `ended`, what may yet turn out to be no content is held back.
        """
        if text.startswith(self.before):
            text = text[len(self.before) :]
        elif not ended and self.before.startswith(text):
            return ""
        if ended:
            return text.removesuffix(self.after)
        lengths = range(min(len(self.after), len(text)), 0, -1)
        held = next((n for n in lengths if self.after.startswith(text[-n:])), 0)
        return text[: len(text) - held]


class ChatFormat:
    """The tokens of turns by one tokenizer and template.

    Attributes:
        around_reply: what the template, or the tokenizer, puts around a reply.
        controls: encodes texts, with the template's control tokens and no others.
        end_token: the token that ends the assistant's turn.
        closing_tokens: what the template writes after the end token of the last turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.name = f"chat template of {tokenizer.name_or_path}"
        probe = probe_template(tokenizer)
        of_reply = tokens_of_reply(tokenizer, probe)
        end_name = find_end(tokenizer, probe, of_reply)
        if end_name is None:
            raise UserError(f"{self.name}: no special token ends the assistant's turn")
        self.controls = ControlTokens(
            tokenizer,
            markers=turn_markers(tokenizer, probe) | {end_name},
            of_reply=of_reply,
            allowed_in_content=templates.allows_tokens_in_content(tokenizer),
        )
        self.end_token = self.controls.ids[end_name]
        self.end_name = self.controls.secret_names[end_name]
        before_end = probe.after_reply.partition(end_name)[0]
        self.ending = self.controls.with_secrets(before_end) + self.end_name
        self.opened = opened_by_prompt(probe)
        end_names = {end_name, tokenizer.eos_token or end_name}
        self.repeated_ends = re.compile(rf"(?:(?:{'|'.join(map(re.escape, end_names))})\s*)+\Z")
        self.check_copy(probe)
        prompt = self.controls.with_secrets(probe.prompt)
        self.encodes_alone = self.encodes_continuations_alone(prompt)
        self.closing_tokens = self.find_closing(probe)
        self.around_reply = self.find_around(probe)

    def check_copy(self, probe: Probe) -> None:
        """Raise UserError unless the template's texts have the tokenizer's own ids."""
        for text in (probe.prompt, probe.whole):
            marked = self.controls.with_secrets(text)
            own_ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            if self.controls.encode([marked])[marked] != own_ids:
                raise UserError(
                    f"{self.tokenizer.name_or_path}: control tokens of this tokenizer depend on "
                    "the text around them, so that they cannot be told from text"
                )

    def encodes_continuations_alone(self, prompt: str) -> bool:
        """Return whether a response after a prompt has the ids that it has alone."""
        texts = [prompt, *BEGINNINGS, *(prompt + beginning for beginning in BEGINNINGS)]
        ids = self.controls.encode(texts)
        return all(
            ids[prompt + beginning] == ids[prompt] + ids[beginning] for beginning in BEGINNINGS
        )

    def find_closing(self, probe: Probe) -> list[int]:
        """Return the tokens after the end token of the last turn."""
        whole = self.controls.with_secrets(probe.whole)
        up_to_reply = whole.rpartition(REPLY_WORD)[0]
        ids = self.controls.encode([whole])[whole]
        ends_before = up_to_reply.count(self.end_name)
        places = [place for place, token in enumerate(ids) if token == self.end_token]
        if len(places) <= ends_before:
            raise UserError(
                f"{self.name}: the tokenizer does not read the end of the assistant's turn as "
                "one token"
            )
        return ids[places[ends_before] + 1 :]

    def find_around(self, probe: Probe) -> Surroundings:
        """Return what stands around a reply: white space, an empty thought, a role.

        A model that has learned from turns writes it too, and it is no part of the content: the
        template would write it again.
        """
        [turn] = self.encode_turns([self.turn(probe.opening, REPLY_WORD)])
        text = decode_text(self.tokenizer, self.controls, turn.response[:-1])
        before, word, after = text.partition(REPLY_WORD)
        return Surroundings(before=before if word else "", after=after)

    # --------------------------------------------------------------------------- texts of a turn

    def prompt_text(self, messages: list[dict]) -> str:
        """Return a prompt, up to where the assistant begins its turn."""
        return self.controls.with_secrets(self.render(messages, generate=True))

    def turn(self, messages: list[dict], reply: str) -> Turn:
        """Return the texts of a turn that answers messages.

        Raises:
          UserError: the template refuses the messages, or leaves out the reply or its end.
        """
        prompt = self.render(messages, generate=True)
        response = self.rendered_response(messages, prompt, reply)
        return Turn(self.controls.with_secrets(prompt), response)

    def rendered_response(self, messages: list[dict], prompt: str, reply: str) -> str:
        """Return a reply as the template writes it after the rendered prompt."""
        whole = self.render([*messages, {"role": "assistant", "content": reply}], generate=False)
        if not whole.startswith(prompt):
            return self.plain_response(reply)
        response = self.controls.with_secrets(whole[len(prompt) :])
        # Contents have no end token, unless they may have any token.
        find = str.rfind if self.controls.allowed_in_content else str.find
        place = find(response, self.end_name)
        if place < 0:
            raise UserError(f"{self.name}: it writes no end of the assistant's turn")
        if self.without_end(reply).strip() and self.is_lost(
            messages, prompt, reply, response[:place]
        ):
            raise UserError(f"{self.name}: it leaves out the assistant's reply {reply[:40]!r}")
        return response[:place] + self.end_name

    def is_lost(self, messages: list[dict], prompt: str, reply: str, response: str) -> bool:
        """Return whether the response to a prompt says nothing of a reply that is not empty."""
        if not response.strip():
            return True
        if reply == REPLY_WORD or self.without_end(reply).strip()[-8:] in response:
            return False
        other = self.rendered_response(messages, prompt, REPLY_WORD)
        return other.removesuffix(self.end_name) == response

    def plain_response(self, reply: str) -> str:
        """Return a reply as it is, after a prompt that has already written what it `opened`."""
        text = self.without_end(reply)
        for opened in (self.opened, self.opened.strip()):
            if opened and text.startswith(opened):
                text = text[len(opened) :]
                break
        return self.controls.of_content(text) + self.ending

    def render(self, messages: list[dict], generate: bool) -> str:
        """Return what the template writes, with the control tokens of contents shielded."""
        contents = self.controls.shield_messages(map(self.with_one_end, messages))
        return templates.render(self.tokenizer, contents, generate)

    def with_one_end(self, message: dict) -> dict:
        """Return a message without the end token that a reply in data may already have."""
        content = message.get("content")
        if message.get("role") != "assistant" or not isinstance(content, str):
            return message
        return {**message, "content": self.without_end(content)}

    def without_end(self, reply: str) -> str:
        return self.repeated_ends.sub("", reply)

    # -------------------------------------------------------------------------- tokens of a turn

    def encode_prompts(self, conversations: Iterable[list[dict]]) -> list[list[int]]:
        """Return the tokens of each prompt, up to where the assistant begins."""
        texts = [self.prompt_text(messages) for messages in conversations]
        ids = self.controls.encode(texts)
        return [ids[text] for text in texts]

    def encode_turns(self, turns: Sequence[Turn]) -> list[EncodedTurn]:
        """Return the tokens of each turn.

        Those of a prompt are the tokenizer's for the whole text. Those of a response continue
        them.
        """
        prompts = self.controls.encode(turn.prompt for turn in turns)
        if self.encodes_alone:
            responses = self.controls.encode(turn.response for turn in turns)
            return [EncodedTurn(prompts[turn.prompt], responses[turn.response]) for turn in turns]
        joint = self.controls.encode(turn.prompt + turn.response for turn in turns)
        encoded = []
        for turn in turns:
            prompt = prompts[turn.prompt]
            whole = joint[turn.prompt + turn.response]
            if whole[: len(prompt)] == prompt:
                response = whole[len(prompt) :]
            else:
                response = self.encode_continuation(turn.response)
            encoded.append(EncodedTurn(prompt, response))
        return encoded

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text without the space that the tokenizer puts before a beginning.

        It matters only where a prompt and its response share a token when they are read at once.
        """
        ids = self.controls.encode([*CONTEXTS, *(context + text for context in CONTEXTS), text])
        for context in CONTEXTS:
            before = ids[context]
            whole = ids[context + text]
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return ids[text]

    def sequences(self, turns: Sequence[EncodedTurn]) -> list[EncodedConversation]:
        """Return the sequences in which the turns of one conversation are trained.

        A turn is trained after the prompt that PPO would present, so turns share a sequence only
        if the earlier ones stand in the last one's prompt as they were.
        """
        sequences: list[EncodedConversation] = []
        for turn in reversed(turns):
            tokens = turn.prompt + turn.response
            host = next((one for one in sequences if one.tokens[: len(tokens)] == tokens), None)
            if host is None:
                host = EncodedConversation(tokens, [0] * len(tokens))
                sequences.append(host)
            host.trained[len(turn.prompt) : len(tokens)] = [1] * len(turn.response)
        return sequences[::-1]

    def encode_conversations(
        self, conversations: Sequence[list[dict]]
    ) -> list[list[EncodedConversation]]:
        """Return the sequences of each conversation."""
        turns = [self.turns_of(messages) for messages in conversations]
        encoded = iter(self.encode_turns([turn for part in turns for turn in part]))
        return [self.sequences([next(encoded) for _ in part]) for part in turns]

    def turns_of(self, messages: list[dict]) -> list[Turn]:
        """Return the assistant's turns; one with nothing before it answers nothing."""
        turns = [
            self.turn(messages[:place], message["content"])
            for place, message in enumerate(messages)
            if message["role"] == "assistant" and place
        ]
        if not turns:
            raise UserError("messages: the assistant answers nothing: no message is before it")
        return turns


def probe_template(tokenizer: PreTrainedTokenizerBase) -> Probe:
    """Return what a template writes for the shortest conversation that it accepts."""
    refusals = []
    for opening in OPENINGS:
        try:
            prompt = templates.render(tokenizer, opening, True)
            whole = templates.render(tokenizer, [*opening, REPLY], False)
        except UserError as error:
            refusals.append(error)
            continue
        if REPLY_WORD not in whole:
            raise UserError(
                f"chat template of {tokenizer.name_or_path}: it leaves out the assistant's replies"
            )
        try:
            history = templates.render(tokenizer, [*opening, REPLY, USER], False)
        except UserError:
            history = ""
        return Probe(opening=opening, prompt=prompt, whole=whole, history=history)
    raise refusals[0]


def find_end(tokenizer: PreTrainedTokenizerBase, probe: Probe, of_reply: set[str]) -> str | None:
    """Return the name of the first control token after the reply, or None if there is none."""
    names = {*tokenizer.all_special_tokens, *bracketed_tokens(tokenizer)} - of_reply
    text = probe.after_reply
    places = [(text.index(name), -len(name), name) for name in names if name and name in text]
    return min(places)[2] if places else None


def turn_markers(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> set[str]:
    """Return the tokens in brackets that the template writes around turns, special or not."""
    around = (probe.history or probe.whole).replace(REPLY_WORD, "\0")
    return {name for name in bracketed_tokens(tokenizer) if name in around}


def tokens_of_reply(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> set[str]:
    """Return pairs such as <think> and </think> that the template writes within a reply.

    They belong to the reply: a model writes them itself.
    """
    ends_of_text = {tokenizer.bos_token, tokenizer.eos_token}
    names = set(bracketed_tokens(tokenizer)) - ends_of_text
    words = {name[1:-1].removeprefix("/") for name in names}
    pairs = [{f"<{word}>", f"</{word}>"} for word in words]
    opened = opened_by_prompt(probe)
    turn_of_user = probe.prompt.removesuffix(opened)
    within = opened
    for text in (probe.whole, probe.history):
        before_reply = text.partition(REPLY_WORD)[0]
        shared = len(os.path.commonprefix([probe.prompt, text]))
        within += "\0" + before_reply[shared:]
    return {
        name
        for pair in pairs
        if pair <= names and writes(pair, within) and not writes(pair, turn_of_user)
        for name in pair
    }


def writes(names: Iterable[str], text: str) -> bool:
    """Return whether a text has one of these names."""
    return any(name in text for name in names)


def opened_by_prompt(probe: Probe) -> str:
    """Return what only the prompt has, if a conversation with a reply does not begin with it."""
    return probe.prompt[len(os.path.commonprefix([probe.prompt, probe.whole])) :]


class Context(NamedTuple):
    """Tokens after which others are decoded, and their text."""

    tokens: list[int]
    text: str


@functools.lru_cache(maxsize=8)
def context_of(tokenizer: PreTrainedTokenizerBase) -> Context:
    """Return the context in which the tokens of a response are decoded.

    Many decoders drop the space with which a text begins, because their tokenizers have put it
    there. A response is no beginning: its first space is the model's.
    """
    tokens = tokenizer.backend_tokenizer.encode("x", add_special_tokens=False).ids
    return Context(tokens, decode(tokenizer, tokens))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of tokens, special ones too, as the decoder has it."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decode_after_context(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text that tokens add to the context, special tokens included."""
    context = context_of(tokenizer)
    tokens = [int(token) for token in tokens]
    whole = decode(tokenizer, context.tokens + tokens)
    if whole.startswith(context.text):
        return whole[len(context.text) :]
    return decode(tokenizer, tokens)


def decode_text(
    tokenizer: PreTrainedTokenizerBase, controls: ControlTokens, tokens: Iterable[int]
) -> str:
    """Return the text that tokens add to the context, without special tokens."""
    kept = [int(token) for token in tokens if int(token) not in controls.special_ids]
    return decode_after_context(tokenizer, kept)


@functools.lru_cache(maxsize=8)
def cached_format(
    tokenizer: PreTrainedTokenizerBase, template: str, date: str, tokens_in_content: bool
) -> ChatFormat:
    """Return the format of a tokenizer whose settings are these."""
    return ChatFormat(tokenizer)


def format_of(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Return the format of a tokenizer; UserError if its template is of no use."""
    return cached_format(
        tokenizer,
        templates.template_of(tokenizer),
        templates.date_of(tokenizer),
        templates.allows_tokens_in_content(tokenizer),
    )


@functools.lru_cache(maxsize=8)
def cached_controls(
    tokenizer: PreTrainedTokenizerBase, template: str, tokens_in_content: bool
) -> ControlTokens:
    """Return the control tokens of a tokenizer whose settings are these."""
    if template:
        try:
            return format_of(tokenizer).controls
        except UserError:
            pass  # text needs no template
    return ControlTokens(tokenizer, allowed_in_content=tokens_in_content)


def controls_of(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Return what encodes plain text by a tokenizer, with a chat template or without one."""
    return cached_controls(
        tokenizer,
        str(tokenizer.chat_template or ""),
        templates.allows_tokens_in_content(tokenizer),
    )
