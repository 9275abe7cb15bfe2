"""Tokenizers as directories: what must be there, and what transformers makes of it.

Where transformers would guess (a vocabulary that is not there is empty to it, a template that is a
number is passed on), these functions refuse, with the file's name. Code that comes with a tokenizer
is never run.
"""

import json
import os
from pathlib import Path
from typing import Any

# Otherwise transformers advises to install torch, which is not used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignjax.config import UserError, first_line
from alignjax.machine import workdir as workdirs

CONFIG = "tokenizer_config.json"
WHOLE = "tokenizer.json"  # has everything that transformers' tokenizers need
DEFAULT_TEMPLATE = "default"  # the one of several named templates that is for conversations
ADVICE = (
    "name another by tokenizer=DIR, for the report's Qwen that of a Qwen2 model, whose tokens are "
    "the same"
)


def load(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory, with its chat template as one text or None.

    Raises:
      UserError: for a file that is missing, damaged or of another form, and for a tokenizer that
        needs code of its own.
    """
    workdirs.check_files(directory)
    with workdirs.local_copy(directory) as local:
        config = read_config(local, directory)
        try:
            # Without an answer, transformers asks on standard input whether to run code.
            tokenizer = AutoTokenizer.from_pretrained(
                str(local), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # Damaged files raise whatever the library stumbles over.
            reason = code_note(config) or reason_of(error)
            raise UserError(
                f"{directory}: transformers can't load this tokenizer ({reason}); {ADVICE}"
            ) from None
        check_vocabulary(tokenizer, local, directory)
    tokenizer.chat_template = default_template(tokenizer.chat_template, directory)
    return tokenizer


def read_config(local: Path, directory: Path) -> dict[str, Any]:
    """Return the content of tokenizer_config.json in `local`, which errors call `directory`."""
    path = directory / CONFIG
    try:
        config = json.loads((local / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: no tokenizer there ({CONFIG} is missing)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({reason_of(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON object is wanted, not {type(config).__name__}")
    name = config.get("tokenizer_class")
    if not isinstance(name, str | None):
        raise UserError(f"{path}: tokenizer_class={name!r} must be a text")
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: a text has half of a surrogate pair") from None
    return config


def code_note(config: dict[str, Any]) -> str:
    """Say that a tokenizer has code of its own, if it has."""
    if "auto_map" not in config:
        return ""
    return f"it has code of its own, which is never run: auto_map={config['auto_map']!r}"


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, local: Path, directory: Path) -> None:
    """Raise UserError unless the tokenizer's vocabulary came from the files of `local`.

    For some classes, transformers makes an empty vocabulary of a file that is missing: the special
    tokens are all that is left, and every other text becomes nothing.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{directory}: {type(tokenizer).__name__} does not use the tokenizers library; {ADVICE}"
        )
    needed = {key: name for key, name in tokenizer.vocab_files_names.items() if name != WHOLE}
    absent = [name for name in needed.values() if not (local / name).is_file()]
    if not (local / WHOLE).is_file() and (absent or not needed):
        alternative = f", and so is {' and '.join(absent)}" if absent else ""
        raise UserError(f"{directory}: {WHOLE} is missing{alternative}; the vocabulary is in it")
    if backend.get_vocab_size(with_added_tokens=False) == 0:
        raise UserError(
            f"{directory}: the tokenizer's vocabulary is empty, except for "
            f"{len(tokenizer)} special and added tokens"
        )


def default_template(template: Any, directory: Path) -> str | None:
    """Return the template for conversations, of one or of several by name.

    Raises:
      UserError: if several have names and none is the default, and if it is not a text.
    """
    if isinstance(template, dict):
        if DEFAULT_TEMPLATE not in template:
            raise UserError(
                f"{directory}: the chat templates are named {', '.join(map(repr, template))}, "
                f"and none of them {DEFAULT_TEMPLATE!r}"
            )
        template = template[DEFAULT_TEMPLATE]
    if not isinstance(template, str | None):
        raise UserError(f"{directory}: chat_template={template!r} must be a text")
    return template


def check_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise UserError if a tokenizer has an id that is not in the model's vocabulary."""
    count = max(tokenizer.get_vocab().values()) + 1
    if count > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}, but the tokenizer of {tokenizer.name_or_path} has "
            f"{count} tokens"
        )


def reason_of(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {first_line(str(error), 200)}"
