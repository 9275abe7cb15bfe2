"""Tokens of conversations, prompts and responses: one path for training and scoring, so that their ids agree.

A conversation is cut where the assistant's turns begin and end, and each piece is tokenised on its own, for then no
token straddles a turn's edge: the ids of a prompt, followed by those of a response, are those of the conversation.
"""

import functools
import itertools
import os
from pathlib import Path

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # it would advise to install torch, unused here

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignjax.config import UserError
from alignjax.machine import workdir as workdirs

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HOLE = "\ue000"  # stands for the assistant's words while a template is rendered; a private character, in no text


def train_tokenizer(texts: list[str], directory: Path, vocab_size: int):
    """A byte-level BPE with ChatML's tokens and template, trained on `texts`, kept in `directory` in the usual layout."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # Every conversation has the roles, few texts do: said often enough here to be one token each.
    tokenizer.train_from_iterator(
        itertools.chain(texts, ["system\nuser\nassistant\n"] * 3000), trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.add_special_tokens({"additional_special_tokens": [START]})
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    return load_tokenizer(directory)


def load_tokenizer(directory: Path, template: str = "") -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer from a directory, with its own chat template or "chatml".

    UserError if there is none, if it runs code of its own, and if ChatML's tokens are not in its vocabulary.
    """
    if not (directory / "tokenizer_config.json").is_file():
        raise UserError(f"{directory}: no tokenizer there (tokenizer_config.json is missing)")
    try:
        with workdirs.local_copy(directory) as local:
            tokenizer = AutoTokenizer.from_pretrained(str(local), local_files_only=True)
    except (ValueError, OSError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{directory}: transformers can't load this tokenizer ({first}); name another by tokenizer=DIR, "
            "for the report's Qwen that of a Qwen2 model, whose tokens are the same"
        ) from None
    if template == "chatml":
        absent = [token for token in (START, END) if token not in tokenizer.get_vocab()]
        if absent:
            raise UserError(
                f"chat_template='chatml', but {', '.join(absent)} is no token of {directory}"
            )
        tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
        tokenizer.chat_template = CHATML
    return tokenizer


@functools.lru_cache(maxsize=8)
def end_token(tokenizer) -> int:
    """The token with which the chat template ends the assistant's turn; not always the tokenizer's own end token."""
    rest = split(
        tokenizer,
        [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]],
        False,
    )[0][-1]
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in tokenizer.all_special_ids:
        raise UserError(
            f"chat template of {tokenizer.name_or_path}: no special token ends the assistant's turn"
        )
    return ids[0]


def split(tokenizer, conversations: list[list[dict]], generate: bool) -> list[list[str]]:
    """What the chat template writes around the assistant's words: one piece more than there are assistant turns."""
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    hollow = [
        [{**m, "content": HOLE} if m["role"] == "assistant" else m for m in messages]
        for messages in conversations
    ]
    try:
        texts = tokenizer.apply_chat_template(
            hollow, tokenize=False, add_generation_prompt=generate
        )
    except TemplateError as error:  # what a template refuses, such as a system message
        raise UserError(f"chat template of {tokenizer.name_or_path}: {error}") from None
    pieces = [text.split(HOLE) for text in texts]
    for messages, parts in zip(conversations, pieces, strict=True):
        turns = sum(m["role"] == "assistant" for m in messages)
        if len(parts) != turns + 1:
            raise UserError(
                f"chat template of {tokenizer.name_or_path}: {turns} assistant turns in, {len(parts) - 1} out"
            )
    return pieces


def ids_of(tokenizer, texts) -> dict[str, list[int]]:
    """{text: its ids}; where texts come back, as a small world's do, each is encoded once."""
    texts = list(dict.fromkeys(texts))
    return (
        dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        if texts
        else {}
    )


def encode(
    tokenizer, conversations: list[list[dict]], generate: bool
) -> list[tuple[list[int], list[int]]]:
    """(tokens, trained) of each conversation, up to where the assistant begins its next turn if `generate`."""
    around = split(tokenizer, conversations, generate)
    said = [
        [m["content"] for m in messages if m["role"] == "assistant"] for messages in conversations
    ]
    ids = ids_of(tokenizer, itertools.chain(*around, *said))
    out = []
    for pieces, turns in zip(around, said, strict=True):
        tokens = list(ids[pieces[0]])
        trained = [0] * len(tokens)
        for turn, after in zip(turns, pieces[1:], strict=True):
            rest = ids[after]  # its first token is the end token
            tokens += ids[turn] + rest
            trained += [1] * (len(ids[turn]) + 1) + [0] * (len(rest) - 1)
        out.append((tokens, trained))
    return out


def encode_conversations(
    tokenizer, conversations: list[list[dict]]
) -> list[tuple[list[int], list[int]]]:
    """(tokens, trained) of each conversation: trained is 1 on the assistant's tokens, their end token included.

    What the template writes after the last end token is left out: it is never a target.
    """
    end_token(
        tokenizer
    )  # a template that doesn't close the assistant's turn would be trained on the wrong tokens
    encoded = encode(tokenizer, conversations, False)
    lengths = [
        len(trained) - trained[::-1].index(1) if 1 in trained else len(trained)
        for _, trained in encoded
    ]
    return [
        (tokens[:n], trained[:n]) for (tokens, trained), n in zip(encoded, lengths, strict=True)
    ]


def encode_prompts(tokenizer, conversations: list[list[dict]]) -> list[list[int]]:
    """Tokens of each prompt, up to where the assistant begins."""
    return [tokens for tokens, _ in encode(tokenizer, conversations, True)]


def encode_responses(tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokens of each response, its end token included."""
    end = end_token(tokenizer)
    ids = ids_of(tokenizer, texts)
    return [ids[text] + [end] for text in texts]


def encode_comparisons(tokenizer, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(chosen, rejected) tokens of each row: the prompt's ids, then the response's, as they are when PPO scores them."""
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    chosen, rejected = (
        encode_responses(tokenizer, [row[side] for row in rows]) for side in ("chosen", "rejected")
    )
    return [(p + c, p + r) for p, c, r in zip(prompts, chosen, rejected, strict=True)]


def decode_response(tokenizer, tokens) -> str:
    """Text of a response's real tokens, without its end token."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, tokens) -> list[str]:
    """The text of each token, special ones too; where one ends within a character, the character is the next one's."""
    stream = DecodeStream(skip_special_tokens=False)
    out = [stream.step(tokenizer.backend_tokenizer, int(token)) or "" for token in tokens]
    whole = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if whole.startswith("".join(out)):
        out[-1] += whole[len("".join(out)) :]  # of a character that was cut off
    return out
