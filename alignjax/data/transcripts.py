"""Conversations as text, in the form of Anthropic's HH, into messages; two conversations into one comparison."""

import re

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def transcript(text: str) -> list[dict] | None:
    r"""The messages of a transcript whose turns begin `\n\nHuman: ` or `\n\nAssistant: `; None if it does not begin so.

    What a turn says is stripped, and may be empty. `Human:` that doesn't follow an empty line is something said: HH has
    many replies in which the assistant goes on to write the human's next turn.
    """
    before, *turns = TURN.split(text)
    if before or not turns:
        return None
    return [
        {"role": ROLES[who], "content": said.strip()}
        for who, said in zip(turns[::2], turns[1::2], strict=True)
    ]


def split(chosen: list[dict], rejected: list[dict]) -> tuple[list[dict], str, str] | str:
    """(prompt, chosen, rejected) of two conversations that differ in the last message alone; else why not, as text.

    The prompt is the messages that they share, and ends with a user's; each reply is one message of the assistant's.
    """
    if chosen[:-1] != rejected[:-1]:
        return "the conversations differ before their last messages"
    if {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        return "a conversation does not end with the assistant's message"
    if len(chosen) < 2 or chosen[-2]["role"] != "user":
        return "no user's message before the last"
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
