"""Hugging Face checkpoints in and out, as safetensors, never pickle; bit exact both ways in float32 and bfloat16.

    python -m alignjax.convert --to_hf runs/ppo --out DIR [--role policy|value] [--dtype float32|bfloat16]

Both ways stream: in memory are the parameters that share a tensor of the file, or a device's part of one parameter.
Letters: d model, n heads, h head size, l layers, v words.
"""

import argparse
import functools
import json
import shutil
import sys
from pathlib import Path

import jax

from alignjax.config import UserError, model_from_json
from alignjax.data import chat
from alignjax.machine import workdir as workdirs
from alignjax.weights import checkpoint, hf

# (stage, --role) -> (item of the checkpoint, head)
EXPORTS = {
    ("lm", None): ("model", "lm"),
    ("ranking", None): ("model", "scalar"),
    ("ppo", None): ("policy", "lm"),
    ("ppo", "policy"): ("policy", "lm"),
    ("ppo", "value"): ("value", "scalar"),
}


def main(argv=None) -> int:
    """The exit code: 0, or 2 after a mistake of the user's or a file that can't be read or written."""
    parser = argparse.ArgumentParser(
        prog="python -m alignjax.convert",
        allow_abbrev=False,
        description="Write a run's model as a Hugging Face checkpoint.",
    )
    parser.add_argument("--to_hf", required=True, metavar="RUN", help="a run's work directory")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a new or empty directory"
    )
    parser.add_argument("--role", choices=("policy", "value"), help="of a PPO run; default: policy")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32"
    )
    arguments = parser.parse_args(argv)
    jax.config.update(
        "jax_platforms", "cpu"
    )  # nothing is computed: leave an accelerator to those who do
    try:
        export(workdirs.resolve(arguments.to_hf), arguments.out, arguments.role, arguments.dtype)
    except (UserError, OSError) as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    return 0


def export(run: Path, out: Path, role: str | None, dtype: str) -> None:
    """Write a complete run's model, tokenizer and template to `out`, which appears when all of it is there."""
    values = stored_run(run)
    stage, out = values["stage"], out.absolute()
    if (stage, role) not in EXPORTS:
        raise UserError(
            f"--role {role}: {run} is of stage {stage!r}, which has one model and no roles"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; name a new or empty directory")
    item, head = EXPORTS[stage, role]
    newest = checkpoint.newest(run)
    read = functools.partial(checkpoint.restore_array, newest / item)
    tokenizer = chat.load_tokenizer(run / "tokenizer")
    tokens = special_tokens(tokenizer, head)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():  # of an export that was interrupted
        shutil.rmtree(partial)
    with workdirs.local_copy(run / "tokenizer") as local:
        shutil.copytree(local, partial)
    if (
        tokens["pad_token_id"] != tokenizer.pad_token_id
    ):  # a classifier's users pad as its config says
        tokenizer.pad_token_id = tokens["pad_token_id"]
        tokenizer.save_pretrained(partial)
    if head == "lm":
        ends = [
            end
            for end in dict.fromkeys((tokens["eos_token_id"], tokenizer.eos_token_id))
            if end is not None
        ]
        text = json.dumps(tokens | {"eos_token_id": ends or None}, indent=1)
        (partial / "generation_config.json").write_text(text, encoding="utf-8")
    size = hf.write_hf(model_from_json(values), head, read, partial, dtype, tokens=tokens)
    partial.replace(out)
    print(f"{run}: {item} of step {newest.name} written to {out}, {size / 1e6:,.1f} MB of {dtype}")
    bias = float(read("head/bias")[0]) if head == "scalar" else 0.0
    if bias:
        print(
            f"score.bias={bias:.6g} is written, but transformers leaves it unread: its scores are smaller by that"
        )


def stored_run(run: Path) -> dict:
    """config.json of a complete run; UserError for any other directory."""
    path = run / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--to_hf {run}: no config.json there, so not a run") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if "stage" not in values:
        raise UserError(
            f"--to_hf {run}: config.json names no stage, so not a run (a Hugging Face checkpoint?)"
        )
    if not (run / "summary.json").exists():
        raise UserError(f"--to_hf {run}: this run is not complete (no summary.json)")
    return values


def special_tokens(tokenizer, head: str) -> dict:
    """config.json's ids: the end token is what ends the assistant's turn, for that is what a response was trained to.

    A classifier scores the last token that isn't the pad, so that its pad must not be the end token.
    """
    end = chat.end_token(tokenizer) if tokenizer.chat_template else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    if head == "scalar" and pad in (None, end):
        others = [token for token in sorted(tokenizer.all_special_ids) if token != end]
        if not others:
            raise UserError(
                f"{tokenizer.name_or_path}: a classifier's pad must be a special token other than {end}"
            )
        pad = others[0]
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": pad}


if __name__ == "__main__":
    sys.exit(main())
