"""A work directory belongs to one run: check it, and claim it."""

import shutil
from pathlib import Path

import jax
from transformers import PreTrainedTokenizerBase

from alignjax import config as configs
from alignjax.config import Config, UserError
from alignjax.machine import processes
from alignjax.machine import workdir as workdirs
from alignjax.weights import locations
from alignjax.weights.imported import IMPORTED_FILE, Imported

# What a run that was interrupted while it claimed the directory leaves: it may be claimed anew.
CLAIM_FILES = {
    "lock",
    "tokenizer",
    "tokenizer.partial",
    IMPORTED_FILE,
    "imported.partial",
    "config.partial",
}
# Fields that may change on a resume.
FREE_FIELDS = ("mesh.", "keep_checkpoints", "max_skipped", "ppo.eval_")
# Fields that need not be repeated on a resume: unless they are set, the run's own values count.
KEPT_FIELDS = ("template_date", "special_tokens_in_content")


def check_workdir(config: Config, workdir: Path, ignore: tuple[str, ...] = ()) -> None:
    """Check that a work directory is free or holds this run: nothing is overwritten.

    Args:
      config: of the run.
      workdir: its directory.
      ignore: beginnings of further fields that may differ.

    Raises:
      UserError: if the directory holds something else; it names what differs.
    """
    if (workdir / "config.json").exists():
        stored = locations.read_config(workdir)
        unset = tuple(name for name in KEPT_FIELDS if not getattr(config, name))
        differences = configs.difference(config, stored, (*FREE_FIELDS, *unset, *ignore))
        if differences:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(differences)}); "
                "name another --workdir"
            )
    elif workdir.exists() and {path.name for path in workdir.iterdir()} - CLAIM_FILES:
        raise UserError(f"{workdir} is not empty and has no config.json; name another --workdir")


def claim_workdir(
    config: Config, tokenizer: PreTrainedTokenizerBase, imported: Imported, workdir: Path
) -> None:
    """Write the run's own copy of what it begins with, then config.json, unless it is there."""
    if jax.process_index() == 0 and not (workdir / "config.json").exists():
        if workdirs.is_local(workdir):
            save_tokenizer(tokenizer, workdir)
        else:
            with workdirs.staging(workdir / "tokenizer") as staging:
                tokenizer.save_pretrained(staging.local)
        if imported.config or imported.generation:
            workdirs.write_atomically(workdir / IMPORTED_FILE, imported.to_json())
        workdirs.write_atomically(workdir / "config.json", configs.to_json(config))
    processes.wait_for_all("claim")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, workdir: Path) -> None:
    """Write the tokenizer to a local work directory, all of it or nothing."""
    for name in ("tokenizer", "tokenizer.partial"):
        shutil.rmtree(workdir / name, ignore_errors=True)
    tokenizer.save_pretrained(workdir / "tokenizer.partial")
    (workdir / "tokenizer.partial").rename(workdir / "tokenizer")
