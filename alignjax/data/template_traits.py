"""What a chat template does, found out by rendering conversations of known words with it.

`chat_format` makes the tokens, here as in training: these are facts about its results.
"""

import os
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alignjax.config import UserError
from alignjax.data import chat_format, templates
from alignjax.data.chat_format import REPLY, REPLY_WORD, USER, USER_WORD, ChatFormat, Probe

SYSTEM_WORD = "xqzsystem"
THOUGHT_WORD = "xqzthought"
SYSTEM = {"role": "system", "content": SYSTEM_WORD}
THINKING_REPLY = {
    "role": "assistant",
    "content": f"<think>\n{THOUGHT_WORD}\n</think>\n\n{REPLY_WORD}",
}
ORDINARY_REPLY = "Yes"
THINK = "<think>"


@dataclass(frozen=True, kw_only=True)
class TemplateTraits:
    """Facts about a chat template and its tokenizer; texts are as the template writes them."""

    system: str  # what becomes of a system message, as a phrase
    preface: str  # the text before the user's first turn if there is no system message
    user_twice: str  # "" if two turns of the user in a row are accepted, else why not
    generation_prompt: str  # what asks for a reply; "" if nothing does
    before_reply: str  # what stands between that and a reply
    first_piece: str  # the token that an ordinary reply begins with, in the tokenizer's notation
    end: str  # the token that ends a reply
    end_id: int
    after_end: str
    think: str  # what it does about thoughts, as a phrase; "" if nothing
    earlier_turns_stay: bool  # a reply stands in later prompts as it was trained
    writes_date: bool


def traits_of(tokenizer: PreTrainedTokenizerBase) -> TemplateTraits:
    """Return what a tokenizer's chat template does; UserError if it cannot be used."""
    chat = chat_format.format_of(tokenizer)
    probe = chat_format.probe_template(tokenizer)
    turn = chat.turn(probe.opening, ORDINARY_REPLY)
    [encoded] = chat.encode_turns([turn])
    before_reply = chat.controls.without_secrets(turn.response).partition(ORDINARY_REPLY)[0]
    return TemplateTraits(
        system=system_role(tokenizer, chat),
        preface=preface_of(tokenizer, probe),
        user_twice=refusal(tokenizer, [USER, USER]),
        generation_prompt=generation_prompt(tokenizer, probe),
        before_reply=before_reply,
        first_piece=str(tokenizer.convert_ids_to_tokens(encoded.response[0])),
        end=chat.controls.without_secrets(chat.end_name),
        end_id=chat.end_token,
        after_end=tokenizer.decode(chat.closing_tokens),
        think=thoughts(tokenizer, probe, before_reply),
        earlier_turns_stay=earlier_turns_stay(chat, probe),
        writes_date=templates.asks_for_date(tokenizer),
    )


def refusal(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    """Return why a template refuses messages, or "" if it accepts them."""
    try:
        templates.render(tokenizer, messages, True)
    except UserError as error:
        return str(error).partition(": ")[2]
    return ""


def system_role(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> str:
    """Return what becomes of a system message."""
    reason = refusal(tokenizer, [SYSTEM, USER])
    if reason:
        return f"refused ({reason})"
    if refusal(tokenizer, [USER]):
        return "needed: the template refuses a conversation without one"
    text = templates.render(tokenizer, [SYSTEM, USER], True)
    if SYSTEM_WORD not in text:
        return "left out: the template does not write it"
    between = text.partition(SYSTEM_WORD)[2].partition(USER_WORD)[0]
    if USER_WORD not in text.partition(SYSTEM_WORD)[2]:
        return "accepted, behind the user's turn"
    if chat.controls.in_content.search(between):
        return "accepted, as a turn of its own"
    return f"accepted, in the user's turn, before {between!r}"


def preface_of(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> str:
    """Return what stands before the user's first turn, beyond the beginning of a text.

    A turn begins as a later one does, with what all of them have before their content.
    """
    before = probe.prompt.partition(USER_WORD)[0]
    later = probe.history.rpartition(REPLY_WORD)[2].partition(USER_WORD)[0]
    shared = os.path.commonprefix([before[::-1], later[::-1]])
    preface = before[: len(before) - len(shared)].strip()
    return "" if preface == (tokenizer.bos_token or "") else preface


def generation_prompt(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> str:
    """Return what a template adds to messages to ask for a reply."""
    plain = templates.render(tokenizer, probe.opening, False)
    return probe.prompt[len(os.path.commonprefix([probe.prompt, plain])) :]


def thoughts(tokenizer: PreTrainedTokenizerBase, probe: Probe, before_reply: str) -> str:
    """Return what a template does about thoughts in <think>."""
    phrases = []
    if THINK in probe.prompt.rpartition(USER_WORD)[2]:
        phrases.append("prompts have a think block, open or empty")
    if THINK in before_reply:
        phrases.append("an empty think block is written before a reply without thoughts")
    try:
        last = templates.render(tokenizer, [*probe.opening, THINKING_REPLY], False)
        earlier = templates.render(tokenizer, [*probe.opening, THINKING_REPLY, USER], True)
    except UserError:
        return "; ".join(phrases)
    if THOUGHT_WORD not in last:
        phrases.append("thoughts are left out of every reply")
    elif THOUGHT_WORD not in earlier:
        phrases.append("thoughts are left out of earlier replies")
    return "; ".join(phrases)


def earlier_turns_stay(chat: ChatFormat, probe: Probe) -> bool:
    """Return whether a conversation of two ordinary replies is one sequence."""
    conversation = [*probe.opening, REPLY, USER, REPLY]
    try:
        [sequences] = chat.encode_conversations([conversation])
    except UserError:
        return True
    return len(sequences) == 1
