"""What a run is: the dataclasses with every default once, loading `NAME.py[:variant]`, overrides, and `check`."""

import ast
import dataclasses
import difflib
import json
import math
import runpy
import typing
from dataclasses import dataclass, field
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's: printed as one line, exit code 2, no traceback."""


@dataclass(unsafe_hash=True)
class Model:
    """A decoder. `family` names the Hugging Face layout that its weights are read from and written to."""

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
    dtype: str = "float32"  # of the computation; parameters, softmax, log-probabilities and losses are float32
    remat: str = (
        "nothing"  # what the backward pass recomputes: nothing, everything, or all but dots
    )
    attention: str = "auto"  # auto, xla, cudnn (NVIDIA), splash (TPU)


@dataclass
class Optimiser:
    """AdamW with global-norm clipping; the schedule is a linear warm-up, then constant or cosine to a tenth."""

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
    """Where examples come from: "toy/NAME", "tfds/NAME" or a path, several with commas, see `data.mixture`."""

    kind: str = "text"  # lm: text, conversations; ranking: comparisons; ppo: prompts
    train: str = "toy/text"
    heldout: str = "toy/text"  # ranking gives figures for each source by itself
    heldout_share: float = (
        0.0  # of the prompts of a file that is named in train and heldout: held out, by their hash
    )
    on_bad_row: str = "error"  # of a user's file: error, skip (counted)
    data_dir: str = ""  # where public sets were prepared; "" is the default of TFDS
    batch: int = 64  # examples (pairs, prompts) in one optimiser step (in one rollout, for PPO)
    max_length: int = 64  # tokens of an example; longer ones are dropped and counted, never cut
    examples: int = 0  # how many examples of each data set to use; 0 is all of them


@dataclass
class Ranking:
    margin: bool = False  # subtract the comparison's margin from the score difference
    centring: float = 0.0  # coefficient of (score_chosen + score_rejected)^2
    demonstrations: str = (
        ""  # conversations whose mean score a shift of the head's bias brings to 0 after training
    )


@dataclass
class PPO:
    """Clipped PPO, section 3.2.2 of the report. What it doesn't state is marked (i): InstructGPT's value."""

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
    reward_fn: str = (
        ""  # module:function(prompts, responses, **columns) -> scores, see `stages.rewards`
    )
    reward_fn_weight: float = 1.0
    reward_weight: float = 1.0  # of the reward model's score, to which the function's is added
    normalise_scores: str = "mean"  # by running statistics: none, mean, mean_std
    whiten_advantages: bool = True
    truncated_score: float = (
        -1.0
    )  # takes the place of the (raw) score of a response that did not end
    pretrain_data: str = "toy/text"  # cut in windows of data.max_length + response_length tokens
    pretrain_heldout: str = (
        "toy/text"  # where the alignment tax is read, before and after; "" is nowhere
    )
    pretrain_coef: float = 0.0
    pretrain_ratio: float = 0.0  # pretraining sequences for each response
    slots: int = 0  # responses that are sampled at once, each ended one making room for the next; 0 is all of them
    rollout_tensor: int = 0  # devices along mesh.tensor in sampling, the others along mesh.data; 0 is the mesh as it is
    cache_dtype: str = ""  # of keys and values in sampling; "" is model.dtype
    frozen_dtype: str = ""  # of the reference's and reward model's parameters; "" is float32
    frozen_memory: str = (
        "device"  # where they are kept: device, host (pinned, fetched when they are used)
    )
    eval_every: int = (
        0  # steps between evaluations on what is held out (evaluations.jsonl); 0 is only at the end
    )
    eval_prompts: int = (
        64  # the first ones, in whole batches of data.batch; and as many windows of held-out text
    )


@dataclass
class Mesh:
    data: int = 1
    fsdp: int = -1  # -1 takes the devices that are left
    tensor: int = 1


@dataclass
class Config:
    stage: str = "lm"  # lm, ranking, ppo
    name: str = "lm"
    seed: int = 0
    steps: int = 100  # of the loop: optimiser steps; for PPO, rollouts; 0, not for PPO, is one pass over the examples
    # role -> config (NAME.py), run, Hugging Face directory, or hf://ORG/NAME, which is downloaded
    parents: dict[str, str] = field(default_factory=dict)
    tokenizer: str = (
        ""  # a directory or hf://ORG/NAME; "" is the parents', without any a new one of the text
    )
    chat_template: str = ""  # "" is the tokenizer's own; chatml
    microbatch_tokens: int = (
        4096  # an optimiser step's batch is packed into microbatches of about so many tokens
    )
    model: Model = field(default_factory=Model)
    optimiser: Optimiser = field(default_factory=Optimiser)
    value_optimiser: Optimiser = field(default_factory=Optimiser)
    data: Data = field(default_factory=Data)
    ranking: Ranking = field(default_factory=Ranking)
    ppo: PPO = field(default_factory=PPO)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    max_skipped: int = 3  # steps whose loss or gradient is not finite, which are not applied; one more stops the run
    sample_every: int = 10  # steps between entries of samples.jsonl


ROLES = {"lm": {"model"}, "ranking": {"model"}, "ppo": {"policy", "reference", "value", "reward"}}
KINDS = {"lm": ("text", "conversations"), "ranking": ("comparisons",), "ppo": ("prompts",)}
CHOICES = {
    "stage": tuple(ROLES),
    "model.family": ("qwen", "qwen2", "qwen3", "llama"),
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
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def load(spec: str, overrides: dict[str, str] | None = None) -> Config:
    """The config that `NAME.py[:variant]` names, with overrides such as {"ppo.kl_coef": "0.1"} applied, checked.

    A path is tried first, then `configs/`. The file defines `config(variant)`, which returns a Config.
    """
    name, _, variant = spec.partition(":")
    path = next((p for p in (Path(name), CONFIGS / name) if p.is_file()), None)
    if path is None:
        known = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.py"))
        raise UserError(
            f"--config {spec}: no file {name} here or in {CONFIGS}{nearest(name, known)}"
        )
    module = runpy.run_path(str(path))
    variants = module.get("VARIANTS", ("",))
    if variant not in variants:
        raise UserError(
            f"--config {spec}: {name} has no variant {variant!r}{nearest(variant, variants)}"
        )
    config = module["config"](variant)
    for key, value in (overrides or {}).items():
        override(config, key, value)
    check(config)
    return config


def override(config: Config, key: str, text: str) -> None:
    """Set one field, given by its dotted name, from text of the field's type."""
    *path, last = key.split(".")
    target = config
    for i, part in enumerate((*path, last)):
        if isinstance(target, dict) and i == len(path):
            target[last] = text
            return
        known = (
            [f.name for f in dataclasses.fields(target)] if dataclasses.is_dataclass(target) else []
        )
        if part not in known:
            everything = [k for k, _ in flatten(config)]
            raise UserError(f"--config.{key}: there is no such field{nearest(key, everything)}")
        if i < len(path):
            target = getattr(target, part)
    kind = typing.get_type_hints(type(target))[last]
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        raise UserError(f"--config.{key}: this is a group; set one of its fields")
    setattr(target, last, parse(text, kind, f"--config.{key}"))


def parse(text: str, kind: type, where: str):
    """`text` as a value of type `kind`; integers are taken where floats are wanted."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where}={text}: {kind.__name__} wanted, {type(value).__name__} given")
    return value


def check(config: Config) -> None:
    """Raise UserError for the first rule that the config breaks, naming the fields and both values."""
    values = dict(flatten(config))

    def rule(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(message)

    for key, choices in CHOICES.items():
        rule(
            values[key] in choices,
            f"{key}={values[key]!r} must be one of {', '.join(map(repr, choices))}",
        )
    for key in AT_LEAST_ONE:
        rule(values[key] >= 1, f"{key}={values[key]} must be at least 1")
    for key, value in values.items():
        below = key == "ppo.truncated_score" or key.startswith("mesh.")  # these may be
        rule(
            not isinstance(value, int | float) or 0 <= value < math.inf or below,
            f"{key}={value} must be finite and not below 0",
        )
    m, p = config.model, config.ppo
    rule(
        m.heads % m.kv_heads == 0, f"model.kv_heads={m.kv_heads} must divide model.heads={m.heads}"
    )
    rule(m.head_size % 2 == 0, f"model.head_size={m.head_size} must be even")
    rule(
        config.data.max_length <= m.max_length,
        f"data.max_length={config.data.max_length} is over model.max_length={m.max_length}",
    )
    roles = ROLES[config.stage]
    rule(
        set(config.parents) <= roles,
        f"parents={sorted(config.parents)} must be among {sorted(roles)} for {config.stage}",
    )
    kinds = KINDS[config.stage]
    rule(
        config.data.kind in kinds,
        f"data.kind={config.data.kind!r} must be one of {kinds} for stage={config.stage!r}",
    )
    rule(
        config.data.heldout_share < 1,
        f"data.heldout_share={config.data.heldout_share} must be below 1",
    )
    if config.stage == "ppo":
        rule(config.steps >= 1, f"steps={config.steps} must be at least 1 for ppo")
        wanted = roles - (
            {"reward"} if p.reward_fn else set()
        )  # a function may be the whole reward
        rule(
            wanted <= set(config.parents),
            f"parents={sorted(config.parents)} must be {sorted(wanted)} for ppo",
        )
        module, _, function = p.reward_fn.partition(":")
        rule(
            not p.reward_fn or (module and function),
            f"ppo.reward_fn={p.reward_fn!r} must be module:function",
        )
        responses = config.data.batch * p.samples_per_prompt
        rule(
            responses % p.minibatches == 0,
            f"ppo.minibatches={p.minibatches} must divide data.batch x "
            f"ppo.samples_per_prompt={responses}",
        )
        minibatch = responses // p.minibatches
        pretrain = p.pretrain_ratio * minibatch
        rule(
            pretrain == int(pretrain),
            f"ppo.pretrain_ratio={p.pretrain_ratio} times the minibatch={minibatch} must be whole",
        )
        rule(
            (p.pretrain_coef > 0) == (p.pretrain_ratio > 0),
            f"ppo.pretrain_coef={p.pretrain_coef} and ppo.pretrain_ratio={p.pretrain_ratio}: both or neither must be 0",
        )
        # A rounded reference would not be the policy at step 0, unless the policy is rounded as it computes.
        rule(
            p.frozen_dtype != "bfloat16" or m.dtype == "bfloat16",
            f"ppo.frozen_dtype={p.frozen_dtype!r} needs model.dtype='bfloat16', not {m.dtype!r}",
        )
        rule(0 < p.top_p <= 1, f"ppo.top_p={p.top_p} must lie in (0, 1]")
        rule(p.temperature > 0, f"ppo.temperature={p.temperature} must be above 0")
        rule(
            config.data.max_length + p.response_length <= m.max_length,
            f"data.max_length={config.data.max_length} + "
            f"ppo.response_length={p.response_length} is over model.max_length={m.max_length}",
        )


def flatten(config, prefix: str = ""):
    """(dotted name, value) of every field; dictionaries are values."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def difference(asked: Config, stored: dict, ignore: tuple[str, ...] = ()) -> list[str]:
    """Lines `field: stored -> asked` for each field in which a stored config (as `to_json` wrote it) differs."""
    new = dict(flatten(asked))
    return [
        f"{k}: {stored.get(k, 'absent')!r} -> {new.get(k, 'absent')!r}"
        for k in sorted({*new, *stored})
        if not k.startswith(ignore or ("\0",)) and stored.get(k) != new.get(k)
    ]


def to_json(config: Config) -> str:
    return json.dumps(dict(flatten(config)), indent=1)


def nearest(name: str, known) -> str:
    """ "; did you mean ...?" for the closest of `known`, or a list of them."""
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return (
        f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(map(repr, known))}"
    )


def model_from_json(stored: dict) -> Model:
    return Model(
        **{k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
    )


def parse_overrides(rest: list[str]) -> dict[str, str]:
    """{dotted field: text} of arguments --config.FIELD=VALUE; UserError for others."""
    overrides = {}
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(
                f"{name}: no such argument; a field of the config is set by --config.FIELD=VALUE"
            )
        if not equals:
            if not rest:
                raise UserError(f"{name}: a value is missing")
            value = rest.pop(0)
        overrides[name.removeprefix("--config.")] = value
    return overrides
