"""Tokens of conversations, prompts and responses: one path for training and scoring.

A conversation is cut where the assistant's turns begin and end, and each piece is tokenised on its
own, so no token straddles the edge of a turn: the ids of a prompt followed by those of a response
are the ids of the conversation.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignjax.config import UserError
from alignjax.data import tokenizer_files

START = "<|im_start|>"
END = "<|im_end|>"
PAD = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Stands for the assistant's content while a template is rendered: a private character, in no text.
HOLE = "\ue000"
ROLES_IN_VOCABULARY = ["system\nuser\nassistant\n"] * 3000


class EncodedConversation(NamedTuple):
    """The tokens of a conversation, and 1 for each token that is trained on, 0 for the others."""

    tokens: list[int]
    trained: list[int]


class EncodedComparison(NamedTuple):
    """The tokens of a prompt with its chosen and with its rejected response."""

    chosen: list[int]
    rejected: list[int]


def train_tokenizer(texts: list[str], directory: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE with ChatML's tokens and template, and save it in a directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # Every conversation has the roles but few texts do: repeat them, so each becomes one token.
    tokenizer.train_from_iterator(itertools.chain(texts, ROLES_IN_VOCABULARY), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.add_special_tokens({"additional_special_tokens": [START]})
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    return load_tokenizer(directory)


def load_tokenizer(directory: Path, template: str = "") -> PreTrainedTokenizerBase:
    """Load a Hugging Face tokenizer, with its own chat template or, with "chatml", ChatML.

    Raises:
      UserError: for files that are missing or damaged, for a tokenizer that needs code of its own,
        and if ChatML's tokens are not in its vocabulary.
    """
    tokenizer = tokenizer_files.load(directory)
    if template == "chatml":
        use_chatml(tokenizer, directory)
    return tokenizer


def use_chatml(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Set ChatML as the template; UserError if its tokens are not in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in (START, END) if token not in vocabulary]
    if absent:
        raise UserError(
            f"chat_template='chatml', but {', '.join(absent)} is no token of {directory}"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.chat_template = CHATML


@functools.lru_cache(maxsize=8)
def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token with which the chat template ends the assistant's turn.

    It is not always the tokenizer's own end token.
    """
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [(_, after)] = split(tokenizer, [exchange], generate=False)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in tokenizer.all_special_ids:
        raise UserError(
            f"chat template of {tokenizer.name_or_path}: no special token ends the assistant's turn"
        )
    return ids[0]


def split(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], generate: bool
) -> list[list[str]]:
    """Return what the chat template writes around the assistant's contents.

    For each conversation there is one piece more than the assistant has turns. With `generate`,
    the last piece ends where the assistant begins its next turn.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    hollow = [with_holes(messages) for messages in conversations]
    try:
        texts = tokenizer.apply_chat_template(
            hollow, tokenize=False, add_generation_prompt=generate
        )
    except TemplateError as error:  # the template refuses something, such as a system message
        raise UserError(f"chat template of {tokenizer.name_or_path}: {error}") from None
    around = [text.split(HOLE) for text in texts]
    for messages, parts in zip(conversations, around, strict=True):
        turns = len(contents_of_assistant(messages))
        if len(parts) != turns + 1:
            raise UserError(
                f"chat template of {tokenizer.name_or_path}: {turns} assistant turns in, "
                f"{len(parts) - 1} out"
            )
    return around


def with_holes(messages: list[dict]) -> list[dict]:
    """Return messages with HOLE as the content of each of the assistant's."""
    return [
        {**message, "content": HOLE} if message["role"] == "assistant" else message
        for message in messages
    ]


def contents_of_assistant(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    """Return {text: its ids}.

    A text that comes several times, as many in a small world do, is encoded once.
    """
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    ids = tokenizer(distinct, add_special_tokens=False)["input_ids"]
    return dict(zip(distinct, ids, strict=True))


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], generate: bool
) -> list[EncodedConversation]:
    """Encode each conversation, with `generate` up to where the assistant begins its next turn."""
    around = split(tokenizer, conversations, generate)
    contents = [contents_of_assistant(messages) for messages in conversations]
    ids = ids_of(tokenizer, itertools.chain(*around, *contents))
    encoded = []
    for pieces_around, turns in zip(around, contents, strict=True):
        tokens = list(ids[pieces_around[0]])
        trained = [0] * len(tokens)
        for turn, after in zip(turns, pieces_around[1:], strict=True):
            rest = ids[after]  # its first token is the end token
            tokens += ids[turn] + rest
            trained += [1] * (len(ids[turn]) + 1) + [0] * (len(rest) - 1)
        encoded.append(EncodedConversation(tokens, trained))
    return encoded


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]]
) -> list[EncodedConversation]:
    """Encode each conversation; the assistant's tokens, with their end tokens, are trained on.

    What the template writes after the last end token is left out: it is never a target.
    """
    # A template that does not close the assistant's turn would be trained on the wrong tokens.
    end_token(tokenizer)
    encoded = encode(tokenizer, conversations, generate=False)
    return [up_to_last_trained(conversation) for conversation in encoded]


def up_to_last_trained(conversation: EncodedConversation) -> EncodedConversation:
    """Cut a conversation behind the last token that is trained on, if there is one."""
    tokens, trained = conversation
    if 1 not in trained:
        return conversation
    length = len(trained) - trained[::-1].index(1)
    return EncodedConversation(tokens[:length], trained[:length])


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]]
) -> list[list[int]]:
    """Return the tokens of each prompt, up to where the assistant begins."""
    encoded = encode(tokenizer, conversations, generate=True)
    return [prompt.tokens for prompt in encoded]


def encode_responses(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each response, with its end token."""
    end = end_token(tokenizer)
    ids = ids_of(tokenizer, texts)
    return [ids[text] + [end] for text in texts]


def encode_comparisons(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> list[EncodedComparison]:
    """Encode each comparison: the prompt's ids, then a response's, as PPO has them scored."""
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    chosen = encode_responses(tokenizer, [row["chosen"] for row in rows])
    rejected = encode_responses(tokenizer, [row["rejected"] for row in rows])
    return [
        EncodedComparison(prompt + better, prompt + worse)
        for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
    ]


def decode_response(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of a response's real tokens, without its end token."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token, special ones too.

    A character that several tokens make up belongs to the last of them.
    """
    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(tokenizer.backend_tokenizer, int(token)) or "" for token in tokens]
    whole = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    streamed = "".join(texts)
    if whole.startswith(streamed):
        # The last character may be cut off: its tokens give no text to the stream.
        texts[-1] += whole[len(streamed) :]
    return texts
