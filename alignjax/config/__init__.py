"""What a run is: its fields with every default once, loading, overrides, and `check`.

A config file defines `config(variant)`, which returns a `Config`.
"""

from alignjax.config.checks import AT_LEAST_ONE, check, check_date, is_encodable, is_function_spec
from alignjax.config.errors import (
    UserError,
    describe_error,
    first_line,
    nearest,
    one_line,
    reason_of,
    short,
)
from alignjax.config.estimators import (
    has_value,
    is_external,
    loss_aggregation,
    needs_of,
    trained_roles,
    value_warmup_steps,
)
from alignjax.config.fields import (
    CHOICES,
    DPO,
    LORA_TARGETS,
    PPO,
    ROLES,
    Config,
    Data,
    Lora,
    Mesh,
    Model,
    Optimiser,
    Ranking,
    flatten,
)
from alignjax.config.loading import CONFIGS, PACKAGE, SHIPPED, load, run_file
from alignjax.config.overrides import override, parse_names, parse_overrides, parse_value
from alignjax.config.stored import (
    difference,
    lora_from_json,
    model_from_json,
    stored_config,
    to_json,
)

__all__ = [
    "AT_LEAST_ONE",
    "CHOICES",
    "CONFIGS",
    "Config",
    "DPO",
    "Data",
    "LORA_TARGETS",
    "Lora",
    "Mesh",
    "Model",
    "Optimiser",
    "PACKAGE",
    "PPO",
    "ROLES",
    "Ranking",
    "SHIPPED",
    "UserError",
    "check",
    "check_date",
    "describe_error",
    "difference",
    "first_line",
    "flatten",
    "has_value",
    "is_encodable",
    "is_external",
    "is_function_spec",
    "load",
    "lora_from_json",
    "loss_aggregation",
    "model_from_json",
    "nearest",
    "needs_of",
    "one_line",
    "override",
    "parse_names",
    "parse_overrides",
    "parse_value",
    "reason_of",
    "run_file",
    "short",
    "stored_config",
    "to_json",
    "trained_roles",
    "value_warmup_steps",
]
