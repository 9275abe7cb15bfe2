"""Rounding: one function rounds every role, and it never changes what a model computes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import Chain, rows
from test_models import count_positions, tiny, words

from alignjax import config as configs
from alignjax.algorithms.ppo import PPO
from alignjax.algorithms.stage import RunInputs
from alignjax.data import chat
from alignjax.machine import sharding
from alignjax.machine.profile import Phases
from alignjax.models import scoring, transformer
from alignjax.models.scoring import PackedTokens
from alignjax.weights import roles

MESH = sharding.make_mesh(configs.Mesh(), jax.devices()[:1])
BFLOAT16 = jnp.dtype("bfloat16")
FLOAT32 = jnp.dtype("float32")


@functools.partial(jax.jit, static_argnums=(0, 1))
def read(model, head, params, packed):
    """Return what a role computes of packed tokens."""
    if head == "scalar":
        return transformer.scalar(params, scoring.hidden_states(model, params, packed))
    targets = jnp.broadcast_to(jnp.arange(1, 9), (3, 8))
    hidden = scoring.hidden_states(model, params, packed)
    logprobs = scoring.token_logprobs(model, params, packed, targets)
    return logprobs, transformer.logits(model, params, hidden)


@pytest.mark.parametrize(
    "head, changes",
    [
        ("lm", {"qk_norm": True}),
        ("lm", {"tied": True}),
        ("scalar", {}),
    ],
    ids=str,
)
def test_rounded_parameters_compute_the_same_to_the_bit(head, changes):
    model, params = tiny(0, head, dtype="bfloat16", **changes)
    segments = np.ones((3, 9), np.int32)
    packed = PackedTokens(
        tokens=words(1, 3, 9), positions=count_positions(segments), segments=segments
    )
    exact = read(model, head, params, packed)
    rounded = read(model, head, transformer.rounded(model, params), packed)
    for one, other in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("dtype", ["", "float32", "bfloat16"])
@pytest.mark.parametrize("memory", ["device", "host"])
def test_frozen_parameters_are_what_the_planner_counts(head, dtype, memory):
    model = tiny(dtype="bfloat16")[0]
    shapes = roles.abstract_params(model, head, MESH)
    params = jax.device_put(tiny(0, head)[1], jax.tree.map(lambda x: x.sharding, shapes))
    frozen = roles.freeze(model, params, dtype, memory)
    planned = roles.abstract_frozen(model, shapes, dtype, memory)

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)

    assert described(frozen) == described(planned)


def test_only_matrices_are_rounded_and_no_scalar_head():
    for head in ("lm", "scalar"):
        model, params = tiny(0, head, dtype="bfloat16", qk_norm=True)
        types = transformer.computed_types(model, params)
        layer = types["layers"]
        assert layer["attention"]["q"] == {"kernel": BFLOAT16, "bias": FLOAT32}
        assert layer["mlp"]["down"] == {"kernel": BFLOAT16}
        assert types["embed"] == {"embedding": BFLOAT16}
        norms = (layer["norm1"], layer["attention"]["q_norm"], types["norm"])
        assert all(norm == {"scale": FLOAT32} for norm in norms)
    assert types["head"] == {"kernel": FLOAT32, "bias": FLOAT32}
    model, params = tiny(0, "lm", dtype="bfloat16")
    assert transformer.computed_types(model, params)["head"] == {"kernel": BFLOAT16}


def decides_on_rounding(name: str) -> bool:
    """Return whether a field of a config decides on how numbers are rounded, or where."""
    return name.endswith(("dtype", "_memory")) or name in ("model.remat", "model.attention")


def settings_of(config: dict) -> str:
    """Return the fields of a config that decide on rounding, as JSON."""
    return json.dumps({name: config[name] for name in sorted(config) if decides_on_rounding(name)})


def shipped_settings() -> list[str]:
    """Return the different settings of types in the PPO configs of configs/."""
    shipped = []
    for path in sorted(configs.CONFIGS.rglob("*.py")):
        variants = configs.run_file(path).get("VARIANTS", ("",))
        # A config without a default variant has models for variants.
        names = ("",) if "" in variants else variants
        shipped += [configs.load(f"{path}:{variant}") for variant in names]
    ppo_configs = [dict(configs.flatten(config)) for config in shipped if config.stage == "ppo"]
    return sorted({settings_of(config) for config in ppo_configs})


def test_the_settings_of_the_report_are_among_the_shipped_ones():
    rounded = [json.loads(settings) for settings in shipped_settings()]
    assert {"bfloat16", ""} <= {settings["ppo.frozen_dtype"] for settings in rounded}
    assert {"bfloat16", "float32"} <= {settings["model.dtype"] for settings in rounded}


def is_off_the_grid(x: jax.Array) -> bool:
    """Return whether no more than a few numbers of an array are bfloat16 numbers."""
    on_grid = np.asarray(x == x.astype(jnp.bfloat16))
    return on_grid.mean() < 0.1


@pytest.mark.parametrize("settings", shipped_settings())
def test_the_first_step_passes_its_checks_with_every_shipped_setting(chain: Chain, settings: str):
    """Policy and reference have been trained: no parameter is a bfloat16 number by chance.

    The tiny chain's own run has made the checks of its setting, on eight devices.
    """
    finished = chain.runs / "ppo-tiny"
    if settings == settings_of(json.loads((finished / "config.json").read_text())):
        assert rows(finished / "metrics.jsonl")[0]["objective/kl"] == 0
        return
    overrides = {name: str(value) for name, value in json.loads(settings).items()}
    config = configs.load("ppo.py:tiny", overrides)
    parents = {role: chain.runs / "sft-tiny" for role in ("policy", "reference")}
    parents |= {role: chain.runs / "rm-tiny" for role in ("value", "reward")}
    inputs = RunInputs(
        parents=parents,
        tokenizer=chat.load_tokenizer(chain.runs / "sft-tiny" / "tokenizer"),
        say=str,
        phases=Phases(),
    )
    with jax.set_mesh(MESH):
        stage = PPO.load(config, MESH, inputs)
        state = stage.init_state()
        policy = state["policy"].params
        assert all(jax.tree.leaves(jax.tree.map(is_off_the_grid, policy)))
        params = stage.role_params(state)
        batch = stage.prompts.batch(0)
        rollout = stage.compiled.responder.respond(policy, batch, 0)
        minibatches = stage.pack(batch, rollout)
        scored = stage.score(params, state, rollout, minibatches)
        stage.check(params, scored, minibatches)
    assert not np.asarray(scored.responses["kl"]).any()
    assert not np.asarray(scored.responses["log_ratio"]).any()
