"""Where a reward model's score is read: each where it was trained to be read.

Ours are read at the token that ends the reply. Others, as TRL trains them for transformers'
`AutoModelForSequenceClassification`, are read at the last token of the rendered conversation that
is not a pad: behind the end token there may be a line end that the template writes.

An export of ours says so in its config.json, in a field that transformers keeps when it saves the
model again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignjax.data import chat
from alignjax.data.ends import as_list
from alignjax.weights import hf, locations, peft_adapter
from alignjax.weights.peft_adapter import SCORE_BIAS
from alignjax.weights.safetensors import open_tensors

FIELD = "alignjax_score_at"
END_TOKEN = "end_token"
MARK = {FIELD: END_TOKEN}  # of an export's config.json


def ending_of(directory: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that a reward model reads behind the content of a reply.

    Its score is read at the last of them. If there are none, because all of them are pads to
    transformers, it is read at the last token of the content.

    Args:
      directory: a run or a Hugging Face checkpoint.
      tokenizer: of the reward model.
    """
    stored = locations.read_config(directory)
    end = chat.end_token(tokenizer)
    if locations.is_run(directory) or is_our_export(directory, stored):
        return (end,)
    return without_pads((end, *chat.closing_tokens(tokenizer)), stored.get("pad_token_id"))


def notice_of_change(parent: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what to say if a ranking run reads scores elsewhere than its parent did, or ""."""
    if locations.is_run(parent) or hf.head_of(parent) != "scalar":
        return ""
    end = chat.end_token(tokenizer)
    ending = ending_of(parent, tokenizer)
    if ending == (end,):
        return ""
    return (
        f"{parent}: its scores were read behind {tokenizer.decode(ending)!r}; this run reads and "
        f"trains them at {tokenizer.decode([end])!r}"
    )


def is_our_export(directory: Path, stored: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint with this config.json is an export of a run.

    Exports that are older than the field have a bias, which transformers never writes, and so have
    exported adapters, whose base has the config.json.
    """
    adapted = locations.adapted_model(directory)
    if adapted is not None:
        return peft_adapter.PREFIX + SCORE_BIAS in peft_adapter.open_weights(adapted.adapter)
    return stored.get(FIELD) == END_TOKEN or SCORE_BIAS in open_tensors(directory)


def without_pads(tokens: tuple[int, ...], pads: Any) -> tuple[int, ...]:
    """Return the tokens without pads at their end; `pads` is an id, several, or None."""
    length = len(tokens)
    while length and tokens[length - 1] in as_list(pads):
        length -= 1
    return tokens[:length]
