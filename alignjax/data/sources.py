"""Where examples come from.

A source is one of:

- "toy/NAME": the embedded world.
- "tfds/NAME": a public set that `alignjax.data.prepare` has prepared; with options if wanted,
  "tfds/shp:min_score_ratio=3", and a split of its own, "tfds/shp/validation".
- the path of a user's files, or a pattern of paths.

Several are joined by commas. With weights, "0.7*tfds/shp,0.3*mine.jsonl", each example is drawn
from one of them with that chance. An existing file comes first: its name may contain commas and
whatever else has a meaning here.
"""

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from alignjax.config import Config, UserError
from alignjax.data import files, preferences, toy

WORLD = "toy/"
PUBLIC_SET = "tfds/"
OPTION = re.compile(r"[a-z_]+=")
WEIGHT_AND_NAME = re.compile(r"(?:\s*(\d+\.?\d*|\.\d+)\*)?(.*)", re.DOTALL)


class Source(NamedTuple):
    """A named source, and its weight in a mixture if the mixture has weights."""

    name: str
    weight: float | None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How sources are read."""

    seed: int = 0  # of the embedded world
    limit: int = 0  # examples of each source; 0 is all of them
    data_dir: str = ""  # where public sets were prepared; "" is the default of TFDS
    skip_bad_rows: bool = False  # of a user's files, instead of an error
    # {field: the name that it has in the rows of a user's files}
    columns: Mapping[str, str] = field(default_factory=dict)
    say: Callable[[str], None] = print


def read_options(config: Config, kind: str, say: Callable[[str], None]) -> ReadOptions:
    """Return the options that a run's config gives for reading examples of a kind.

    `data.columns` is meant for the rows that `data.kind` names, not for a run's other data.
    """
    return ReadOptions(
        seed=config.seed,
        limit=config.data.examples,
        data_dir=config.data.data_dir,
        skip_bad_rows=config.data.on_bad_row == "skip",
        columns=config.data.columns if kind == config.data.kind else {},
        say=say,
    )


def parse(text: str, field_name: str = "data") -> list[Source]:
    """Return the sources that a text names; either all of them have a weight or none has.

    Args:
      text: see the head of this module; "" names none.
      field_name: where the text stands, for error messages.
    """
    if not text:
        return []
    sources = [parse_source(part, text, field_name) for part in split(text)]
    if len({source.weight is None for source in sources}) > 1:
        raise UserError(f"{field_name}={text!r}: put WEIGHT* before each source or before none")
    return sources


def parse_source(part: str, text: str, field_name: str) -> Source:
    """Return the source that a part of a text names."""
    if is_existing_file(part):
        return Source(part, None)
    weight, name = WEIGHT_AND_NAME.fullmatch(part).groups()
    if not is_existing_file(name):
        name = name.strip()
    if not name or (weight is not None and not 0 < float(weight) < math.inf):
        raise UserError(
            f"{field_name}={text!r}: expected sources separated by commas, either each with a "
            "positive WEIGHT* before it or none"
        )
    return Source(name, None if weight is None else float(weight))


def split(text: str) -> list[str]:
    """Return the parts of a text that name a source each.

    A comma separates no sources within the name of an existing file, and before an option of a
    public set or of the embedded world, because commas join these too.
    """
    pieces = text.split(",")
    parts = []
    while pieces:
        count = length_of_file(pieces)
        name = WEIGHT_AND_NAME.fullmatch(pieces[0])[2].strip()
        if not count and may_have_options(name):
            count = 1
            while count < len(pieces) and OPTION.match(pieces[count]):
                count += 1
        count = count or 1
        parts.append(",".join(pieces[:count]))
        del pieces[:count]
    return parts


def may_have_options(name: str) -> bool:
    """Return whether a name, with or without options, is of the world or of a public set.

    A public set may lack its prefix.
    """
    return name.startswith((WORLD, PUBLIC_SET)) or name.partition(":")[0] in preferences.SETS


def length_of_file(pieces: list[str]) -> int:
    """Return how many pieces, joined by commas, name an existing file; 0 if they do not."""
    for count in range(len(pieces), 0, -1):
        part = ",".join(pieces[:count])
        name = WEIGHT_AND_NAME.fullmatch(part)[2]
        if is_existing_file(part) or is_existing_file(name):
            return count
    return 0


def is_existing_file(name: str) -> bool:
    """Return whether a path names anything as it is, without being read as a pattern."""
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):  # too long, or not a name at all
        return False


def is_file(source: str) -> bool:
    """Return whether a source is a path of a user's files."""
    return not source.startswith((WORLD, PUBLIC_SET))


def load(source: str, kind: str, split: str, options: ReadOptions | None = None) -> list[dict]:
    """Return the examples of one source.

    Args:
      source: see the head of this module.
      kind: text, conversations, comparisons or prompts; `formats` has their fields.
      split: "train" or "heldout". A file has no splits: see `mixture.sets`.
      options: by default, `ReadOptions()`.
    """
    options = options or ReadOptions()
    if source.startswith(PUBLIC_SET):
        return load_public_set(source.removeprefix(PUBLIC_SET), kind, split, options)
    if source.startswith(WORLD):
        return load_world(source, kind, split, options)
    examples = files.read(source, kind, options.skip_bad_rows, options.say, options.columns)
    return examples[: options.limit or None]


def load_world(source: str, kind: str, split: str, options: ReadOptions) -> list[dict]:
    """Return examples of the embedded world; its comparisons are either noisy or clean."""
    examples = toy.examples(source.removeprefix(WORLD), split, options.seed, options.limit)
    if not source.startswith(WORLD + kind):
        names = " or ".join(WORLD + name for name in toy.SIZES if name.startswith(kind))
        raise UserError(f"data {source}: this stage takes {kind}, that is {names} or a path")
    return examples


def load_public_set(name: str, kind: str, split: str, options: ReadOptions) -> list[dict]:
    """Return the comparisons of a public set, or what can be made of them.

    Prompts are their distinct prompts. Conversations are the prompts with the chosen replies, and
    text is the same without roles.
    """
    spec, own_split = name.partition("/")[::2]
    # Prompts repeat, so the limit holds for the distinct ones.
    limit = 0 if kind == "prompts" else options.limit
    comparisons = preferences.read(spec, own_split or split, options.data_dir, limit)
    if kind == "comparisons":
        return comparisons
    if kind == "prompts":
        return distinct_prompts(comparisons)[: options.limit or None]
    if kind == "conversations":
        return [
            {"messages": chosen_conversation(row), "where": row["where"]} for row in comparisons
        ]
    return [{"text": chosen_text(row)} for row in comparisons]


def distinct_prompts(comparisons: list[dict]) -> list[dict]:
    """Return each prompt once, as its first comparison has it, in the order of their last ones."""
    prompts = {}
    for row in reversed(comparisons):
        prompts[prompt_of(row)] = {"prompt": row["prompt"], "where": row["where"]}
    return list(prompts.values())[::-1]


def chosen_conversation(comparison: dict) -> list[dict]:
    return [*comparison["prompt"], {"role": "assistant", "content": comparison["chosen"]}]


def chosen_text(comparison: dict) -> str:
    return "\n\n".join(message["content"] for message in chosen_conversation(comparison))


def prompt_of(example: dict) -> str:
    """Return what two examples of one prompt have in common, as text.

    It is the messages before the assistant's last turn, or the text of a document.
    """
    if "text" in example:
        return example["text"].strip()
    messages = example.get("prompt")
    if messages is None:
        messages = example["messages"]
        roles = [message["role"] for message in messages]
        last_reply = len(roles) - 1 - roles[::-1].index("assistant")
        messages = messages[:last_reply]
    return json.dumps([[message["role"], message["content"].strip()] for message in messages])


def is_held_out(example: dict, share: float) -> bool:
    """Return whether a share of all prompts, chosen by their hash, includes an example's prompt.

    The answer is the same whatever the seed, the order and the other examples.
    """
    return zlib.crc32(prompt_of(example).encode()) < share * 2**32
