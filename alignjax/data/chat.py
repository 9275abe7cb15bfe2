"""Tokens of conversations, prompts and responses: one path for training and scoring.

`chat_format` makes all of them, a turn at a time, so the ids of a turn that SFT trains are those
of the prompt that PPO presents, followed by those of the response.

Text in contents that looks like a control token is text, unless the tokenizer was told otherwise
(`templates.set_options`).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignjax.config import UserError
from alignjax.data import chat_format, tokenizer_files
from alignjax.data.chat_format import EncodedConversation, EncodedTurn

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
ROLES_IN_VOCABULARY = ["system\nuser\nassistant\n"] * 3000


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


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token with which the chat template ends the assistant's turn.

    It is not always the tokenizer's own end token.
    """
    return chat_format.format_of(tokenizer).end_token


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the chat template writes after the end token of a conversation's last turn.

    It is never trained on, and no prompt with a response has it. ChatML writes a line end.
    """
    return list(chat_format.format_of(tokenizer).closing_tokens)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], begin: bool = False
) -> list[list[int]]:
    """Return the tokens of plain texts; with `begin`, with those around a whole text."""
    controls = chat_format.controls_of(tokenizer)
    contents = [controls.of_content(text) for text in texts]
    ids = controls.encode(contents, begin)
    return [ids[text] for text in contents]


def conversation_sequences(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict]]
) -> list[list[EncodedConversation]]:
    """Return the sequences in which each conversation is trained.

    All turns of the assistant, with their end tokens, are trained on. They share one sequence,
    unless the template writes earlier turns otherwise than the last one: each turn is trained
    after the tokens that `encode_prompts` gives for the messages before it.
    """
    return chat_format.format_of(tokenizer).encode_conversations(conversations)


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict]]
) -> list[EncodedConversation]:
    """Return the sequences of all conversations, one conversation after the other."""
    sequences = conversation_sequences(tokenizer, conversations)
    return [sequence for part in sequences for sequence in part]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict]]
) -> list[list[int]]:
    """Return the tokens of each prompt, up to where the assistant begins."""
    return chat_format.format_of(tokenizer).encode_prompts(conversations)


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict]], texts: Sequence[str]
) -> list[list[int]]:
    """Return the tokens of each response to its prompt, with its end token.

    They follow those that `encode_prompts` gives for the prompt.
    """
    chat = chat_format.format_of(tokenizer)
    turns = [chat.turn(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return [encoded.response for encoded in chat.encode_turns(turns)]


def encode_comparisons(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]
) -> list[EncodedComparison]:
    """Encode each comparison: the prompt's ids, then a response's, as PPO has them scored."""
    turns = comparison_turns(tokenizer, rows)
    encoded = [turn.prompt + turn.response for turn in turns]
    return [
        EncodedComparison(chosen, rejected)
        for chosen, rejected in zip(encoded[::2], encoded[1::2], strict=True)
    ]


def comparison_turns(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]) -> list[EncodedTurn]:
    """Return the turns of each comparison, chosen then rejected; both have the same prompt."""
    chat = chat_format.format_of(tokenizer)
    turns = []
    for row in rows:
        turns += [chat.turn(row["prompt"], row[side]) for side in ("chosen", "rejected")]
    return chat.encode_turns(turns)


def decode_response(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], ended: bool = True
) -> str:
    """Return the content of a reply: the text of its tokens less what the template adds to it.

    Neither the end token nor special ones are in it. The template makes the tokens of a turn of
    the content again, so it is what a conversation, or another tokenizer, goes on with. Of a reply
    that has not `ended`, what may yet turn out to be no content is left out.
    """
    text = decode_continuation(tokenizer, tokens)
    if not tokenizer.chat_template:
        return text
    return chat_format.format_of(tokenizer).around_reply.content(text, ended)


def decode_continuation(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Decode tokens that continue a text, without their end token and special ones."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ends.add(end_token(tokenizer))
    if len(tokens) and int(tokens[-1]) in ends:
        tokens = tokens[:-1]
    return chat_format.decode_text(tokenizer, chat_format.controls_of(tokenizer), tokens)


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token, special ones too.

    A character that several tokens make up belongs to the last of them.
    """
    stream = DecodeStream(skip_special_tokens=False)
    for token in chat_format.context_of(tokenizer).tokens:
        stream.step(tokenizer.backend_tokenizer, token)
    texts = [stream.step(tokenizer.backend_tokenizer, int(token)) or "" for token in tokens]
    whole = chat_format.decode_after_context(tokenizer, tokens)
    streamed = "".join(texts)
    if whole.startswith(streamed):
        # The last character may be cut off: its tokens give no text to the stream.
        texts[-1] += whole[len(streamed) :]
    return texts
