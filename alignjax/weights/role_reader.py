"""Reads the roles of a run; a base that several roles have is read once, and they share it.

With adapters (`lora.rank` above 0), a role is the frozen base of its parent beneath the adapters,
which begin as the parent's own if those have the same settings and else change nothing. Frozen
roles have adapters too: policy and reference are then computed by the same operations, and the KL
between them is 0 before the first update, exactly.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import jax

from alignjax.config import Config, Model, kind_of_role
from alignjax.machine import sharding
from alignjax.models import lora
from alignjax.weights import bases, roles
from alignjax.weights.roles import Params


class RoleReader:
    """The parameters of the roles of a run, each read from its parent."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, parents: Mapping[str, Path]):
        """`parents` maps roles to directories; a role without one begins with new parameters."""
        self.config = config
        self.mesh = mesh
        self.parents = dict(parents)
        self.key = jax.random.key(config.seed)
        self.origins: dict[str, bases.Origin] = {}
        if config.lora.rank:
            self.origins = {
                role: bases.origin_of(directory, self.head_of(role), config.lora)
                for role, directory in parents.items()
            }
        self.shared: dict[tuple[Path, str], Params] = {}

    def head_of(self, role: str) -> str:
        """Return the head of a role: "lm" or "scalar"."""
        return roles.HEADS[self.config.stage, kind_of_role(role)]

    def base(self, role: str) -> Params | None:
        """Return the frozen base of a role that is trained, None if it trains all parameters."""
        if not self.origins:
            return None
        return self.base_beneath(role, self.config.model)

    def initial(self, role: str) -> Params:
        """Return what a role trains as it is before the first update, in arrays of its own."""
        head = self.head_of(role)
        if not self.origins:
            directory = self.parents.get(role)
            return roles.load(self.config.model, head, self.mesh, self.key, directory)
        return self.adapters(role, self.config.model)

    def frozen(self, role: str, model: Model) -> Params:
        """Return all parameters of a role that is only read; `model` is its architecture.

        Raises UserError if a scalar head is wanted and the parent is a language model.
        """
        ppo = self.config.ppo
        if self.origins:
            self.check_has_scores(role, model)
            return lora.combine(self.base_beneath(role, model), self.adapters(role, model))
        params = roles.load_trained(model, self.head_of(role), self.mesh, self.parents[role])
        return roles.freeze(model, params, ppo.frozen_dtype, ppo.frozen_memory)

    # ------------------------------------------------------------------------------- with adapters

    def key_of(self, role: str) -> tuple[Path, str]:
        """Return what roles with the same base have in common."""
        origin = self.origins[role]
        return origin.base, origin.item

    def base_beneath(self, role: str, model: Model) -> Params:
        """Return the base of a role with the scales of the adapters, without a scalar head."""
        base = self.read_base(role, model)
        if self.head_of(role) == "scalar":
            base = lora.without_head(base)
        return lora.combine(base, lora.scales(self.config.lora, model.layers))

    def read_base(self, role: str, model: Model) -> Params:
        """Return the parameters of a role's base, which are read once and rounded.

        Rounding to the type of the computation changes no result, see `transformer.rounded`.
        """
        key = self.key_of(role)
        if key not in self.shared:
            sharing = [other for other in self.origins if self.key_of(other) == key]
            heads = {self.head_of(other) for other in sharing}
            head = "lm" if "lm" in heads else "scalar"
            params = roles.read(model, head, self.mesh, self.origins[role].base)
            is_frozen = {kind_of_role(other) for other in sharing} <= set(roles.FROZEN_ROLES)
            memory = self.config.ppo.frozen_memory if is_frozen else "device"
            self.shared[key] = roles.freeze(model, params, model.dtype, memory)
        return self.shared[key]

    def adapters(self, role: str, model: Model) -> Params:
        """Return the adapters that a role begins with, and its scalar head if it has one."""
        head = self.head_of(role)
        settings = self.config.lora
        run = self.origins[role].adapters
        new = functools.partial(roles.draw_adapters, model, head, settings=settings)
        shapes = jax.eval_shape(new, self.key)
        layout = sharding.param_shardings(shapes, self.mesh)
        drawn = jax.jit(new, out_shardings=layout)(self.key)
        trained = {}
        if run is not None:
            trained = roles.read_adapters(model, head, self.mesh, run, settings)
        elif head == "scalar":
            trained = self.scalar_head(role, model)
        return drawn | trained

    def check_has_scores(self, role: str, model: Model) -> None:
        """Raise UserError if a role must have a trained scalar head and its parent has none."""
        if self.head_of(role) == "lm" or self.scalar_head(role, model):
            return
        run = self.origins[role].adapters
        if run is None or roles.saved_head_of(run, "scalar") != "scalar":
            raise roles.no_scores(self.parents[role])

    def scalar_head(self, role: str, model: Model) -> Params:
        """Return the scalar head of a role's base as {"head": ...}, {} if it has none."""
        head = self.read_base(role, model).get("head", {})
        if "bias" not in head:
            return {}
        return {"head": jax.tree.map(lambda x: x.copy(), head)}
