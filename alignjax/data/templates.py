"""Render chat templates, with the date of the run instead of today's.

A template is code that came with a tokenizer: whatever it raises is reported in one line.
"""

import datetime
import functools

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from alignjax.config import UserError, check_date, reason_of

LONGEST_REASON = 200  # characters of what a template raises
# The function by which a template asks for the date, and all that may follow "%" in its format.
DATE_FUNCTION = "strftime_now"
DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVeDFTRhnt"
# What a run adds to the settings that its tokenizer is saved with; children take them over.
DATE = "template_date"
CONTENT_TOKENS = "special_tokens_in_content"


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template; UserError if it has none, or several and no default."""
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(f"{tokenizer.name_or_path}: {reason_of(error, LONGEST_REASON)}") from None


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer's chat template writes the date."""
    return bool(tokenizer.chat_template) and DATE_FUNCTION in template_of(tokenizer)


def date_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the date that the tokenizer's template writes, in ISO format; "" is today's."""
    date = tokenizer.init_kwargs.get(DATE, "")
    try:
        check_date(date)
    except (TypeError, UserError):
        raise UserError(
            f"{tokenizer.name_or_path}: in tokenizer_config.json, {DATE}={date!r} must be a date "
            "such as 2026-01-31"
        ) from None
    return date


def allows_tokens_in_content(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether special tokens in contents are special tokens, rather than text."""
    return tokenizer.init_kwargs.get(CONTENT_TOKENS, False) is True


def options_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """Return the date if the template writes one, and whether contents may have special tokens."""
    date = date_of(tokenizer) if asks_for_date(tokenizer) else ""
    return date, allows_tokens_in_content(tokenizer)


def set_options(tokenizer: PreTrainedTokenizerBase, date: str, tokens_in_content: bool) -> None:
    """Fix the date that a tokenizer's template writes, and how its contents are encoded.

    A tokenizer that is saved keeps both.
    """
    if date:
        tokenizer.init_kwargs[DATE] = date
    if tokens_in_content:
        tokenizer.init_kwargs[CONTENT_TOKENS] = True


@functools.lru_cache(maxsize=32)
def with_date(template: str, date: str) -> str:
    """Return a template that writes this date wherever it asks for today's."""
    if DATE_FUNCTION not in template or not date:
        return template
    day = datetime.datetime.fromisoformat(date)
    text = "format | replace('%%', '\\0')"
    for directive in DIRECTIVES:
        for padding in ("-", ""):
            written = day.strftime(f"%{padding}{directive}")
            text += f" | replace({f'%{padding}{directive}'!r}, {written!r})"
    text += " | replace('\\0', '%')"
    # The template's own first line begins a line, as it did: Jinja drops the line end.
    return f"{{% macro {DATE_FUNCTION}(format) -%}}{{{{ {text} }}}}{{%- endmacro %}}\n{template}"


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    generate: bool,
    continue_last: bool = False,
) -> str:
    """Return what the chat template writes for messages.

    With `generate`, the text ends where the assistant begins its turn; with `continue_last`, at
    the end of the last message's content.

    Raises:
      UserError: the template refuses the messages, or fails.
    """
    template = with_date(template_of(tokenizer), date_of(tokenizer))
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generate,
            continue_final_message=continue_last,
        )
    except TemplateSyntaxError as error:
        reason = f"it cannot be parsed: {reason_of(error, LONGEST_REASON)}"
    except Exception as error:  # it is the template's code that raises
        reason = reason_of(error, LONGEST_REASON)
    raise UserError(f"chat template of {tokenizer.name_or_path}: {reason}")
