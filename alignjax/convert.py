"""Write a run's model as a Hugging Face checkpoint, with its tokenizer and chat template.

    python -m alignjax.convert --to_hf runs/ppo --out DIR [--role policy|value] \
        [--dtype float32|bfloat16]

`alignjax.weights.hf` has the format.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from transformers import PreTrainedTokenizerBase

from alignjax.config import UserError, model_from_json
from alignjax.data import chat
from alignjax.machine import console
from alignjax.machine import workdir as workdirs
from alignjax.machine.arguments import Parser
from alignjax.weights import checkpoint, hf, locations


class Export(NamedTuple):
    """Which parameters of a run to write."""

    item: str  # of the checkpoint
    head: str  # "lm" or "scalar"


# (the run's stage, --role) -> what to write
EXPORTS = {
    ("lm", None): Export("model", "lm"),
    ("ranking", None): Export("model", "scalar"),
    ("ppo", None): Export("policy", "lm"),
    ("ppo", "policy"): Export("policy", "lm"),
    ("ppo", "value"): Export("value", "scalar"),
}
TokenIds = dict[str, int | None]  # name in config.json -> id


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, 0 or one of `machine.failures`."""
    return console.run_command(functools.partial(run, argv))


def run(argv: Sequence[str] | None) -> None:
    """Write the checkpoint that the arguments ask for."""
    arguments = parse_arguments(argv)
    # Nothing is computed, so leave an accelerator to other processes.
    jax.config.update("jax_platforms", "cpu")
    directory = workdirs.resolve(arguments.to_hf)
    export(directory, arguments.out, arguments.role, arguments.dtype)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="python -m alignjax.convert",
        description="Write a run's model as a Hugging Face checkpoint.",
    )
    parser.add_argument("--to_hf", required=True, metavar="RUN", help="a run's work directory")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a new or empty directory"
    )
    parser.add_argument(
        "--role",
        choices=("policy", "value"),
        help="which model of a PPO run to write; default: policy",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32"
    )
    return parser.parse_args(argv)


def export(run: Path, out: Path, role: str | None, dtype: str) -> None:
    """Write a complete run's model, tokenizer and chat template to `out`.

    `out` appears when it is complete; an interrupted export leaves `out` + ".partial" behind.
    """
    out = out.absolute()
    config = read_run_config(run)
    if (config["stage"], role) not in EXPORTS:
        raise UserError(
            f"--role {role}: {run} is of stage {config['stage']!r}, "
            "which has one model and no roles"
        )
    if out.exists() and not is_empty_directory(out):
        raise UserError(f"--out {out}: already exists; name a new or empty directory")
    item, head = EXPORTS[config["stage"], role]
    newest = checkpoint.newest(run)
    read = functools.partial(checkpoint.restore_array, newest / item)
    tokenizer = chat.load_tokenizer(run / "tokenizer")
    tokens = special_tokens(tokenizer, head)

    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    write_tokenizer(run, tokenizer, tokens, partial)
    if head == "lm":
        write_generation_config(tokenizer, tokens, partial)
    size = hf.write_hf(
        model_from_json(config, str(run / "config.json")), head, read, partial, dtype, tokens=tokens
    )
    partial.replace(out)

    print(f"{run}: {item} of step {newest.name} written to {out}, {size / 1e6:,.1f} MB of {dtype}")
    bias = float(read("head/bias")[0]) if head == "scalar" else 0.0
    if bias:
        print(
            f"score.bias={bias:.6g} is written, but transformers does not read it: "
            "its scores are lower by that"
        )


def is_empty_directory(path: Path) -> bool:
    """Return whether a path is a directory without entries."""
    return path.is_dir() and not any(path.iterdir())


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


def special_tokens(tokenizer: PreTrainedTokenizerBase, head: str) -> TokenIds:
    """Return the ids of special tokens for config.json.

    The end token is the one that ends the assistant's turn, because responses were trained to end
    with it. A classifier scores the last token that is not the pad, so its pad must be another
    token than the end token.
    """
    end = chat.end_token(tokenizer) if tokenizer.chat_template else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    if head == "scalar" and pad in (None, end):
        others = [token for token in sorted(tokenizer.all_special_ids) if token != end]
        if not others:
            raise UserError(
                f"{tokenizer.name_or_path}: a classifier's pad must be a special token "
                f"other than {end}"
            )
        pad = others[0]
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": pad}


def write_tokenizer(
    run: Path, tokenizer: PreTrainedTokenizerBase, tokens: TokenIds, directory: Path
) -> None:
    """Copy a run's tokenizer; save it anew if its pad is not the one that config.json names."""
    with workdirs.local_copy(run / "tokenizer") as source:
        shutil.copytree(source, directory)
    if tokens["pad_token_id"] != tokenizer.pad_token_id:
        tokenizer.pad_token_id = tokens["pad_token_id"]
        tokenizer.save_pretrained(directory)


def write_generation_config(
    tokenizer: PreTrainedTokenizerBase, tokens: TokenIds, directory: Path
) -> None:
    """Write generation_config.json, which ends a response at the turn's or the tokenizer's end."""
    ends = []
    for end in (tokens["eos_token_id"], tokenizer.eos_token_id):
        if end is not None and end not in ends:
            ends.append(end)
    text = json.dumps(tokens | {"eos_token_id": ends or None}, indent=1)
    (directory / "generation_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
