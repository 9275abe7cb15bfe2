"""What a model family is: its checkpoint format, and what all of its models share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignjax.config import Model, UserError

# Parameter path -> tensor name, for each role's head. Hugging Face's sequence classifiers have no
# bias, so they do not read `score.bias`, which holds a reward model's shift.
HEAD_TENSORS = {
    "lm": {"head/kernel": "lm_head.weight"},
    "scalar": {"head/kernel": "score.weight", "head/bias": "score.bias"},
}


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """The content of a config.json; `where` names the file in errors."""

    values: Mapping[str, Any]
    where: str

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field, or the default if it is absent or null."""
        value = self.values.get(field)
        return default if value is None else value

    def require(self, field: str) -> Any:
        """Return a field; UserError if it is absent or null."""
        if self.values.get(field) is None:
            raise UserError(f"{self.where}: {field} is missing")
        return self.values[field]

    def allow(self, field: str, *supported: Any) -> None:
        """Refuse a field that is present with a value other than these."""
        if field in self.values and self.values[field] not in supported:
            raise UserError(
                f"{self.where}: {field}={self.values[field]!r} is not supported, "
                f"only {supported[0]!r}"
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
    classes: head ("lm" or "scalar") -> the class that config.json names under "architectures".
    read_config: returns the other fields of `config.Model` from a config.json. It must refuse, by
        `HFConfig.allow`, whatever we can't compute.
    write_config: returns the family's own fields of config.json for a model; `common_config` has
        written those that all families share. Raises UserError if the format can't express it.
    head_tensors: as `tensors`, for each head.
    presets: name -> the fields of a released model, without the flags.
    """

    name: str
    flags: Mapping[str, Any]
    tensors: Mapping[str, str]
    classes: Mapping[str, str]
    read_config: Callable[[HFConfig], dict[str, Any]]
    write_config: Callable[[Model], dict[str, Any]]
    head_tensors: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: HEAD_TENSORS)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def tensor_names(self, model: Model, head: str) -> dict[str, str]:
        """Return parameter path -> tensor name for a model with a head, "lm" or "scalar"."""
        names = {**self.tensors, **self.head_tensors[head]}
        if head == "lm" and model.tied:
            del names["head/kernel"]
        return names

    def from_hf(self, config: Mapping[str, Any], where: str) -> Model:
        """Return the model that a config.json describes; UserError if we can't run it."""
        fields = self.read_config(HFConfig(values=config, where=where))
        return Model(family=self.name, **self.flags, **fields)

    def to_hf(self, model: Model, head: str, dtype: str) -> dict[str, Any]:
        """Return the content of config.json; UserError if the family can't express the model."""
        self.check_flags(model)
        config = common_config(model, self.classes[head], dtype)
        if head == "scalar":
            config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return config | self.write_config(model)

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
        "vocab_size": config.require("vocab_size"),
        "d_model": config.require("hidden_size"),
        "layers": config.require("num_hidden_layers"),
        "heads": config.require("num_attention_heads"),
    }
