"""Conversations as text, in the form of Anthropic's HH, and what makes two of them a pair."""

import re

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def parse(text: str) -> list[dict] | None:
    r"""Return the messages of a transcript; None if it does not begin with a turn.

    A turn begins with `\n\nHuman: ` or `\n\nAssistant: `. Its content is stripped, and may be
    empty. `Human:` that does not follow an empty line belongs to the content: HH has many replies
    in which the assistant goes on to write the human's next turn.
    """
    before, *turns = TURN.split(text)
    if before or not turns:
        return None
    speakers = turns[::2]
    contents = turns[1::2]
    return [
        {"role": ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]


def difference_fault(chosen: list[dict], rejected: list[dict]) -> str:
    """Return why two conversations are not two replies to one prompt; "" if they are.

    They must share all messages but the last, the prompt, which must end with the user's; and the
    last message of each must be the assistant's.
    """
    if chosen[:-1] != rejected[:-1]:
        return "the conversations differ before their last messages"
    if {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        return "a conversation does not end with a message of the assistant"
    if len(chosen) < 2 or chosen[-2]["role"] != "user":
        return "there is no message of the user before the last one"
    return ""
