"""What a model family is: its checkpoint format, and what all of its models share."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignjax.config import ROPE_BY_LENGTH, RUNTIME_FIELDS, Model, Refuse, UserError, refuse
from alignjax.models.families.hf_config import (
    LARGEST_SIZE,
    MOST_LAYERS,
    HFConfig,
    check_any_family,
)

# Parameter path -> tensor name, for each role's head. Hugging Face's sequence classifiers have no
# bias, so they do not read `score.bias`, which holds a reward model's shift.
HEAD_TENSORS = {
    "lm": {"head/kernel": "lm_head.weight"},
    "scalar": {"head/kernel": "score.weight", "head/bias": "score.bias"},
}
# The parameters that a model has only if a field of its config says so.
OPTIONAL_PARAMETERS = (
    (r"attention/[qkv]/bias$", lambda model: model.qkv_bias),
    (r"attention/out/bias$", lambda model: model.out_bias),
    (r"mlp/\w+/bias$", lambda model: model.mlp_bias),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: everything that depends on which Hugging Face model a checkpoint is.

    name: Hugging Face's `model_type`, and the config's `model.family`.
    flags: the fields of `config.Model` that are the same for all models of the family.
    tensors: parameter path -> tensor name, without the head; "{}" stands for the layer's number.
        Paths that share a name are parts of one tensor, in this order along its first axis. In the
        file a kernel is [outputs inputs], with heads and head size as one axis; everything else
        has the shape that it has here.
    optional: as `tensors`, for biases that only some of the family's models have; the fields of
        `config.Model` say which.
    classes: head ("lm" or "scalar") -> the class that config.json names under "architectures".
        Without "scalar", models with a scalar head cannot be exported.
    read_config: returns the other fields of `config.Model` from a config.json. It must refuse, by
        `HFConfig.allow`, whatever we can't compute.
    write_config: returns the family's own fields of config.json for a model; `common_config` has
        written those that all families share. Raises UserError if the format can't express it.
    head_tensors: as `tensors`, for each head.
    presets: name -> the fields of a released model, without the flags.
    defaults: what transformers takes for a field that config.json lacks, see `HFConfig`.
    """

    name: str
    flags: Mapping[str, Any]
    tensors: Mapping[str, str]
    classes: Mapping[str, str]
    read_config: Callable[[HFConfig], dict[str, Any]]
    write_config: Callable[[Model], dict[str, Any]]
    optional: Mapping[str, str] = field(default_factory=dict)
    head_tensors: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: HEAD_TENSORS)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def tensor_names(self, model: Model, head: str) -> dict[str, str]:
        """Return parameter path -> tensor name for a model with a head, "lm" or "scalar"."""
        optional = {path: name for path, name in self.optional.items() if has(model, path)}
        names = {**self.tensors, **optional, **self.head_tensors[head]}
        if head == "lm" and model.tied:
            del names["head/kernel"]
        return names

    def from_hf(self, config: Mapping[str, Any], where: str, refuse: Refuse = refuse) -> Model:
        """Return the model that a config.json describes; UserError if we can't run it.

        If `refuse` does not raise, the model leaves out what it was called with, as far as the
        rest can be read without it.
        """
        hf_config = HFConfig(values=config, where=where, defaults=self.defaults, refuse=refuse)
        check_any_family(hf_config)
        model = Model(family=self.name, **self.flags, **self.read_config(hf_config))
        check_heads(model, hf_config)
        return model

    def to_hf(self, model: Model, head: str, dtype: str) -> dict[str, Any]:
        """Return the content of config.json; UserError if the family can't express the model."""
        self.check_flags(model)
        if head not in self.classes:
            raise UserError(
                f"transformers has no sequence classifier for model.family={self.name!r}, so its "
                "reward and value models cannot be exported"
            )
        config = common_config(model, self.classes[head], dtype)
        if head == "scalar":
            config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config |= self.write_config(model)
        self.check_expressed(model, config)
        return config

    def check_expressed(self, model: Model, config: Mapping[str, Any]) -> None:
        """Raise UserError if a config.json of the family describes another model than ours."""
        described = self.from_hf(config, "config.json")
        not_in_file = set(RUNTIME_FIELDS)
        if model.rope_scaling in ROPE_BY_LENGTH:
            not_in_file.add("max_length")  # the file's number is part of the scaling
        for name, value in dataclasses.asdict(model).items():
            theirs = getattr(described, name)
            if name not in not_in_file and theirs != value:
                raise UserError(
                    f"model.{name}={value!r} has no place in the config.json of "
                    f"model.family={self.name!r}, which would mean {theirs!r}"
                )

    def check_flags(self, model: Model) -> None:
        """Raise UserError unless the model has the family's flags."""
        if any(getattr(model, field) != value for field, value in self.flags.items()):
            given = ", ".join(f"model.{field}={getattr(model, field)}" for field in self.flags)
            wanted = ", ".join(str(value) for value in self.flags.values())
            raise UserError(f"{given} must be {wanted} for model.family={self.name!r}")

    def preset(self, name: str) -> Model:
        """Return a released model, set up to train in bfloat16 with little memory."""
        fields = {"dtype": "bfloat16", "remat": "everything", **self.presets[name]}
        return Model(family=self.name, **self.flags, **fields)


def has(model: Model, path: str) -> bool:
    """Return whether a model has a parameter that is among the optional ones."""
    return any(is_in(model) for pattern, is_in in OPTIONAL_PARAMETERS if re.search(pattern, path))


def common_config(model: Model, architecture: str, dtype: str) -> dict[str, Any]:
    """Return the fields of config.json that all families share."""
    return {
        "architectures": [architecture],
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "torch_dtype": dtype,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "tie_word_embeddings": model.tied,
    }


def common_fields(config: HFConfig) -> dict[str, Any]:
    """Return the fields of `config.Model` that all families name alike."""
    return {
        "vocab_size": config.size("vocab_size"),
        "d_model": config.size("hidden_size"),
        "layers": config.size("num_hidden_layers", MOST_LAYERS),
        "heads": config.size("num_attention_heads"),
    }


def check_heads(model: Model, config: HFConfig) -> None:
    """Raise UserError for heads that attention can't have."""
    where = config.where
    if model.heads % model.kv_heads:
        note = "" if "num_key_value_heads" in config.values else " (the default)"
        raise UserError(
            f"{where}: num_key_value_heads={model.kv_heads}{note} must divide "
            f"num_attention_heads={model.heads}"
        )
    if model.head_size % 2 or model.head_size == 0:
        raise UserError(
            f"{where}: the size of a head is {model.head_size} (hidden_size={model.d_model}, "
            f"num_attention_heads={model.heads}), but RoPE needs an even one"
        )
    if model.heads * model.head_size > LARGEST_SIZE:
        raise UserError(
            f"{where}: {model.heads} heads of {model.head_size} are more than {LARGEST_SIZE}"
        )
