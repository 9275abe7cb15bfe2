"""Write a run's model as a Hugging Face checkpoint, with its tokenizer and chat template.

    python -m alignjax.convert --to_hf runs/ppo --out DIR [--role policy|value] \
        [--dtype float32|bfloat16] [--merged] [--base NAME]
    python -m alignjax.convert --check DIR_OR_hf://ORG/NAME [--tokenizer DIR] [--chat_template NAME]

Of a run with adapters (`lora.rank` above 0) it writes a PEFT adapter, or with --merged the base
with the adapters added. `alignjax.weights.hf` and `alignjax.weights.peft_export` have the formats.

--check says whether a model can be loaded, what it is, and everything that is wrong with it. It
reads no parameters. Exit code 0 if it loads, 2 if not.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from transformers import PreTrainedTokenizerBase

from alignjax.config import CHOICES, Model, UserError, model_from_json
from alignjax.data import chat, templates
from alignjax.data.ends import as_list
from alignjax.machine import console, failures, output_directories
from alignjax.machine import workdir as workdirs
from alignjax.machine.arguments import Parser
from alignjax.runs import model_check, model_check_text
from alignjax.weights import (
    bases,
    checkpoint,
    export_base,
    hf,
    host_reader,
    hub_headers,
    locations,
    peft_export,
)
from alignjax.weights.imported import (
    GENERATION_FILE,
    Imported,
    ends_of,
    exported_config,
    exported_generation,
    read_imported,
)
from alignjax.weights.model_card import CARD_FILE, ExportedModel, model_card
from alignjax.weights.score_place import MARK


class Export(NamedTuple):
    """Which parameters of a run to write."""

    item: str  # of the checkpoint
    head: str  # "lm" or "scalar"


@dataclass(frozen=True, kw_only=True)
class SmallFiles:
    """The contents of an export's files beside weights and tokenizer."""

    config: dict[str, Any]  # of config.json
    generation: dict[str, Any] | None  # of generation_config.json; None for a scalar head
    card: str  # README.md


# (the run's stage, --role) -> what to write
EXPORTS = {
    ("lm", None): Export("model", "lm"),
    ("ranking", None): Export("model", "scalar"),
    ("dpo", None): Export("policy", "lm"),
    ("ppo", None): Export("policy", "lm"),
    ("ppo", "policy"): Export("policy", "lm"),
    ("ppo", "value"): Export("value", "scalar"),
}
# Arguments that go with one of the two commands only.
OF_CHECK = ("tokenizer", "chat_template")
OF_EXPORT = ("out", "overwrite", "role", "merged", "base")
COMMAND = "alignjax.convert"  # in the marker of an export
TokenIds = dict[str, Any]  # name in config.json -> id, several ids, or None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, 0 or one of `machine.failures`."""
    return console.run_command(functools.partial(run, argv))


def run(argv: Sequence[str] | None) -> int:
    """Write the checkpoint that the arguments ask for, or check the model; return the exit code."""
    arguments = parse_arguments(argv)
    # Nothing is computed, so leave an accelerator to other processes.
    jax.config.update("jax_platforms", "cpu")
    if arguments.check is not None:
        return check(arguments.check, arguments.tokenizer, arguments.chat_template)
    directory = workdirs.resolve(arguments.to_hf)
    out = workdirs.resolve(arguments.out)
    export(
        directory,
        out,
        arguments.role,
        arguments.dtype,
        arguments.overwrite,
        merged=arguments.merged,
        base=arguments.base,
    )
    return 0


def check(spec: str, tokenizer: str, chat_template: str) -> int:
    """Print whether a model can be loaded, and what it is; return the exit code."""
    with hub_headers.model_directory(spec) as directory:
        findings = model_check.check_model(spec, tokenizer, chat_template, directory)
        print(model_check_text.format_check(findings).replace(str(directory), spec))
    return 0 if findings.loads else failures.USER_ERROR


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="python -m alignjax.convert",
        description="Write a run's model as a Hugging Face checkpoint, or check one.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to_hf", metavar="RUN", help="a run's work directory")
    what.add_argument(
        "--check",
        metavar="MODEL",
        help="say whether a directory or hf://ORG/NAME can be loaded, and all that is wrong "
        "with it, without reading its parameters",
    )
    parser.add_argument("--out", metavar="DIR", help="with --to_hf: a new or empty directory")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier export in DIR, if no other file is there",
    )
    parser.add_argument(
        "--role",
        choices=("policy", "value"),
        help="which model of a PPO run to write; default: policy",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--merged",
        action="store_true",
        help="write a run with adapters as a whole model, not as a PEFT adapter",
    )
    parser.add_argument(
        "--base",
        default="",
        metavar="NAME",
        help="the base of a PEFT adapter, a directory or hf://ORG/NAME, where the run's own base "
        "is not such a checkpoint: an export of it",
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="DIR",
        help="with --check: another tokenizer, as the field of a config",
    )
    parser.add_argument(
        "--chat_template",
        default="",
        choices=CHOICES["chat_template"],
        help="with --check: as the field of a config",
    )
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for arguments that would be ignored, and for a missing --out."""
    if arguments.check is None and arguments.out is None:
        raise UserError("--to_hf needs --out DIR, a new or empty directory")
    names = OF_CHECK if arguments.check is None else OF_EXPORT
    used = [name for name in names if getattr(arguments, name) not in (None, "", False)]
    if used:
        other = "--check" if arguments.check is None else "--to_hf"
        raise UserError(f"--{used[0]}: this goes with {other} only")


def export(
    run: Path,
    out: Path,
    role: str | None,
    dtype: str,
    overwrite: bool = False,
    *,
    merged: bool = False,
    base: str = "",
) -> None:
    """Write a complete run's model, tokenizer and chat template to the local directory `out`.

    Of a run with adapters this is a PEFT adapter of `base`, by default the run's own base; with
    `merged` it is the whole model.

    `out` appears when it is complete. An export that is killed leaves a hidden directory beside
    it, which the next one to the same `out` removes.
    """
    if not workdirs.is_local(out):
        raise UserError(f"--out {out}: expected a local directory")
    out = out.absolute()
    config = read_run_config(run)
    if (config["stage"], role) not in EXPORTS:
        raise UserError(
            f"--role {role}: {run} is of stage {config['stage']!r}, "
            "which has one model and no roles"
        )
    if role == "value":
        bases.check_value_model(run, f"--role value: {run}")
    output_directories.check_replaceable(out, f"--out {out}", COMMAND, overwrite)
    item, head = EXPORTS[config["stage"], role]
    newest = checkpoint.newest(run)
    read = host_reader.read_item(run, head)
    tokenizer = chat.load_tokenizer(run / "tokenizer")
    model = model_from_json(config, str(run / "config.json"))
    settings = bases.adapters_of(run)
    if settings is None and (merged or base):
        raise UserError(f"{run}: lora.rank=0, so there are no adapters for --merged or --base")
    peft_base = None
    if settings is not None and not merged:
        peft_base = export_base.base_for_peft(run, head, base)
    bias = float(read("head/bias")[0]) if head == "scalar" else 0.0
    imported = read_imported(run)
    exported = ExportedModel(
        config=config,
        item=item,
        step=newest.name,
        dtype=dtype,
        ends=ends_of(run, tokenizer, model.vocab_size) if head == "lm" else (),
        bias=bias,
        base=imported.source,
        adapted=peft_base.name if peft_base else "",
        revision=peft_base.revision if peft_base else "",
        pad=special_tokens(tokenizer, head, imported)["pad_token_id"],
    )
    files = small_files(exported, model, head, tokenizer, imported)

    with output_directories.new_directory(
        out, "--out", command=COMMAND, overwrite=overwrite
    ) as partial:
        write_tokenizer(run, tokenizer, head, files.config["pad_token_id"], partial)
        (partial / CARD_FILE).write_text(files.card, encoding="utf-8")
        if peft_base is not None:
            adapters = peft_export.AdaptersToWrite(
                model=model,
                head=head,
                paths=host_reader.adapted_paths(settings, model),
                rank=settings.rank,
                alpha=settings.alpha,
                base=peft_base.name,
                revision=peft_base.revision,
            )
            size = peft_export.write_adapter(adapters, read, partial, dtype)
        else:
            if files.generation is not None:
                write_json(partial / GENERATION_FILE, files.generation)
            read_whole = host_reader.read_whole(run, head)
            size = hf.write_hf(model, head, read_whole, partial, dtype, config=files.config)

    what = f"adapters of {item}" if peft_base else item
    print(f"{run}: {what} of step {newest.name} written to {out}, {size / 1e6:,.1f} MB of {dtype}")
    if head == "scalar":
        print(f"{out / CARD_FILE} says how transformers gives the scores of alignjax")
    if bias:
        print(
            f"score.bias={bias:.6g} is written, but transformers does not read it: "
            "its scores are lower by that"
        )


def small_files(
    exported: ExportedModel,
    model: Model,
    head: str,
    tokenizer: PreTrainedTokenizerBase,
    imported: Imported,
) -> SmallFiles:
    """Return the contents of the small files, which keep what was imported where it holds."""
    tokens = special_tokens(tokenizer, head, imported)
    config = exported_config(model, head, exported.dtype, imported) | tokens
    generation = None
    if head == "lm":
        generation = exported_generation(imported, tokens, exported.ends)
    else:
        config |= MARK
    card = model_card(exported, tokenizer)
    return SmallFiles(config=config, generation=generation, card=card)


def read_run_config(run: Path) -> dict[str, Any]:
    """Return the config.json of a complete run; UserError for any other directory."""
    config = locations.read_config(run)
    if "stage" not in config:
        raise UserError(
            f"--to_hf {run}: config.json names no stage, so this is not a run "
            "(a Hugging Face checkpoint?)"
        )
    if not (run / "summary.json").exists():
        raise UserError(f"--to_hf {run}: this run is not complete (no summary.json)")
    return config


def special_tokens(tokenizer: PreTrainedTokenizerBase, head: str, imported: Imported) -> TokenIds:
    """Return the ids of special tokens for config.json: those that were imported, if they serve.

    The end tokens must have the one that ends the assistant's turn, because responses were
    trained to end with it. A classifier scores the last token that is not the pad, so its pad
    must be another token than the end token.
    """
    end = chat.end_token(tokenizer) if tokenizer.chat_template else tokenizer.eos_token_id
    imported_ends = as_list(imported.config.get("eos_token_id"))
    eos = end if not imported_ends else [*imported_ends, end]
    if end in imported_ends:
        eos = imported.config["eos_token_id"]
    pad = tokenizer.pad_token_id
    if head == "lm" and imported.config.get("pad_token_id") is not None:
        pad = imported.config["pad_token_id"]
    if head == "scalar" and pad in (None, end):
        others = [token for token in sorted(tokenizer.all_special_ids) if token != end]
        if not others:
            raise UserError(
                f"{tokenizer.name_or_path}: a classifier's pad must be a special token "
                f"other than {end}"
            )
        pad = others[0]
    bos = imported.config.get("bos_token_id", tokenizer.bos_token_id)
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def write_tokenizer(
    run: Path, tokenizer: PreTrainedTokenizerBase, head: str, pad: int, directory: Path
) -> None:
    """Copy a run's tokenizer; save it anew if a classifier needs another one.

    A classifier must not pad with its end token. A template that writes today's date gets the
    date of the run, which the classifier was trained to read.
    """
    with workdirs.local_copy(run / "tokenizer") as source:
        shutil.copytree(source, directory, dirs_exist_ok=True)
    if head == "lm":
        return
    template = tokenizer.chat_template
    if templates.asks_for_date(tokenizer):
        template = templates.with_date(template, templates.date_of(tokenizer))
    if (pad, template) != (tokenizer.pad_token_id, tokenizer.chat_template):
        tokenizer.pad_token_id = pad
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
