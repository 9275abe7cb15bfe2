"""What a run is: dataclasses that hold every default once, loading, overrides, and `check`.

A config file defines `config(variant)`, which returns a `Config`.
"""

import ast
import contextlib
import dataclasses
import datetime
import difflib
import json
import math
import os
import re
import traceback
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A user's mistake: commands print it as one line, without a traceback, and exit with 2.

    `details` are lines to print above it: the traceback of an error in code that the user wrote.
    """

    def __init__(self, text: str = "", details: str = ""):
        super().__init__(text)
        self.details = details


LONGEST_LINE = 2000  # characters of an error
LONGEST_VALUE = 80  # characters of a value in it


def one_line(text: str) -> str:
    """Return a text as one line of printable characters, shortened in the middle if very long."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    if len(line) > LONGEST_LINE:
        half = LONGEST_LINE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def first_line(text: str, longest: int = 500) -> str:
    """Return the first line of a text, at most `longest` characters of it."""
    lines = text.strip().splitlines()
    return lines[0][:longest] if lines else ""


def reason_of(error: BaseException, longest: int = LONGEST_LINE) -> str:
    """Return the first line of what another library's error says, or the error's type."""
    return first_line(str(error), longest) or type(error).__name__


def short(text: str) -> str:
    """Return a user's value as an error shows it: its beginning."""
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def describe_error(error: BaseException) -> str:
    """Return an exception as "TYPE: TEXT"."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(unsafe_hash=True)
class Model:
    """A decoder."""

    # The Hugging Face layout that weights are read from and written to.
    family: str = "qwen2"  # qwen, qwen2, qwen3, llama
    vocab_size: int = 1024
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 32
    d_ff: int = 352
    qkv_bias: bool = True
    qk_norm: bool = False
    tied: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: str = ""  # "", linear, llama3, yarn
    rope_factor: float = 1.0
    rope_low_factor: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
    rope_high_factor: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast
    rope_original_length: int = 8192
    max_length: int = 2048
    # Type of the computation. Parameters, softmax, log-probabilities and losses are float32.
    dtype: str = "float32"
    remat: str = (
        "nothing"  # what the backward pass recomputes: nothing, everything, dots (all else)
    )
    attention: str = "auto"  # auto, xla, cudnn (NVIDIA), splash (TPU)


@dataclass
class Optimiser:
    """AdamW with global-norm clipping.

    The learning rate warms up linearly, then stays constant or follows a cosine to a tenth.
    """

    learning_rate: float = 1e-3
    schedule: str = "constant"  # constant, cosine
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclass
class Data:
    """Where examples come from.

    A source is "toy/NAME", "tfds/NAME" or a path; commas separate several, see `data.mixture`.
    """

    kind: str = "text"  # lm: text, conversations; ranking: comparisons; ppo: prompts
    train: str = "toy/text"
    heldout: str = "toy/text"  # ranking reports figures for each source separately
    # Share of prompts, by their hash, to hold out of a file that train and heldout both name.
    heldout_share: float = 0.0
    on_bad_row: str = "error"  # in a user's file: error, or skip (and count)
    # field of a row -> the name that it has in the files of train and heldout, if it is another
    columns: dict[str, str] = field(default_factory=dict)
    data_dir: str = ""  # where public sets were prepared; "" is the default of TFDS
    batch: int = 64  # examples (pairs, prompts) of an optimiser step (of a rollout, for PPO)
    max_length: int = 64  # tokens of an example; longer ones are dropped and counted, never cut
    examples: int = 0  # how many examples of each data set to use; 0 is all of them


@dataclass
class Ranking:
    """The ranking loss of PMP and RM."""

    margin: bool = False  # subtract the margin of a comparison from the difference of scores
    centring: float = 0.0  # coefficient of (score_chosen + score_rejected)^2
    # Conversations whose mean score is brought to 0 after training, by a shift of the head's bias.
    demonstrations: str = ""


@dataclass
class PPO:
    """Clipped PPO, section 3.2.2 of the report.

    (i) marks what the report does not state: the value is InstructGPT's.
    """

    samples_per_prompt: int = 2
    response_length: int = 24
    temperature: float = 1.0  # (i)
    top_p: float = 0.9
    kl_coef: float = 0.04
    clip: float = 0.2  # (i)
    value_clip: float = 0.15
    gamma: float = 1.0  # (i)
    lam: float = 0.95  # (i)
    epochs: int = 1  # (i)
    minibatches: int = 1
    value_warmup_steps: int = 50  # the first updates, which touch only the value model
    advantage_estimator: str = "gae"  # a name of `algorithms.estimators`, or module:function
    sampler: str = ""  # module:function(params, prompts, key, settings) -> Rollout; "" is ours
    reward_fn: str = ""  # module:function(prompts, responses, **columns) -> scores
    reward_fn_weight: float = 1.0
    reward_weight: float = 1.0  # of the reward model's score, which is added to the function's
    normalise_scores: str = "mean"  # by running statistics: none, mean, mean_std
    whiten_advantages: bool = True
    truncated_score: float = -1.0  # replaces the raw score of a response that did not end
    pretrain_data: str = "toy/text"  # cut in windows of data.max_length + response_length tokens
    pretrain_heldout: str = "toy/text"  # measures the alignment tax, before and after; "" is none
    pretrain_coef: float = 0.0
    pretrain_ratio: float = 0.0  # pretraining sequences for each response
    # Responses that are sampled at once; each that ends makes room for the next. 0 is all of them.
    slots: int = 0
    # Devices along mesh.tensor in sampling, the others along mesh.data; 0 is the mesh as it is.
    rollout_tensor: int = 0
    cache_dtype: str = ""  # of keys and values in sampling; "" is model.dtype
    frozen_dtype: str = ""  # of the reference's and reward model's matrices; "" is float32
    frozen_memory: str = "device"  # where they are kept: device, host (pinned, fetched on use)
    # Steps between evaluations on held-out prompts (evaluations.jsonl); 0 is only at the end.
    eval_every: int = 0
    # How many held-out prompts, in whole batches of data.batch, and windows of held-out text.
    eval_prompts: int = 64


@dataclass
class Mesh:
    """Devices along each axis."""

    data: int = 1
    fsdp: int = -1  # -1 takes the devices that are left
    tensor: int = 1


@dataclass
class Config:
    """One run: a stage, its parents, and everything that determines its result."""

    stage: str = "lm"  # lm, ranking, ppo
    name: str = "lm"
    seed: int = 0
    # Optimiser steps; for PPO, rollouts. 0, not for PPO, is one pass over the examples.
    steps: int = 100
    # role -> config (NAME.py), run, Hugging Face directory, or hf://ORG/NAME, which is downloaded
    parents: dict[str, str] = field(default_factory=dict)
    # A directory or hf://ORG/NAME; "" is the parents', or without parents one trained on the text.
    tokenizer: str = ""
    chat_template: str = ""  # "" is the tokenizer's own; chatml
    # Today for a chat template that writes the date, such as 2026-01-31; "" is the parents', else
    # the day on which the run begins. config.json has the day that was used.
    template_date: str = ""
    # Whether special tokens in the texts of the data are special, as in apply_chat_template, rather
    # than text. A child of a run does as its parent does.
    special_tokens_in_content: bool = False
    microbatch_tokens: int = 4096  # a minibatch is packed into microbatches of about so many tokens
    model: Model = field(default_factory=Model)
    optimiser: Optimiser = field(default_factory=Optimiser)
    value_optimiser: Optimiser = field(default_factory=Optimiser)
    data: Data = field(default_factory=Data)
    ranking: Ranking = field(default_factory=Ranking)
    ppo: PPO = field(default_factory=PPO)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    # Steps whose loss or gradient is not finite, which are not applied; one more stops the run.
    max_skipped: int = 3
    sample_every: int = 10  # steps between entries of samples.jsonl


ROLES = {
    "lm": {"model"},
    "ranking": {"model"},
    "ppo": {"policy", "reference", "value", "reward"},
}
KINDS = {"lm": ("text", "conversations"), "ranking": ("comparisons",), "ppo": ("prompts",)}
CHOICES = {
    "stage": tuple(ROLES),
    "model.family": ("qwen", "qwen2", "qwen3", "llama"),  # `models.families.register` adds more
    "model.rope_scaling": ("", "linear", "llama3", "yarn"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("nothing", "everything", "dots"),
    "model.attention": ("auto", "xla", "cudnn", "splash"),
    "chat_template": ("", "chatml"),
    "data.on_bad_row": ("error", "skip"),
    "optimiser.schedule": ("constant", "cosine"),
    "value_optimiser.schedule": ("constant", "cosine"),
    "ppo.normalise_scores": ("none", "mean", "mean_std"),
    "ppo.cache_dtype": ("", "float32", "bfloat16"),
    "ppo.frozen_dtype": ("", "float32", "bfloat16"),
    "ppo.frozen_memory": ("device", "host"),
}
AT_LEAST_ONE = (
    "microbatch_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "model.vocab_size",
    "model.d_model",
    "model.layers",
    "model.heads",
    "model.kv_heads",
    "model.head_size",
    "model.d_ff",
    "model.max_length",
    "data.batch",
    "data.max_length",
    "ppo.samples_per_prompt",
    "ppo.response_length",
    "ppo.epochs",
    "ppo.minibatches",
    "ppo.eval_prompts",
)
MAY_BE_NEGATIVE = ("ppo.truncated_score", "mesh.data", "mesh.fsdp", "mesh.tensor")
LARGEST_INT = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # JAX drops higher bits without a word
# A source with its weight, or what follows the comma between two options of a public set.
BUILT_IN_SOURCE = re.compile(r"(?:[\d.]+\*)?(?:toy|tfds)/.*|[a-z_]+=.*")
FUNCTIONS = ("ppo.reward_fn", "ppo.sampler")  # module:function, or ""

# A checkout has configs/ and studies/ beside the package; an installed package has them inside.
PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent
CONFIGS = SHIPPED / "configs"


def load(spec: str, overrides: dict[str, str] | None = None) -> Config:
    """Load the config that `NAME.py[:variant]` names, apply overrides, and check it.

    Args:
      spec: a path, or the name of a file in `configs/`; the path is tried first.
      overrides: dotted field -> text, such as {"ppo.kl_coef": "0.1"}.

    Raises:
      UserError: for a file, variant or field that does not exist, and for a broken rule.
    """
    name, _, variant = spec.partition(":")
    candidates = [path for path in (Path(name), CONFIGS / name) if path.is_file()]
    if not candidates:
        known = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.py"))
        raise UserError(
            f"--config {spec}: no file {name} here or in {CONFIGS}{nearest(name, known)}"
        )
    config = config_of_file(candidates[0], variant)
    for key, value in (overrides or {}).items():
        override(config, key, value)
    check(config)
    return config


def config_of_file(path: Path, variant: str) -> Config:
    """Return the config of a variant that a file defines; its fields are not checked."""
    namespace = run_file(path)
    variants = namespace.get("VARIANTS", ("",))
    is_list = isinstance(variants, tuple | list | set | frozenset | dict)
    if not is_list or not all(isinstance(name, str) for name in variants):
        raise UserError(f"{path}: VARIANTS must be a tuple of texts, not {variants!r}")
    if variant not in variants:
        raise UserError(f"{path} has no variant {variant!r}{nearest(variant, variants)}")
    make_config = namespace.get("config")
    if not callable(make_config):
        raise UserError(f"{path}: there is no function config(variant), which returns a Config")
    with errors_of_file(path):
        config = make_config(variant)
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise UserError(f"{path}: config({variant!r}) must return a Config, not {kind}")
    try:
        check_types(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def run_file(path: Path) -> dict[str, Any]:
    """Run a user's file of Python code, and return what it defines.

    Unlike `runpy`, this runs neither directories nor archives.

    Raises:
      UserError: if the file cannot be read, or its code raises an exception or exits; it names
        the line.
    """
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    with errors_of_file(path):
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module.__dict__


@contextlib.contextmanager
def errors_of_file(path: Path) -> Iterator[None]:
    """Raise UserError, with the file and the line, for what the code of a user's file raises."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        line = line_of_error(path, error)
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{path}{line}: {type(error).__name__}: {reason}") from error


def line_of_error(path: Path, error: BaseException) -> str:
    """Return ":LINE" of the last line of a file that an error went through, "" for none."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f":{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Return {dotted field: text} of arguments --config.FIELD=VALUE or --config.FIELD VALUE.

    Raises:
      UserError: for any other argument.
    """
    overrides = {}
    remaining = list(arguments)
    while remaining:
        name, equals, value = remaining.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(
                f"{name}: no such argument; a field of the config is set by --config.FIELD=VALUE"
            )
        if not equals:
            if not remaining:
                raise UserError(f"{name}: a value is missing")
            value = remaining.pop(0)
        if value.startswith("--config."):
            raise UserError(f"{name}: a value is missing before {value}")
        key = name.removeprefix("--config.")
        if overrides.get(key, value) != value:
            raise UserError(f"{name}={value}: it is also given as {overrides[key]}")
        overrides[key] = value
    return overrides


def override(config: Config, key: str, text: str) -> None:
    """Set one field, given by its dotted name, from text of the field's type."""
    *groups, last = key.split(".")
    target = config
    for depth, name in enumerate((*groups, last)):
        if isinstance(target, dict) and depth == len(groups):
            target[last] = text
            return
        is_group = dataclasses.is_dataclass(target)
        known = [f.name for f in dataclasses.fields(target)] if is_group else []
        if name not in known:
            all_fields = [field_name for field_name, _ in flatten(config)]
            raise UserError(f"--config.{key}: there is no such field{nearest(key, all_fields)}")
        if depth < len(groups):
            target = getattr(target, name)
    kind = typing.get_type_hints(type(target))[last]
    if typing.get_origin(kind) is dict:
        hint = f"; this is a group, and --config.{key}.FIELD=VALUE sets one of its fields"
        setattr(target, last, parse_names(text, f"--config.{key}", hint))
        return
    if dataclasses.is_dataclass(kind):
        raise UserError(f"--config.{key}: this is a group; set one of its fields")
    setattr(target, last, parse_value(text, kind, f"--config.{key}"))


def parse_value(text: str, kind: type, name: str) -> Any:
    """Return `text` as a value of type `kind`; a float may be written as an integer."""
    if kind is str:
        return text
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in the text
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        if kind is float and type(value) is int:
            value = float(value)
    except (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):
        value = text
    if type(value) is not kind:
        kind_given = type(value).__name__
        raise UserError(f"{name}={short(text)}: {kind.__name__} wanted, {kind_given} given")
    return value


def parse_names(text: str, name: str, hint: str = "") -> dict[str, str]:
    """Return a dictionary of texts, written as a JSON object: {"prompt": "question"}."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not is_dictionary_of_texts(value):
        raise UserError(
            f"{name}={text}: expected a JSON object of texts, "
            f'such as {{"prompt": "question"}}{hint}'
        )
    return value


def is_dictionary_of_texts(value: Any) -> bool:
    """Return whether a value is a dictionary whose keys and values are texts, none empty."""
    return isinstance(value, dict) and all(
        isinstance(text, str) and text for item in value.items() for text in item
    )


def check(config: Config) -> None:
    """Check every rule of a config.

    Raises:
      UserError: for the first rule that is broken; it names the fields and both values.
    """
    check_types(config)
    check_fields(config)
    check_model(config)
    check_stage(config)
    if config.stage == "ppo":
        check_ppo(config)


def rule(holds: bool, message: str) -> None:
    """Raise UserError unless a rule holds."""
    if not holds:
        raise UserError(message)


def check_types(group: Any, kind: type = Config, prefix: str = "") -> None:
    """Check that a config, or a group of its fields, has its fields and values of their types."""
    rule(
        isinstance(group, kind),
        f"{prefix.rstrip('.') or 'config'} must be of type {kind.__name__}, "
        f"not {type(group).__name__}",
    )
    kinds = typing.get_type_hints(kind)
    names = [name for name, _ in flatten(group, prefix)]
    known = {item.name for item in dataclasses.fields(group)}
    for name, value in vars(group).items():
        rule(name in known, f"{prefix}{name}: there is no such field{nearest(name, names)}")
        if dataclasses.is_dataclass(kinds.get(name)):
            check_types(value, kinds[name], f"{prefix}{name}.")
        elif name in kinds:
            check_type(f"{prefix}{name}", value, kinds[name])


def check_type(name: str, value: Any, kind: Any) -> None:
    """Check that a value has the type of its field; an int may stand for a float."""
    if typing.get_origin(kind) is dict:
        rule(isinstance(value, dict), f"{name}={value!r} must be a dict")
        key_kind, value_kind = typing.get_args(kind)
        for key, item in value.items():
            check_type(f"a key of {name}", key, key_kind)
            check_type(f"{name}.{key}", item, value_kind)
        return
    allowed = {float: (float, int)}.get(kind, kind)
    is_right = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    rule(
        is_right,
        f"{name}={value!r} must be of type {kind.__name__}, not {type(value).__name__}",
    )
    if isinstance(value, str):
        rule(is_encodable(value), f"{name}={value!r} has a NUL or half of a surrogate pair")
    elif isinstance(value, int):
        largest = LARGEST_SEED if name == "seed" else LARGEST_INT
        rule(abs(value) <= largest, f"{name} must be at most {largest}")


def is_encodable(text: str) -> bool:
    """Return whether a text can be a file's name."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def check_fields(config: Config) -> None:
    """Check the values that a single field may take."""
    values = dict(flatten(config))
    for key, choices in CHOICES.items():
        options = ", ".join(map(repr, choices))
        rule(values[key] in choices, f"{key}={values[key]!r} must be one of {options}")
    for key in AT_LEAST_ONE:
        rule(values[key] >= 1, f"{key}={values[key]} must be at least 1")
    for key, value in values.items():
        if isinstance(value, int | float):
            rule(
                math.isfinite(value) and (value >= 0 or key in MAY_BE_NEGATIVE),
                f"{key}={value} must be finite and not below 0",
            )
    rule(
        is_file_name(config.name),
        f"name={config.name!r} must be a file's name: it names the run's directory",
    )
    check_date(config.template_date)


def is_file_name(name: str) -> bool:
    """Return whether a text can name one directory within another."""
    return bool(name.strip(". ")) and name.isprintable() and "/" not in name


def check_date(date: str) -> None:
    """Check that a date is empty or in ISO format."""
    try:
        is_date = not date or datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        is_date = False
    rule(is_date, f"template_date={date!r} must be a date such as 2026-01-31")


def check_model(config: Config) -> None:
    """Check the shapes of the model."""
    model = config.model
    data = config.data
    rule(
        model.heads % model.kv_heads == 0,
        f"model.kv_heads={model.kv_heads} must divide model.heads={model.heads}",
    )
    rule(model.head_size % 2 == 0, f"model.head_size={model.head_size} must be even")
    rule(
        data.max_length <= model.max_length,
        f"data.max_length={data.max_length} is over model.max_length={model.max_length}",
    )


def check_stage(config: Config) -> None:
    """Check that parents and data suit the stage."""
    data = config.data
    known_roles = ROLES[config.stage]
    rule(
        set(config.parents) <= known_roles,
        f"parents={sorted(config.parents)} must be among {sorted(known_roles)} for {config.stage}",
    )
    kinds = KINDS[config.stage]
    rule(
        data.kind in kinds,
        f"data.kind={data.kind!r} must be one of {kinds} for stage={config.stage!r}",
    )
    rule(data.heldout_share < 1, f"data.heldout_share={data.heldout_share} must be below 1")
    check_sources(data)


def check_sources(data: Data) -> None:
    """Check that there is something to train on and to hold out, and that `columns` is of use."""
    for key in ("train", "heldout"):
        source = getattr(data, key)
        rule(
            isinstance(source, str) and bool(source.strip(" ,")),
            f"data.{key}={source!r} must name a source: toy/NAME, tfds/NAME or a file",
        )
    rule(
        is_dictionary_of_texts(data.columns),
        f"data.columns={data.columns!r} must map names of fields to names of columns",
    )
    rule(
        not data.columns or names_files(data.train) or names_files(data.heldout),
        f"data.columns={data.columns!r} has a meaning for files only, but "
        f"data.train={data.train!r} and data.heldout={data.heldout!r} name none",
    )


def names_files(sources: str) -> bool:
    """Return whether sources, separated by commas, are not all built in."""
    return not all(BUILT_IN_SOURCE.fullmatch(part.strip()) for part in sources.split(","))


def check_ppo(config: Config) -> None:
    """Check the rules of PPO."""
    ppo = config.ppo
    rule(config.steps >= 1, f"steps={config.steps} must be at least 1 for ppo")
    # A function may be the whole reward.
    needed = ROLES["ppo"] - ({"reward"} if ppo.reward_fn else set())
    rule(
        needed <= set(config.parents),
        f"parents={sorted(config.parents)} must be {sorted(needed)} for ppo",
    )
    values = dict(flatten(config))
    for key in FUNCTIONS:
        rule(
            not values[key] or is_function_spec(values[key]),
            f"{key}={values[key]!r} must be module:function",
        )
    check_ppo_batches(config)
    rule(
        not ppo.pretrain_coef or bool(ppo.pretrain_data.strip(" ,")),
        f"ppo.pretrain_coef={ppo.pretrain_coef} needs ppo.pretrain_data, which is empty",
    )
    # A rounded reference is the policy at step 0 only if the policy rounds its matrices too.
    rule(
        ppo.frozen_dtype != "bfloat16" or config.model.dtype == "bfloat16",
        f"ppo.frozen_dtype={ppo.frozen_dtype!r} needs model.dtype='bfloat16', "
        f"not {config.model.dtype!r}",
    )
    rule(0 < ppo.top_p <= 1, f"ppo.top_p={ppo.top_p} must lie in (0, 1]")
    rule(ppo.temperature > 0, f"ppo.temperature={ppo.temperature} must be above 0")
    rule(
        config.data.max_length + ppo.response_length <= config.model.max_length,
        f"data.max_length={config.data.max_length} + ppo.response_length={ppo.response_length} "
        f"is over model.max_length={config.model.max_length}",
    )


def is_function_spec(spec: str) -> bool:
    """Return whether a text has the form module:function; both parts may have dots."""
    module, _, function = spec.partition(":")
    return all(name.isidentifier() for name in [*module.split("."), *function.split(".")])


def check_ppo_batches(config: Config) -> None:
    """Check that minibatches divide a rollout, and pretraining text a minibatch."""
    ppo = config.ppo
    responses = config.data.batch * ppo.samples_per_prompt
    rule(
        responses % ppo.minibatches == 0,
        f"ppo.minibatches={ppo.minibatches} must divide data.batch x "
        f"ppo.samples_per_prompt={responses}",
    )
    minibatch = responses // ppo.minibatches
    pretraining = ppo.pretrain_ratio * minibatch
    rule(
        pretraining == int(pretraining),
        f"ppo.pretrain_ratio={ppo.pretrain_ratio} times the minibatch={minibatch} must be whole",
    )
    rule(
        (ppo.pretrain_coef > 0) == (ppo.pretrain_ratio > 0),
        f"ppo.pretrain_coef={ppo.pretrain_coef} and ppo.pretrain_ratio={ppo.pretrain_ratio}: "
        "both or neither must be 0",
    )


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every field; a dictionary is one value."""
    for config_field in dataclasses.fields(config):
        value = getattr(config, config_field.name)
        name = f"{prefix}{config_field.name}"
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def difference(config: Config, stored: dict, ignore: tuple[str, ...] = ()) -> list[str]:
    """Return a line `field: stored -> new` for each field that differs from a stored config.

    A field that the stored config lacks, because an earlier version wrote it, counts as its
    default.

    Args:
      config: the new config.
      stored: what `to_json` wrote.
      ignore: beginnings of the names of fields that may differ.
    """
    new = dict(flatten(config))
    old = dict(flatten(Config())) | stored
    return [
        f"{name}: {old[name]!r} -> {new.get(name, 'absent')!r}"
        for name in sorted({*old, *new})
        if not name.startswith(ignore or ("\0",)) and old[name] != new.get(name, "absent")
    ]


def to_json(config: Config) -> str:
    """Return a config as JSON: {dotted field: value}."""
    return json.dumps(dict(flatten(config)), indent=1)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the closest of the known names, or a list of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(map(repr, names))}"


def stored_config(values: Any, where: str) -> dict[str, Any]:
    """Return a config that `to_json` wrote, as {dotted field: value}; check its types.

    Fields that this version does not know stay; fields that it lacks get their defaults.

    Args:
      values: what the file holds.
      where: the file, with which errors begin.

    Raises:
      UserError: if this is no run's config, or a value does not have the type of its field.
    """
    if not isinstance(values, dict) or values.get("stage") not in tuple(ROLES):
        raise UserError(
            f"{where}: this is not the config of a run; its stage is not one of {', '.join(ROLES)}"
        )
    kinds = dict(field_types(Config))
    for name in kinds.keys() & values.keys():
        try:
            check_type(name, values[name], kinds[name])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return dict(flatten(Config())) | values


def field_types(group: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, type) of every field of a config."""
    for name, kind in typing.get_type_hints(group).items():
        if dataclasses.is_dataclass(kind):
            yield from field_types(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def model_from_json(stored: dict, where: str = "config.json") -> Model:
    """Return the model of a config that `to_json` wrote.

    Args:
      stored: {dotted field: value}.
      where: the file, with which errors begin.

    Raises:
      UserError: for a field that does not exist, and for a value that cannot be right.
    """
    model = Model()
    for key, value in stored.items():
        if key.startswith("model."):
            setattr(model, key.removeprefix("model."), value)
    try:
        check_types(model, Model, "model.")
        check_fields(Config(model=model))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return model
