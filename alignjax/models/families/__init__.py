"""The model families: one module each, and the registry that finds them by name.

To add a family, write a module that defines a `Family` and pass it to `register`. In this package
`BUILT_IN` does that; outside of it, a config file imports the module. `docs/extending.md` has an
example.
"""

from collections.abc import Mapping
from typing import Any

from alignjax import config as configs
from alignjax.config import Model, Refuse, UserError, refuse
from alignjax.models.families.family import Family
from alignjax.models.families.gemma import GEMMA2, GEMMA3
from alignjax.models.families.granite import GRANITE
from alignjax.models.families.hf_config import HFConfig, shown
from alignjax.models.families.llama import LLAMA
from alignjax.models.families.mistral import MISTRAL
from alignjax.models.families.olmo2 import OLMO2
from alignjax.models.families.phi3 import PHI3
from alignjax.models.families.qwen import QWEN
from alignjax.models.families.qwen2 import QWEN2
from alignjax.models.families.qwen3 import QWEN3
from alignjax.models.families.qwen3_moe import QWEN3_MOE
from alignjax.models.families.seed_oss import SEED_OSS
from alignjax.models.families.smollm3 import SMOLLM3

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Family",
    "HFConfig",
    "defaulted_sizes",
    "family_of",
    "hf_from_model",
    "model_from_hf",
    "register",
    "weight_names",
]

BUILT_IN = (
    QWEN,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    LLAMA,
    GRANITE,
    OLMO2,
    SEED_OSS,
    SMOLLM3,
    MISTRAL,
    GEMMA2,
    GEMMA3,
    PHI3,
)
FAMILIES: dict[str, Family] = {}
# Fields of config.json on which the shapes of tensors depend.
SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
PRESETS: dict[str, Model] = {}  # released models, to copy with `dataclasses.replace`


def register(family: Family) -> Family:
    """Make a family known under its name, to checkpoints and to `model.family` in configs.

    Registering the same name again replaces the family, so a module may be imported twice.
    """
    FAMILIES[family.name] = family
    PRESETS.update({name: family.preset(name) for name in family.presets})
    known = configs.CHOICES["model.family"]
    if family.name not in known:
        configs.CHOICES["model.family"] = (*known, family.name)
    return family


for built_in in BUILT_IN:
    register(built_in)


def family_of(name: Any, where: str) -> Family:
    """Return the family with this name; UserError if there is none, after `where`."""
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise UserError(
            f"{where}={shown(name)} must be one of {known}; docs/extending.md shows how to add a "
            "family"
        )
    return FAMILIES[name]


def weight_names(model: Model, head: str) -> dict[str, str]:
    """Return parameter path -> tensor name; see `Family.tensors`. `head` is "lm" or "scalar"."""
    return family_of(model.family, "model.family").tensor_names(model, head)


def model_from_hf(
    config: Mapping[str, Any], where: str = "config.json", refuse: Refuse = refuse
) -> Model:
    """Return the Model that a Hugging Face config describes.

    UserError if we can't run it, naming `where`, the field and its value; see `Family.from_hf`.
    """
    family = family_of(config.get("model_type"), f"{where}: model_type")
    return family.from_hf(config, where, refuse)


def defaulted_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes that a config.json lacks, by field, as transformers completes them."""
    family = family_of(config.get("model_type"), "model_type")
    return {
        name: default
        for name, default in family.defaults.items()
        if name in SIZES and name not in config
    }


def hf_from_model(model: Model, head: str, dtype: str = "float32") -> dict[str, Any]:
    """Return the content of config.json, which transformers 4 and 5 read.

    UserError if the family's format can't express the model.
    """
    return family_of(model.family, "model.family").to_hf(model, head, dtype)
