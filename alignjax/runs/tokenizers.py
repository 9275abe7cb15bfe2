"""Which tokenizer a run uses: all roles but the reward share it."""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from alignjax.algorithms.rewards import parent_tokenizer
from alignjax.config import Config, UserError, is_reward_role
from alignjax.data import chat, mixture, shares, sources, templates, tokenizer_files, toy
from alignjax.weights import locations


def choose_tokenizer(
    config: Config, workdir: Path, parents: dict[str, Path], say: Callable[[str], None]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the run has kept; else its parents', a named or a new one.

    Args:
      config: of the run.
      workdir: of the run.
      parents: role -> directory. A reward model may have another tokenizer, see
        `algorithms.rewards`.
      say: prints a line.

    Raises:
      UserError: if the parents' tokenizers differ, or the vocabulary is larger than the model's.

    The config's `template_date` and `special_tokens_in_content` become what the run uses.
    """
    directories = {
        role: directory for role, directory in parents.items() if not is_reward_role(role)
    }
    if (workdir / "config.json").exists():
        tokenizer = chat.load_tokenizer(workdir / "tokenizer")
    elif directories:
        tokenizer = shared_tokenizer(config, directories)
    elif config.tokenizer:
        directory = locations.local_directory(config.tokenizer, weights=False)
        source = locations.tokenizer_source(directory)
        tokenizer = chat.load_tokenizer(source, config.chat_template)
    else:
        tokenizer = train_tokenizer(config, say)
    tokenizer_files.check_fits(tokenizer, config.model.vocab_size)
    settle_template(config, workdir, parents, tokenizer, say)
    return tokenizer


def settle_template(
    config: Config,
    workdir: Path,
    parents: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> None:
    """Fix which day is today for chat templates, and what special tokens in contents are.

    Both are what the run, or its parent, began with; else what the config says; else the day on
    which the run begins, and text. The config and the tokenizer then hold them.
    """
    if (workdir / "config.json").exists():
        stored = locations.read_config(workdir)
        config.template_date = config.template_date or stored.get("template_date", "")
    readers = [tokenizer]
    for role, directory in parents.items():
        if is_reward_role(role) and not locations.is_run(directory):
            readers.append(parent_tokenizer(config, directory))
    if any(templates.asks_for_date(reader) for reader in readers):
        date = config.template_date or templates.date_of(tokenizer) or first_process_day()
        config.template_date = date
    elif config.template_date:
        say(f"template_date={config.template_date}: the chat template does not write the date")
    tokens_in_content = config.special_tokens_in_content
    config.special_tokens_in_content |= templates.allows_tokens_in_content(tokenizer)
    templates.set_options(tokenizer, config.template_date, tokens_in_content)


def first_process_day() -> str:
    """Return the day that it is for the first process, in ISO format."""
    today = datetime.datetime.now().date().isoformat()
    return shares.exchange(today)[0]


def check_inherited(config: Config, tokenizer: PreTrainedTokenizerBase, parent: Path) -> None:
    """Raise UserError if the config contradicts what a parent, a run, did with its template."""
    date = templates.date_of(tokenizer)
    if date and config.template_date not in ("", date):
        raise UserError(
            f"template_date={config.template_date!r}, but the parent {parent} was trained with "
            f"{date!r}"
        )
    if config.special_tokens_in_content and not templates.allows_tokens_in_content(tokenizer):
        raise UserError(
            f"special_tokens_in_content=True, but the parent {parent} was trained with False"
        )


def shared_tokenizer(config: Config, directories: dict[str, Path]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the parents, which must all have the same vocabulary."""
    names_another = config.tokenizer or config.chat_template
    if names_another and all(locations.is_run(directory) for directory in directories.values()):
        raise UserError(
            f"tokenizer={config.tokenizer!r}, chat_template={config.chat_template!r}: "
            f"the parents {sorted(map(str, set(directories.values())))} are runs, "
            "which have their own"
        )
    first_role = next(iter(directories))
    tokenizers = {role: parent_tokenizer(config, source) for role, source in directories.items()}
    tokenizer = tokenizers[first_role]
    if locations.is_run(directories[first_role]):
        check_inherited(config, tokenizer, directories[first_role])
    for role, other in tokenizers.items():
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"the tokenizers of {directories[first_role]} ({first_role}) "
                f"and {directories[role]} ({role}) differ"
            )
    return tokenizer


def train_tokenizer(config: Config, say: Callable[[str], None]) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the text that the run trains on.

    For the embedded world its own texts serve, so that all stages share one tokenizer.
    """
    if config.data.kind != "text":
        raise UserError(
            f"data.kind={config.data.kind!r} and no parent: a new tokenizer is trained on text only"
        )
    texts = toy.tokenizer_texts(config.seed)
    names = [name for name, _ in sources.parse(config.data.train)]
    if not all(name.startswith("toy/") for name in names):
        sets = mixture.sets(config, "text", config.data.train, "", say)
        texts = [row["text"] for rows in sets.train for row in rows]
    with tempfile.TemporaryDirectory() as directory:
        return chat.train_tokenizer(texts, Path(directory), config.model.vocab_size)
