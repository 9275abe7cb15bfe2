"""What a run is: its fields with every default once, loading, overrides, and `check`.

A config file defines `config(variant)`, which returns a `Config`.
"""

from alignjax.config.checks import AT_LEAST_ONE, check, check_date, is_encodable
from alignjax.config.errors import (
    UserError,
    describe_error,
    first_line,
    nearest,
    one_line,
    reason_of,
    short,
)
from alignjax.config.fields import (
    CHOICES,
    PPO,
    ROLES,
    Config,
    Data,
    Mesh,
    Model,
    Optimiser,
    Ranking,
    Reward,
    flatten,
)
from alignjax.config.loading import CONFIGS, PACKAGE, SHIPPED, load, run_file
from alignjax.config.overrides import override, parse_names, parse_overrides, parse_value
from alignjax.config.reward_table import (
    field_of_role,
    field_of_source,
    is_config_file,
    is_function_spec,
    is_reward_role,
    kind_of_source,
    parent_specs,
    reward_table,
    role_of,
)
from alignjax.config.stored import difference, model_from_json, stored_config, to_json

__all__ = [
    "AT_LEAST_ONE",
    "CHOICES",
    "CONFIGS",
    "Config",
    "Data",
    "Mesh",
    "Model",
    "Optimiser",
    "PACKAGE",
    "PPO",
    "ROLES",
    "Ranking",
    "Reward",
    "SHIPPED",
    "UserError",
    "check",
    "check_date",
    "describe_error",
    "difference",
    "field_of_role",
    "field_of_source",
    "first_line",
    "flatten",
    "is_config_file",
    "is_encodable",
    "is_function_spec",
    "is_reward_role",
    "kind_of_source",
    "load",
    "model_from_json",
    "nearest",
    "one_line",
    "override",
    "parent_specs",
    "parse_names",
    "parse_overrides",
    "parse_value",
    "reason_of",
    "reward_table",
    "role_of",
    "run_file",
    "short",
    "stored_config",
    "to_json",
]
