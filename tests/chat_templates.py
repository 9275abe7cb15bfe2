"""Small chat templates of many kinds, and small tokenizers of several, for tests."""

from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignjax.data import chat

GENERATE = "{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}" + GENERATE + "<|im_start|>assistant\n{% endif %}"
    ),
    # A system message of its own, if there is none.
    "default_system": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}" + GENERATE + "<|im_start|>assistant\n{% endif %}"
    ),
    # The last reply begins with a think block, and earlier ones lose theirs.
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% if m.role == 'assistant' and loop.last %}"
        "{% set thought = '' %}"
        "{% if '</think>' in m.content %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% endif %}{{ '<think>\n' + thought + '\n</think>\n\n' + text }}"
        "{% elif m.role == 'assistant' %}{{ text }}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}" + GENERATE + "<|im_start|>assistant\n{% endif %}"
    ),
    # Prompts open a think block, which a conversation never has.
    "opened_thought": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ '<A>' + m['content'].split('</think>')[-1] + eos_token }}"
        "{% else %}{{ '<U>' + m['content'] }}{% endif %}{% endfor %}"
        + GENERATE
        + "{{ '<A><think>\n' }}{% endif %}"
    ),
    "dated": (
        "{{ bos_token }}<|head|>system<|/head|>\n\n"
        "Today: {{ strftime_now('%d %b %Y') }}<|eot|>"
        "{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n"
        "{{ m['content'] | trim }}<|eot|>{% endfor %}"
        + GENERATE
        + "<|head|>assistant<|/head|>\n\n{% endif %}"
    ),
    "instructions": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ ' ' + m['content'] + ' ' + eos_token }}"
        "{% else %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "tight_instructions": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}"
    ),
    "refuses_system": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{{ '<turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
        "{{ m['content'] | trim + '</turn>\n' }}{% endfor %}"
        + GENERATE
        + "{{ '<turn>model\n' }}{% endif %}"
    ),
    "end_of_text": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% endfor %}" + GENERATE + "{{ '<|assistant|>\n' }}{% endif %}"
    ),
    # The tokens around turns swallow the white space behind them.
    "swallowing": (
        "{% for m in messages %}{{ '<{' + m['role'] + '}>\n' + m['content'] + '<{end}>\n' }}"
        "{% endfor %}" + GENERATE + "{{ '<{assistant}>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    # No system role: the user's first turn begins with the message, as Gemma 3's.
    "system_in_first_turn": (
        "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ (first if loop.first else '') + m['content'] | trim + '</turn>\n' }}{% endfor %}"
        + GENERATE
        + "{{ '<turn>model\n' }}{% endif %}"
    ),
    # The system message is in the user's last turn, as in Mistral 0.3's, between control tokens.
    "system_in_last_turn": (
        "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[Q] ' + (first if loop.last or loop.revindex == 2 and messages[-1]['role'] != 'user' "
        "else '') + m['content'] + '[/Q]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    # As Llama 2's: the system message in words of its own, contents trimmed, a space on both sides.
    "system_in_words": (
        "{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set first = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (first if loop.first else '') }}"
        "{{ m['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # A system message of its own with the date, as Granite's, whose end ends the text too.
    "dated_system": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|head|>system<|/head|>Today is ' + strftime_now('%B %d, %Y') + '. Be kind.' }}"
        "{{ eos_token + '\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|head|>' + m['role'] + '<|/head|>' + m['content'] + eos_token + '\n' }}"
        "{% endfor %}" + GENERATE + "{{ '<|head|>assistant<|/head|>' }}{% endif %}"
    ),
    # Prompts and replies have an empty think block unless asked to think, as SmolLM3's.
    "modes_of_thinking": (
        "{% set words = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% set thinks = '/think' in words %}"
        "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '\nMode: ' }}"
        "{{ ('/think' if thinks else '/no_think') + '\n' + words.replace('/think', '') | trim }}"
        "{{ '<|im_end|>\n' }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
        "{% elif m['role'] == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\n' }}"
        "{{ ('' if thinks else '<think>\n\n</think>\n') + m['content'].lstrip('\n') }}"
        "{{ '<|im_end|>\n' }}{% endgeneration %}{% endif %}{% endfor %}"
        + GENERATE
        + "{{ '<|im_start|>assistant\n' + ('' if thinks else '<think>\n\n</think>\n') }}{% endif %}"
    ),
    # As Qwen3's without thoughts: only prompts have the empty block, and so have last replies.
    "empty_thought": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}"
        "{{ ('<think>\n\n</think>\n\n' if loop.last else '') }}"
        "{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        + GENERATE
        + "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
    ),
    # Prompts do not begin the assistant's turn.
    "no_generation_prompt": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    ),
    "labels": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ 'USER: ' + m['content'] + ' ASSISTANT:' }}{% endif %}{% endfor %}"
    ),
}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]
SPECIAL += ["<turn>", "</turn>", "[Q]", "[/Q]"]
SWALLOWING = ["<{user}>", "<{assistant}>", "<{system}>", "<{end}>"]
NOT_SPECIAL = ["<think>", "</think>", "<U>", "<A>"]
TEXT = ["Tea is made of leaves.", "How long does it steep? Three minutes.", "user system model"] * 9


def byte_level(prefix_space: bool = False) -> Tokenizer:
    """Return a BPE over bytes, as Qwen and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, TEXT, alphabet)
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Return a BPE with byte fallback that puts a space before a text, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    alphabet = ["\u2581", *map(chr, range(33, 127))]
    train(tokenizer, [text.replace(" ", "\u2581") for text in TEXT], alphabet, fallback=True)
    return tokenizer


def pieces_without_prefix() -> Tokenizer:
    """Return a BPE with byte fallback whose words begin with their spaces, as Gemma has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    alphabet = ["\u2581", *map(chr, range(33, 127))]
    train(tokenizer, TEXT, alphabet, fallback=True)
    return tokenizer


def metaspace() -> Tokenizer:
    """Return a BPE with byte fallback that puts a space before all words and texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    alphabet = ["\u2581", *map(chr, range(33, 127))]
    train(tokenizer, TEXT, alphabet, fallback=True)
    return tokenizer


def unigram() -> Tokenizer:
    """Return a unigram model whose first word alone gets a space, as newer Llamas have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=500,
        special_tokens=["<unk>", *SPECIAL],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n", "\u00e9", "\ue000"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def train(tokenizer: Tokenizer, texts: list[str], alphabet: list[str], fallback=False) -> None:
    special = ["<unk>", *SPECIAL]
    if fallback:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)


TOKENIZERS = {
    "byte_level": byte_level,
    "byte_level_with_space": lambda: byte_level(prefix_space=True),
    "sentence_pieces": sentence_pieces,
    "pieces_without_prefix": pieces_without_prefix,
    "metaspace": metaspace,
    "unigram": unigram,
}


def save(kind: str, directory: Path) -> None:
    """Save a tokenizer of a kind, without a template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[kind](),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    swallowing = [AddedToken(name, rstrip=True, special=True) for name in SWALLOWING]
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[3:], *swallowing]})
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in NOT_SPECIAL])
    tokenizer.save_pretrained(directory)


def load(directory: Path, template: str) -> PreTrainedTokenizerBase:
    """Load a saved tokenizer with a template of TEMPLATES, or with a text as its template."""
    tokenizer = chat.load_tokenizer(directory)
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer
