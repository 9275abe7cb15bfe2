"""The rules of a config."""

import dataclasses
import datetime
import math
import os
import re
import typing
from typing import Any

from alignjax.config.errors import UserError, nearest, rule
from alignjax.config.estimator_rules import check_estimator
from alignjax.config.estimators import has_value
from alignjax.config.fields import (
    CHOICES,
    KINDS,
    LAYER_TYPES,
    LORA_TARGETS,
    ROLES,
    Config,
    Data,
    Lora,
    Model,
    flatten,
)
from alignjax.config.reward_checks import check_rewards
from alignjax.config.reward_table import is_function_spec
from alignjax.config.rope_checks import check_extendable, check_rope

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
    "ppo.kl_horizon",
    "ppo.epochs",
    "ppo.minibatches",
    "ppo.eval_prompts",
)
MAY_BE_NEGATIVE = (
    "ppo.truncated_score",
    "ppo.value_lam",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)
LARGEST_INT = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # JAX drops higher bits without a word
# A source with its weight, or what follows the comma between two options of a public set.
BUILT_IN_SOURCE = re.compile(r"(?:[\d.]+\*)?(?:toy|tfds)/.*|[a-z_]+=.*")
FUNCTIONS = ("ppo.reward_fn", "ppo.sampler")  # module:function, or ""


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
    check_lora(config)
    if config.stage == "dpo":
        check_dpo(config)
    if config.stage == "ppo":
        check_ppo(config)


def check_types(group: Any, kind: type = Config, prefix: str = "") -> None:
    """Check that a config, or a group of its fields, has its fields and values of their types."""
    rule(
        isinstance(group, kind),
        f"{prefix.rstrip('.') or 'config'} must be of type {kind.__name__}, "
        f"not {type(group).__name__}",
    )
    kinds = typing.get_type_hints(kind)
    known = {item.name for item in dataclasses.fields(group)}
    for name, value in vars(group).items():
        if name not in known:
            names = [name for name, _ in flatten(group, prefix)]
            raise UserError(f"{prefix}{name}: there is no such field{nearest(name, names)}")
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
            if dataclasses.is_dataclass(value_kind):
                check_types(item, value_kind, f"{name}.{key}.")
            else:
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
    for name in ("embedding_multiplier", "residual_multiplier", "logits_divisor"):
        value = getattr(model, name)
        rule(value > 0, f"model.{name}={value} must be above 0")
    for kind in model.layer_types.split(","):
        rule(
            kind in LAYER_TYPES,
            f"model.layer_types={model.layer_types!r}: {kind!r} must be one of "
            + ", ".join(map(repr, LAYER_TYPES)),
        )
    rule(
        (model.window > 0) == ("window" in model.layer_types),
        f"model.window={model.window} does not go with model.layer_types={model.layer_types!r}: "
        "layers of the kind window need a window, and others have none",
    )
    check_experts(model)
    check_rope(model)
    rule(
        data.max_length <= model.max_length,
        f"data.max_length={data.max_length} is over model.max_length={model.max_length}",
    )


def check_experts(model: Model) -> None:
    """Check that a mixture of experts has what it needs, and that nothing else of it is set."""
    if model.experts:
        rule(
            1 <= model.experts_per_token <= model.experts,
            f"model.experts_per_token={model.experts_per_token} must be 1 to "
            f"model.experts={model.experts}",
        )
        rule(
            not model.mlp_bias,
            f"model.mlp_bias=True has no meaning with model.experts={model.experts}: experts have "
            "no biases",
        )
        return
    for name in ("experts_per_token", "normalise_experts", "load_balancing_coef"):
        value = getattr(model, name)
        rule(not value, f"model.{name}={value} has a meaning only with model.experts, which is 0")


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


def check_lora(config: Config) -> None:
    """Check the rules of adapters: there is a base for them, and nothing that is set is ignored."""
    lora = config.lora
    if not lora.rank:
        defaults = dict(flatten(Lora(), "lora."))
        for name, value in flatten(lora, "lora."):
            rule(
                value == defaults[name],
                f"{name}={value!r} has a meaning only with lora.rank, which is 0",
            )
        return
    rule(lora.alpha > 0, f"lora.alpha={lora.alpha} must be above 0")
    targets = [target.strip() for target in lora.targets.split(",")]
    known = ",".join(LORA_TARGETS)
    rule(
        set(targets) <= set(LORA_TARGETS) and len(set(targets)) == len(targets),
        f"lora.targets={lora.targets!r} must be some of {known}, separated by commas",
    )
    in_mlp = [target for target in targets if LORA_TARGETS[target] == "mlp"]
    rule(
        not config.model.experts or not in_mlp,
        f"lora.targets={lora.targets!r} has {','.join(in_mlp)}, but experts "
        f"(model.experts={config.model.experts}) have no adapters; use q,k,v,out",
    )
    rule(
        bool(config.parents),
        f"lora.rank={lora.rank} needs a parent: without one there is no base to adapt",
    )
    rule(
        lora.merge_for_rollout or config.stage == "ppo",
        f"lora.merge_for_rollout=False has a meaning for ppo only, not for {config.stage}",
    )
    parents = config.parents
    shares_bases = (
        config.stage == "ppo"
        and parents.get("reference") == parents.get("policy")
        and parents.get("reward") in (None, parents.get("value"))
    )
    rule(
        config.ppo.frozen_memory == "device" or not shares_bases,
        f"ppo.frozen_memory={config.ppo.frozen_memory!r} has no meaning with lora.rank={lora.rank} "
        "here: reference and reward model share the bases of policy and value model",
    )
    rule(
        lora.merge_for_rollout or not config.ppo.sampler,
        f"ppo.sampler={config.ppo.sampler!r} takes plain parameters, so lora.merge_for_rollout "
        "must be True",
    )


def check_dpo(config: Config) -> None:
    """Check the rules of DPO."""
    dpo = config.dpo
    rule(
        "policy" in config.parents,
        f"parents={sorted(config.parents)} must have policy for dpo",
    )
    rule(dpo.beta > 0, f"dpo.beta={dpo.beta} must be above 0")
    rule(
        dpo.label_smoothing < 0.5,
        f"dpo.label_smoothing={dpo.label_smoothing} must be below 0.5",
    )
    rule(
        dpo.loss == "sigmoid" or not dpo.label_smoothing,
        f"dpo.label_smoothing={dpo.label_smoothing} has no meaning for dpo.loss={dpo.loss!r}",
    )
    if dpo.prompts:
        check_sampling(config)


def check_ppo(config: Config) -> None:
    """Check the rules of PPO."""
    ppo = config.ppo
    rule(config.steps >= 1, f"steps={config.steps} must be at least 1 for ppo")
    check_rewards(config)
    needed = set(ROLES["ppo"])
    if ppo.reward_fn or ppo.rewards:  # a function or an endpoint may be the whole reward
        needed.discard("reward")
    if not has_value(config):
        needed.discard("value")
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
    check_estimator(config)
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
    check_sampling(config)


def check_sampling(config: Config) -> None:
    """Check the rules of sampled responses."""
    ppo = config.ppo
    rule(0 < ppo.top_p <= 1, f"ppo.top_p={ppo.top_p} must lie in (0, 1]")
    rule(ppo.temperature > 0, f"ppo.temperature={ppo.temperature} must be above 0")
    rule(
        config.data.max_length + ppo.response_length <= config.model.max_length,
        f"data.max_length={config.data.max_length} + ppo.response_length={ppo.response_length} "
        f"is over model.max_length={config.model.max_length}",
    )
    check_extendable(config.model)


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
